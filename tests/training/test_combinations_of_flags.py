"""Every combination of flags trains: each row of CASES is a short run of main in this process, by both scripts."""

import functools
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, in_turn
from diffusers import AutoencoderKL
from ranks import MEASURED
from safetensors.torch import load_file

# Pairwise: each two values of two factors meet in a row.
FACTORS = "train_batch_size prior captions train_text_encoder cache_latents".split()
PAIRWISE = [
    (1, False, None, False, True),
    (1, True, "parquet", True, False),
    (2, False, None, True, False),
    (2, True, "imagefolder", False, True),
    (3, False, "parquet", False, False),
    (3, True, None, True, True),
]
CASES = {"-".join(f"{value}" for value in row): dict(zip(FACTORS, row, strict=True)) for row in PAIRWISE} | {
    "bf16, all": {"mixed_precision": "bf16", "train_text_encoder": True, "prior": True, "train_batch_size": 2},
    "bf16, cached": {"mixed_precision": "bf16", "cache_latents": True, "gradient_checkpointing": True},
    "cosmap": {"weighting_scheme": "cosmap", "prior": True, "optimizer": "adamw"},
    "8-bit": {"use_8bit_adam": True, "checkpoint": {"preset": "real", "layers": 1}, "rank": 512},
    "Prodigy": {"optimizer": "Prodigy", "learning_rate": 1.0, "train_text_encoder": True},
    "checkpointing, mode": {"gradient_checkpointing": True, "train_text_encoder": True, "train_batch_size": 2}
    | {"weighting_scheme": "mode", "mode_scale": 0.8},
    "accumulation, logit_normal": {"gradient_accumulation_steps": 2, "train_batch_size": 2, "prior": True}
    | {"weighting_scheme": "logit_normal", "logit_mean": -0.5, "logit_std": 0.8},
    "crop, flip, repeats, sigma_sqrt": {"center_crop": True, "random_flip": True, "repeats": 3}
    | {"weighting_scheme": "sigma_sqrt", "precondition_outputs": 0},
    "half the precision on disk": {"checkpoint": {"variant": "fp16"}, "variant": "fp16", "train_text_encoder": True},
    "SD3.5": {"checkpoint": {"sd35": True}, "train_text_encoder": True},
    "no T5": {"checkpoint": {"t5": False}, "train_text_encoder": True, "train_batch_size": 2, "prior": True},
    "no T5, frozen": {"checkpoint": {"t5": False}, "captions": "parquet", "max_sequence_length": 154},
    "odd": {"checkpoint": {"preset": "odd"}, "train_batch_size": 3, "prior": True},
    "odd, all": {"checkpoint": {"preset": "odd"}, "train_text_encoder": True, "train_batch_size": 2, "prior": True},
    "real": {"checkpoint": {"preset": "real", "layers": 1}, "train_batch_size": 2, "prior": True},
    "workers": {"dataloader_num_workers": 2, "train_batch_size": 2, "prior": True},
}
CAPTIONS = ["a photo of sks dog", "sks dog in the yarn bucket", "", "art " * 100, "the photo"]


@pytest.fixture
def dataset(pictures, tmp_path):
    """Writes a dataset of five pictures and their captions to disk, in one of two forms; returns its folder."""
    from datasets import Dataset, Features, Image, Value

    def dataset(form):
        folder = tmp_path / form
        folder.mkdir()
        paths = sorted(pictures(5).iterdir())
        if form == "imagefolder":
            rows = [{"file_name": path.name, "text": text} for path, text in zip(paths, CAPTIONS, strict=True)]
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
            for path in paths:
                (folder / path.name).write_bytes(path.read_bytes())
        else:
            columns = {"image": list(map(str, paths)), "text": CAPTIONS}
            features = Features({"image": Image(), "text": Value("string")})
            Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
        return folder

    return dataset


@pytest.fixture
def settings(checkpoints, pictures, dataset):
    """The flags of a case, each shorthand spelled out."""

    def settings(case):
        flags = {"instance_data_dir": pictures(5), "max_train_steps": 2, "learning_rate": 1e-3, **case}
        if "checkpoint" in case:
            flags["pretrained_model_name_or_path"] = checkpoints(**flags.pop("checkpoint"))
        if flags.pop("prior", False):
            flags |= {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "num_class_images": 4}
            flags["class_data_dir"] = pictures(4, seed=9)
        if form := flags.pop("captions", None):
            flags |= {"instance_data_dir": None, "dataset_name": dataset(form), "caption_column": "text"}
        return flags

    return settings


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def spy(monkeypatch, script, name, after):
    """Has `after` called with the arguments by name, and the result, of each call of a function of the script."""
    function = getattr(script, name)

    @functools.wraps(function)
    def watched(*inputs, **kwargs):
        result = function(*inputs, **kwargs)
        after(inspect.signature(function).bind(*inputs, **kwargs).arguments, result)
        return result

    monkeypatch.setattr(script, name, watched)


