"""Both scripts on a CUDA card against the CPU: `make test-gpu`.

Without a card, test_virtual_device.py runs its table on a simulated one.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

CARD = torch.cuda.is_available()
WHY = (
    "no card: CUDA_VISIBLE_DEVICES names it, as in `make test-gpu`; without it test_virtual_device.py does what it can"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CARD, reason=WHY)]

BF16, FP16 = {"mixed_precision": "bf16"}, {"mixed_precision": "fp16"}
IMAGES = {"validation_prompt": "a dog", "num_validation_images": 1}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2, "sample_batch_size": 2}
ALL = IMAGES | PRIOR | {"train_text_encoder": True, "use_ema": True, "gradient_checkpointing": True, "no_t5": True}
ALL |= {"train_batch_size": 2, "gradient_accumulation_steps": 2, "caption_dropout": 0.3, "offload": True}
INDUCTOR = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"}
# Flags of a row, four updates of one picture each otherwise; "within": how close its losses are to the CPU's float32.
CASES = {
    "float32": {"within": 1e-4},
    "bf16": BF16,
    "fp16": FP16,
    "cached latents": BF16 | {"cache_latents": True},
    "text encoders": BF16 | {"train_text_encoder": True},
    "prior, class images drawn": BF16 | PRIOR,
    "validation": BF16 | IMAGES,
    "offload": BF16 | IMAGES | {"offload": True},
    "gradient checkpointing": BF16 | {"gradient_checkpointing": True},
    "Prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "8-bit Adam": BF16 | {"use_8bit_adam": True},
    "8-bit base": BF16 | {"bnb_quantization_config_path": {"load_in_8bit": True}},
    "4-bit base": BF16 | {"bnb_quantization_config_path": {"load_in_4bit": True}, "within": 5e-2},
    "compiled": BF16 | {"environment": INDUCTOR},
    "everything, bf16": BF16 | ALL,
    "everything, fp16": FP16 | ALL,
    "fused backward pass": BF16 | {"fused_backward_pass": True, "max_grad_norm": "inf"},
    "bf16 weights": BF16 | {"full_bf16": True, "fused_backward_pass": True, "max_grad_norm": "inf"},
}


def needs(case):
    return CASES[case].keys() & {"bnb_quantization_config_path", "fused_backward_pass", "full_bf16"}


@pytest.fixture
def losses(script, run, monkeypatch, tmp_path):
    """Runs a script and returns its losses; the noise is the CPU's, so that both devices see the same."""
    draw_latents, log_update, seen = script.draw_latents, script.log_update, []

    def draw(args, vae_config, moments, seeds, device):
        return draw_latents(args, vae_config, moments, seeds, torch.device("cpu"))

    def log(accelerator, optimizer, figures, state):
        seen.append(figures["loss"])
        log_update(accelerator, optimizer, figures, state)

    monkeypatch.setattr(script, "draw_latents", draw)
    monkeypatch.setattr(script, "log_update", log)

    def losses(place, cpu=False, **flags):
        seen.clear()
        with monkeypatch.context() as patch:
            for name, value in flags.pop("environment", {}).items():
                patch.setenv(name, value)
            if cpu:
                patch.setenv("ACCELERATE_USE_CPU", "true")
            run(script, **{"max_train_steps": 4, "repeats": 8, "output_dir": tmp_path / place, **flags})
        return list(seen)

    return losses


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_cpu(script, losses, tmp_path, case):
    if absent := [flag for flag in needs(case) if f"--{flag} " not in script.METHOD_FLAGS]:
        pytest.skip(f"the script has no --{absent[0]}")
    flags = dict(CASES[case])
    within = flags.pop("within", 1e-2)
    if fields := flags.get("bnb_quantization_config_path"):
        flags["bnb_quantization_config_path"] = tmp_path / "bits.json"
        flags["bnb_quantization_config_path"].write_text(json.dumps(fields))
    if "class_prompt" in flags:
        flags["class_data_dir"] = tmp_path / "class"
    found = losses("card", **flags)
    own = ("mixed_precision", "environment", "bnb_quantization_config_path", "use_8bit_adam", "full_bf16")
    plain = {name: value for name, value in flags.items() if name not in own}
    expected = losses("cpu", cpu=True, **plain, prior_generation_precision="fp32")
    assert found == pytest.approx(expected, rel=within, abs=within)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_is_exact(script, run, tmp_path, precision):
    """A run of six updates, and two that were stopped after two and after four, end in the same weights."""
    results = []
    for place, lengths in {"once": (6,), "twice": (2, 4, 6)}.items():
        for length in lengths:
            flags = {"resume_from_checkpoint": "latest"} if length > lengths[0] else {}
            flags |= {"mixed_precision": precision, "use_ema": True, "repeats": 8, "checkpointing_steps": 2}
            flags |= {"full_determinism": True}
            run(script, **flags, max_train_steps=length, output_dir=tmp_path / place)
        files = sorted((tmp_path / place / "checkpoint-6").rglob("*.safetensors"))
        results.append([(path.name, load_file(path)) for path in files])
    for (name, once), (other, twice) in zip(*results, strict=True):
        assert name == other
        for key, tensor in once.items():
            torch.testing.assert_close(twice[key], tensor, rtol=0, atol=0, msg=f"{name}: {key}")


def test_memory_returns_to_what_it_was(run, script):
    """Nothing of a run stays on the card."""
    run(script, mixed_precision="bf16")
    before = torch.cuda.memory_allocated()
    run(script, mixed_precision="bf16", offload=True, use_ema=True, repeats=8)
    assert torch.cuda.memory_allocated() <= before + 2**20
