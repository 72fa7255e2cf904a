"""Losses of 20 updates and a small checkpoint of each script, kept to notice any change.

    make golden    # writes golden.json and checkpoints/ beside this file again, if a change is meant

The base's weights and the pictures are made here in a way that does not change with the libraries' versions.
"""

import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import conftest
import numpy as np
import pytest
import tiny_sd3
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
LOSSES, CHECKPOINTS, SAVED = HERE / "golden.json", HERE / "checkpoints", 2
COMMON = {"instance_prompt": "a photo of sks dog", "resolution": 32, "learning_rate": 1e-3, "lr_warmup_steps": 0}
COMMON |= {"train_batch_size": 2, "max_train_steps": 20, "seed": 0, "report_to": "none", "output_dir": "out"}
COMMON |= {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures"}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": "class", "num_class_images": 4}
SETTINGS = {
    "plain": {"lr_scheduler": "cosine", "lr_warmup_steps": 5},
    "class images, text encoders": {**PRIOR, "train_text_encoder": True, "text_encoder_lr": 1e-3},
    "cached latents, accumulation": {"cache_latents": True, "gradient_accumulation_steps": 2, "random_flip": True},
    "captions, buckets, SD3.5": {
        "pretrained_model_name_or_path": "sd35",
        "instance_data_dir": "captioned",
        "caption_dropout": 0.3,
        "use_aspect_ratio_buckets": True,
        "aspect_ratio_buckets": "32,48;48,32",
        "weighting_scheme": "mode",
        "precondition_outputs": 0,
    },
}
FIRST = {"max_train_steps": SAVED, "checkpointing_steps": SAVED, "use_ema": True}
RESUMED = {"max_train_steps": 6, "resume_from_checkpoint": f"checkpoint-{SAVED}", "use_ema": True}


def make_folders(folder):
    """Two bases, pictures in two shapes, the same with captions, and class images."""
    for name, sd35 in (("base", False), ("sd35", True)):
        draw_weights(tiny_sd3.build(folder / name, sd35=sd35))
    for name, count in (("pictures", 5), ("captioned", 5), ("class", 4)):
        (folder / name).mkdir()
        for number in range(count):
            shape = ((64, 88), (88, 64))[number % 2]
            rows, columns = np.indices(shape)
            bands = [(rows * (number + 2 + band) + columns * (3 * band + len(name))) % 256 for band in range(3)]
            path = folder / name / f"{number}.png"
            Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8)).save(path)
            if name == "captioned" and number:
                path.with_suffix(".txt").write_text(f"the art of dog {number}")


def draw_weights(folder):
    """Replaces the weights of a pipeline, which the libraries start in an order that changes with their versions."""
    for path in sorted(folder.rglob("*.safetensors")):
        weights = {}
        for name, old in sorted(load_file(path).items()):
            new = torch.randn(old.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            near = 1 if "norm" in name and name.endswith("weight") else 0
            weights[name] = old if "pos_embed.pos_embed" in name else near + 0.02 * new
            if old.ndim > 1 and "pos_embed.pos_embed" not in name:
                weights[name] = new / old[0].numel() ** 0.5
        save_file(weights, path, metadata={"format": "pt"})


def run(kind, setting):
    """The loss of each update of a run in the working directory."""
    script, losses = conftest.load_script(kind), []

    def note(accelerator, state, figures):
        losses.extend([figures["loss"]] if "loss" in figures else [])

    words = []
    for name, value in (COMMON | setting).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    with conftest.isolated(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script, "log_figures", note)
        script.main(script.parse_args(words))
    return losses


def keep_checkpoint(kind):
    """Keeps the checkpoint of a run of the working directory."""
    kept = CHECKPOINTS / kind
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(Path("out", f"checkpoint-{SAVED}"), kept)


def take_checkpoint(kind):
    """Puts the checkpoint that is kept into the working directory, as if a run there had written it."""
    return Path(shutil.copytree(CHECKPOINTS / kind, Path("out", f"checkpoint-{SAVED}")))


def main():
    figures = {}
    for kind in conftest.SCRIPTS:
        for name, setting in {**SETTINGS, "checkpoint": FIRST, "resumed": RESUMED}.items():
            if name != "resumed":
                shutil.rmtree("out", ignore_errors=True)
            figures.setdefault(kind, {})[name] = run(kind, setting)
            if name == "checkpoint":
                keep_checkpoint(kind)
    LOSSES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_folders(Path(folder))
        main()
        os.chdir(HERE)