@pytest.fixture
def watch(monkeypatch):
    """Keeps what a run does: models frozen and trained, shapes, losses, points, optimizer."""

    def watch(script):
        seen = SimpleNamespace(frozen=[], trained={}, before={}, batches=[], losses=[], points=[], optimizer=None)

        def keep_frozen(inputs, result):
            if isinstance(result, torch.nn.Module):
                seen.frozen.append((inputs["name"], result, copies(result)))

        def keep_trained(inputs, result):
            seen.trained, seen.before = dict(result), {name: copies(model) for name, model in result.items()}

        def keep_losses(inputs, result):
            seen.batches.append(tuple(len(one) for one in (*inputs["drawn"][:3], *inputs["text"])))
            seen.losses.append(result[0].detach())

        def keep_point(inputs, result):
            seen.points.append({name: value for name, value in inputs["figures"].items() if name not in MEASURED})

        def keep_optimizer(inputs, result):
            seen.optimizer = result

        spy(monkeypatch, script, "load_part", keep_frozen)
        spy(monkeypatch, script, "make_optimizer", keep_optimizer)
        spy(monkeypatch, script, "load_trained", keep_trained)
        spy(monkeypatch, script, "flow_losses", keep_losses)
        spy(monkeypatch, script, "log_update", keep_point)
        return seen

    return watch


def check_trained(seen):
    """What is trained is float32 and moved; what is frozen, whole models and parts of them, is as it was."""
    for name, model in seen.trained.items():
        before, moved = seen.before[name], []
        for parameter_name, parameter in model.named_parameters():
            same = torch.equal(before[parameter_name], parameter)
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32, f"{name}.{parameter_name}"
                assert parameter.isfinite().all(), f"{name}.{parameter_name}"
                moved.append(not same)
            else:
                assert same and parameter.grad is None, f"{name}.{parameter_name}"
        assert moved and sum(moved) >= 0.9 * len(moved), f"of {name}, {sum(moved)} of {len(moved)} tensors moved"
    for name, model, before in seen.frozen:
        if not any(model is other for other in seen.trained.values()):
            for parameter_name, parameter in model.named_parameters():
                assert not parameter.requires_grad and parameter.grad is None, f"{name}.{parameter_name}"
                same = parameter.is_meta or torch.equal(before[parameter_name], parameter)
                assert same, f"{name}.{parameter_name}"


# By one script: what no line of the other treats otherwise.
SHARED = ["cosmap", "accumulation, logit_normal", "crop, flip, repeats, sigma_sqrt", "bf16, cached", "no T5, frozen"]
SHARED += ["odd", "real", "workers", "1-False-None-False-True", "2-True-imagefolder-False-True"]
SHARED += ["3-False-parquet-False-False"]
ROWS = [(kind, case) for kind in SCRIPTS for case in CASES if case not in SHARED]


@pytest.mark.parametrize(("kind", "case"), [*ROWS, *in_turn([(case,) for case in SHARED])])
def test_combination(script, run, settings, watch, case):
    case = CASES[case]
    seen, flags = watch(script), settings(case)
    if not hasattr(script, "LORA_LAYERS"):
        flags.pop("rank", None)
    run(script, **flags)

    images = case.get("train_batch_size", 1) * (2 if case.get("prior") else 1)
    assert all(len(set(sizes)) == 1 for sizes in seen.batches), "latents, embeds and draws are as many"
    assert seen.batches[0][0] == images
    assert all(losses.dtype == torch.float32 and losses.isfinite().all() for losses in seen.losses)
    assert len(seen.points) == 2
    assert len(seen.losses) == 2 * case.get("gradient_accumulation_steps", 1)
    t5 = case.get("checkpoint", {}).get("t5", True)
    encoders = script.TEXT_ENCODERS if t5 and not hasattr(script, "LORA_LAYERS") else script.TEXT_ENCODERS[:2]
    assert list(seen.trained) == ["transformer", *(encoders if case.get("train_text_encoder") else [])]
    check_trained(seen)
    groups = [group["name"] for group in seen.optimizer.param_groups]
    assert groups == list(seen.trained)
    kinds = {
        tensor.dtype for state in seen.optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)
    }
    assert (torch.uint8 in kinds) == bool(case.get("use_8bit_adam"))
    assert torch.bfloat16 not in kinds


