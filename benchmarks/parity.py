"""Compares the losses of both scripts with those of diffusers' own, with all random draws made equal.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python benchmarks/parity.py diffusers/examples/dreambooth

Both use the same order of images, noise and noise levels in each batch, the mean of the VAE's posterior, the same
initial adapters, no dropout and centre crops. They train the tests' tiny checkpoint in float32 on a CPU. Each row has
the largest relative difference of any batch's loss. Not compared is what diffusers' scripts cannot do: class images
with trained text encoders or with a batch above 1, and batches of several images with one prompt.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision_stand_in import install

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/support")]

import conftest  # noqa: E402
import tiny_sd3  # noqa: E402

SCRIPTS = {"lora": "train_dreambooth_lora_sd3.py", "full": "train_dreambooth_sd3.py"}
COMMON = {"instance_prompt": "a photo of sks dog", "resolution": 32, "train_batch_size": 1, "learning_rate": 1e-3}
COMMON |= {"lr_warmup_steps": 0, "seed": 0, "center_crop": True, "checkpointing_steps": 1000}
TEXT = {"train_text_encoder": True, "text_encoder_lr": 1e-3}
CAPTIONS = {"dataset_name": "captioned", "instance_data_dir": None, "caption_column": "text"}
SETTINGS = {
    "plain": {},
    "prior": {
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "class_data_dir": "class",
        "num_class_images": 4,
    },
    "captions, batch of 2": {**CAPTIONS, "train_batch_size": 2},
    "text encoders": TEXT,
    "text encoders, captions": {**CAPTIONS, **TEXT, "train_batch_size": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01},
    "checkpointing": {"gradient_checkpointing": True, **TEXT},
    "sigma_sqrt": {"weighting_scheme": "sigma_sqrt"},
    "mode": {"weighting_scheme": "mode", "mode_scale": 0.8},
    "cosmap, velocities": {"weighting_scheme": "cosmap", "precondition_outputs": 0},
    "cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 3, "adam_weight_decay": 0.1, "adam_beta2": 0.95},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, **TEXT},
    "SD3.5": {"pretrained_model_name_or_path": "sd35"},
}
LORA_SETTINGS = {
    "cached latents": {"cache_latents": True},
    "layers and blocks": {"lora_layers": "attn.to_k,attn.to_q", "lora_blocks": "1", "rank": 8},
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Folder with diffusers' two scripts.")
    parser.add_argument("--only", help="Run only the settings whose name contains this.")
    parser.add_argument("--script", choices=SCRIPTS, help="Unset: both.")
    parser.add_argument("--steps", type=int, default=8, help="Updates per run.")
    return parser.parse_args()


def make_folders(folder):
    """Makes checkpoints, four pictures, the same with captions, and class images. Returns their paths by name."""
    tiny_sd3.build(folder / "tiny")
    tiny_sd3.build(folder / "sd35", sd35=True)
    tiny_sd3.images(folder / "pictures", 4)
    tiny_sd3.images(folder / "class", 4, seed=7)
    paths = tiny_sd3.images(folder / "captioned", 4)
    rows = [{"file_name": path.name, "text": f"a photo of dog {number}"} for number, path in enumerate(paths)]
    (folder / "captioned/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {path.name: path for path in folder.iterdir()}


def make_argv(setting, folders, out, steps):
    flags = {"pretrained_model_name_or_path": "tiny", "instance_data_dir": "pictures", "max_train_steps": steps}
    flags |= {**COMMON, **setting, "output_dir": out}
    words = []
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(folders.get(value, value))]
    return words


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_{path.parent.name}", path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def draw(*key):
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def pin(monkeypatch, script):
    """Makes a script's draws depend on the batch's number alone. Returns the list that collects its losses."""
    from accelerate import Accelerator
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.training_utils import compute_density_for_timestep_sampling
    from peft.tuners.lora import LoraLayer

    losses, adapters = [], []

    def noise_like(latents):
        return torch.randn(latents.shape, generator=draw("noise", len(losses)))

    def times(*args, generator=None, device=None, **kwargs):
        return compute_density_for_timestep_sampling(*args, generator=draw("times", len(losses)), **kwargs)

    def latents_and_noise(args, vae_config, moments, seeds, device):
        latents = (moments.chunk(2, dim=1)[0] - vae_config.shift_factor) * vae_config.scaling_factor
        density = {"logit_mean": args.logit_mean, "logit_std": args.logit_std, "mode_scale": args.mode_scale}
        return latents, noise_like(latents), times(args.weighting_scheme, len(latents), **density), None

    def start_adapters(layer, name, *args, **kwargs):
        reset(layer, name, *args, **kwargs)
        if name in layer.lora_A and not layer.lora_A[name].weight.is_meta:  # on meta: a result is read
            adapters.append(name)
            weight = layer.lora_A[name].weight
            weight.data = torch.randn(weight.shape, generator=draw("adapter", len(adapters))) / len(weight)

    def backward(accelerator, loss, **kwargs):
        losses.append(loss.item())
        back(accelerator, loss, **kwargs)

    def encode(text_encoders, tokenizers, prompt, max_sequence_length=77, text_input_ids_list=None, **kwargs):
        if tokenizers is None:  # diffusers' full script passes ids without tokenizers, and would fail
            tokenizers = [lambda *_, ids=ids, **__: SimpleNamespace(input_ids=ids) for ids in text_input_ids_list]
            prompt = [""] * len(text_input_ids_list[0])
        return encode_prompt(
            text_encoders, tokenizers, prompt, max_sequence_length, text_input_ids_list=text_input_ids_list, **kwargs
        )

    def attention(*args, **kwargs):
        return attend(*args, **kwargs | {"dropout_p": 0.0})

    functional, attend = torch.nn.functional, torch.nn.functional.scaled_dot_product_attention
    encode_prompt = getattr(script, "encode_prompt", None)
    reset, back, list_folder = LoraLayer.reset_lora_parameters, Accelerator.backward, Path.iterdir
    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", start_adapters)
    monkeypatch.setattr(Accelerator, "backward", backward)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(list_folder(path))))
    # T5 has dropout; in its attention it is an argument of a torch function.
    monkeypatch.setattr(functional, "dropout", lambda states, *args, **kwargs: states)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch, "randperm", lambda count, **kwargs: torch.arange(count))
    if hasattr(script, "draw_latents"):
        monkeypatch.setattr(script, "draw_latents", latents_and_noise)
    else:
        monkeypatch.setattr(script, "encode_prompt", encode)
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mean)
        monkeypatch.setattr(torch, "randn_like", noise_like)
        monkeypatch.setattr(script, "compute_density_for_timestep_sampling", times)
    return losses


def run(script, argv):
    """The loss of each batch of a run."""
    with conftest.isolated(), contextlib.redirect_stdout(sys.stderr), pytest.MonkeyPatch.context() as monkeypatch:
        losses = pin(monkeypatch, script)
        script.args = script.parse_args(argv)  # diffusers' read it as a global too
        script.main(script.args)
    return losses


def main(args):
    install()
    largest = 0
    for kind in [args.script] if args.script else SCRIPTS:
        scripts = load(args.folder / SCRIPTS[kind]), load(ROOT / SCRIPTS[kind])
        settings = SETTINGS | (LORA_SETTINGS if kind == "lora" else {})
        for title in [title for title in settings if (args.only or "") in title]:
            with tempfile.TemporaryDirectory() as name:
                folder, losses = Path(name), []
                folders = make_folders(folder)
                for script in scripts:
                    out = folder / f"out-{len(losses)}"
                    losses.append(run(script, make_argv(settings[title], folders, out, args.steps)))
            difference = max(abs(ours - theirs) / theirs for theirs, ours in zip(*losses, strict=True))
            largest = max(largest, difference)
            print(f"{kind}  {title:28}{len(losses[0]):4} batches  {difference:.0e}", flush=True)
    print(f"largest relative difference of any loss: {largest:.0e}")


if __name__ == "__main__":
    main(parse_args())
