"""What has to work with every version that requirements_sd3.txt allows: `make test-oldest` and `make test-2025`."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

pytestmark = [pytest.mark.oldest, pytest.mark.usefixtures("few_steps")]
PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2, "class_data_dir": "class"}
VALIDATION = {"validation_prompt": "a dog in bucket", "num_validation_images": 2, "validation_data_dir": "pictures"}
# Folders by their names in `folders`; wide: a transformer whose weights are large enough for 8-bit states.
CASES = {
    "plain": {},
    "text encoders": {"train_text_encoder": True, "gradient_checkpointing": True},
    "class images": {**PRIOR, "cache_latents": True, "gradient_accumulation_steps": 2},
    "8 bit": {"use_8bit_adam": True, "wide": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1e4},  # times an estimate that starts at 1e-6
    "dataset": {"dataset_name": "dataset", "caption_column": "text", "instance_data_dir": None},
    "captions": {"instance_data_dir": "dataset", "instance_prompt": None},
    "buckets": {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "32,48;48,32"},
    "average": {**VALIDATION, "use_ema": True, "ema_decay": 0.5, "report_to": "tensorboard"},
    "bfloat16": {"mixed_precision": "bf16", "max_sequence_length": 120},
}
LORA_CASES = {"DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True, "lora_alpha": 3, "lora_layers": "all-linear"}}


@pytest.fixture
def folders(pictures, tmp_path):
    """Pictures, the same as an imagefolder with captions, and a place for class images."""
    shutil.copytree(pictures(3, size=(96, 64)), tmp_path / "dataset")
    names = sorted(path.name for path in (tmp_path / "dataset").iterdir())
    rows = [{"file_name": name, "text": f"a photo of sks dog {number}"} for number, name in enumerate(names)]
    (tmp_path / "dataset/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"pictures": pictures(2), "dataset": tmp_path / "dataset", "class": tmp_path / "class"}


@pytest.fixture
def flags_of(checkpoints, folders):
    def flags_of(kind, case):
        flags = {"learning_rate": 1e-2, **CASES.get(case, {}), **LORA_CASES.get(case, {})}
        flags |= {name: folders[value] for name, value in flags.items() if str(value) in folders}
        if flags.pop("wide", False):
            flags["pretrained_model_name_or_path"] = checkpoints(transformer_width=64)
            flags |= {"rank": 64} if kind == "lora" else {}
        return flags

    return flags_of


@functools.cache
def draw(kind, base, out=None):
    """Pixels that a pipeline draws: the base's, or a result's, which is read as the model card says."""
    whole = out if out and kind == "full" else base
    pipeline = StableDiffusion3Pipeline.from_pretrained(whole, torch_dtype=torch.float32)
    if out and kind == "lora":
        pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline("sks dog", height=32, width=32, generator=generator).images[0]).astype(int)


@pytest.mark.parametrize("case", [*CASES, *LORA_CASES])
def test_result_is_read_and_differs_from_the_base(kind, script, run, checkpoints, flags_of, case):
    if kind == "full" and case in LORA_CASES:
        return
    flags = flags_of(kind, case)
    out, base = run(script, **flags), flags.get("pretrained_model_name_or_path", checkpoints())
    assert np.abs(draw(kind, base, out) - draw("", base)).max() > 0
    assert (out / "README.md").read_text().startswith("---\n")
    if case == "average":
        assert len(list(out.glob("image_[01].png"))) == 2
        assert list(out.rglob("events.out.tfevents*"))
    if case == "class images":
        assert len([path for path in flags["class_data_dir"].iterdir() if Image.open(path).size == (32, 32)]) == 2


def test_validation_image_is_what_the_result_draws(kind, script, run, checkpoints):
    """Trained weights are saved as they are, and their scale with them."""
    flags = {"validation_prompt": "sks dog", "num_validation_images": 1, "learning_rate": 1e-2}
    flags |= {"lora_alpha": 6} if kind == "lora" else {}
    out = run(script, max_sequence_length=256, **flags)
    drawn = np.asarray(Image.open(out / "image_0.png")).astype(int)
    assert np.abs(drawn - draw(kind, checkpoints(), out)).max() <= 1


@pytest.mark.parametrize("case", ["8 bit", "average"])
def test_resumed_run_is_the_whole_one(kind, script, run, flags_of, tmp_path, case):
    flags = flags_of(kind, case) | {"max_train_steps": 3, "checkpointing_steps": 2}
    whole = run(script, **flags, output_dir=tmp_path / "whole")
    run(script, **flags, output_dir=tmp_path / "again", resume_from_checkpoint=whole / "checkpoint-2")
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*.safetensors")) if "checkpoint" not in str(path)]
    assert files
    for path in files:
        ours, theirs = load_file(whole / path), load_file(tmp_path / "again" / path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), path


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", ""])
def test_adapters_to_start_from_are_read(lora, run, tmp_path, name):
    """From a file or its folder, without a network."""
    given = run(lora, learning_rate=1e-2, output_dir=tmp_path / "given")
    saved = run(lora, learning_rate=0.0, init_lora=given / name)
    theirs, ours = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (given, saved))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