def test_checkpointing_changes_no_gradient(script, run, settings, watch):
    """The same run with and without recomputed activations: the figures of its updates are the same."""
    points = []
    for checkpointing in (False, True):
        seen = watch(script)
        run(script, **settings({"train_text_encoder": True, "gradient_checkpointing": checkpointing}))
        points.append(seen.points[-2:])
        flags = [model.is_gradient_checkpointing for model in seen.trained.values()]
        assert flags == [checkpointing] * len(flags)
    for one, other in zip(*points, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_loss_of_a_fixed_batch_falls(script, run, settings, watch, monkeypatch):
    """Thirty updates of transformer and encoders on one draw of latents, noise and level."""
    draw_latents, kept = script.draw_latents, []

    def draw_once(*inputs):
        if not kept:
            kept.append(draw_latents(*inputs))
        return kept[0]

    monkeypatch.setattr(script, "draw_latents", draw_once)
    seen = watch(script)
    rate = 5e-2 if hasattr(script, "LORA_LAYERS") else 2e-3
    flags = {"learning_rate": rate, "text_encoder_lr": rate, "max_train_steps": 30, "train_batch_size": 2}
    run(script, **settings({"train_text_encoder": True, **flags, "repeats": 30}))
    losses = [losses.mean().item() for losses in seen.losses]
    assert len(losses) == 30
    assert losses[-1] < 0.9 * losses[0]
    thirds = [sum(losses[first : first + 10]) for first in (0, 10, 20)]
    assert thirds[0] > thirds[1] > thirds[2]


BLOCKS = {
    "layers": ({"lora_layers": "attn.to_k,attn.to_q"}, {"0.attn.to_k", "0.attn.to_q", "1.attn.to_k", "1.attn.to_q"}),
    "blocks": (
        {"lora_layers": "attn.to_k,ff.net.2", "lora_blocks": "1"},
        {"1.attn.to_k", "1.ff.net.2"},
    ),
    "blocks alone": (
        {"lora_blocks": "0"},
        {f"0.attn.{name}" for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()},
    ),
    "attn2": ({"lora_layers": "attn2.to_q", "checkpoint": {"sd35": True}}, {"0.attn2.to_q"}),
    "trailing commas": (
        {"lora_layers": "attn.to_k, ff.net.2,", "lora_blocks": "0-1,"},
        {"0.attn.to_k", "0.ff.net.2", "1.attn.to_k", "1.ff.net.2"},
    ),
}


@pytest.mark.parametrize(("flags", "expected"), BLOCKS.values(), ids=BLOCKS.keys())
def test_lora_layers_and_blocks(lora, run, settings, watch, flags, expected):
    """The adapters that are trained and written are those that were asked for."""
    seen = watch(lora)
    folder = run(lora, **settings(flags))
    check_trained(seen)
    names = load_file(folder / lora.WEIGHTS).keys()
    found = {name.removeprefix("transformer.transformer_blocks.").split(".lora_")[0] for name in names}
    assert found == expected
    assert len(names) == 2 * len(expected)


@pytest.mark.parametrize(("kind", "cached"), [("full", False), ("lora", True)])
def test_repeats_and_class_images_make_an_epoch(script, run, settings, watch, cached):
    """Five images twice are ten items; four class images fit in, and two copies fill the third batch."""
    seen = watch(script)
    case = {"repeats": 2, "prior": True, "train_batch_size": 4, "max_train_steps": None, "num_train_epochs": 2}
    run(script, **settings(case | {"cache_latents": cached}))
    assert [sizes[0] for sizes in seen.batches] == [8] * 6


@pytest.mark.parametrize(("form", "cached"), [("parquet", False), ("imagefolder", True)])
def test_an_image_meets_its_own_caption(script, run, settings, monkeypatch, pictures, checkpoints, form, cached):
    """In any order: the latents of a batch are those of the pictures that its prompts describe."""
    batches = []
    spy(monkeypatch, script, "collate", lambda inputs, result: batches.append(result))
    case = {"captions": form, "train_batch_size": 2, "num_train_epochs": 2, "max_train_steps": None}
    monkeypatch.setattr(script.DreamBoothDataset, "has_fixed_crops", lambda dataset: False)  # of pixels, too
    run(script, **settings(case | {"cache_latents": cached, "center_crop": True}))
    vae, expected = AutoencoderKL.from_pretrained(checkpoints(), subfolder="vae"), {}
    for path, caption in zip(sorted(pictures(5).iterdir()), CAPTIONS, strict=True):
        image = script.open_image(path, 32, 0)
        pixels = script.crop_image(image, (32, 32), torch.Generator(), True, False)
        data = script.encode_moments(vae, pixels[None])[0] if cached else pixels
        expected.setdefault(" ".join(caption.split()) or "a photo of sks dog", []).append(data)
    met = [(prompt, one) for data, prompts, _ in batches for prompt, one in zip(prompts, data, strict=True)]
    assert len(met) == 12, "a batch is full"
    for prompt, data in met:
        assert any(torch.allclose(data, one, atol=1e-5) for one in expected[prompt]), prompt
