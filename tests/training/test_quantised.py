"""A base in 8 or 4 bits. Both checks for a GPU are skipped by the tests, as bitsandbytes trains on a CPU too."""

import json
import sys

import pytest
import torch
from bitsandbytes.nn import Int8Params, Params4bit
from conftest import ROOT, isolated
from diffusers import StableDiffusion3Pipeline
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from safetensors.torch import load_file

WEIGHTS = "pytorch_lora_weights.safetensors"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
CASES = {  # the file, the class and bits of a quantised weight, how far a loss may be from that of the float32 base
    "8 bit": ({"load_in_8bit": True}, Int8Params, 8, 0.01),
    "4 bit": (NF4, Params4bit, 4, 0.05),
}


@pytest.fixture
def any_device(lora, monkeypatch):
    read_quantization = lora.read_quantization

    def read(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return read_quantization(*args)

    monkeypatch.setattr(lora, "read_quantization", read)
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)


@pytest.fixture
def losses(lora, run, monkeypatch):
    """Runs the script, and returns its output_dir and {update: loss}."""
    seen, log_update = {}, lora.log_update

    def recorded(accelerator, optimizer, figures, state):
        seen[state.step] = figures["loss"]
        log_update(accelerator, optimizer, figures, state)

    def losses(**flags):
        seen.clear()
        return run(lora, **flags), dict(seen)

    monkeypatch.setattr(lora, "log_update", recorded)
    return losses


@pytest.mark.parametrize("case", CASES)
def test_trains_resumes_and_saves(lora, losses, tmp_path, monkeypatch, any_device, case):
    fields, kind, bits, tolerance = CASES[case]
    path, bases, load_trained = tmp_path / "bits.json", [], lora.load_trained
    path.write_text(json.dumps(fields))

    def recorded(*args):
        trained = load_trained(*args)
        bases.append(trained["transformer"].transformer_blocks[0])
        return trained

    monkeypatch.setattr(lora, "load_trained", recorded)
    base = ROOT / "demo/tiny-sd3"  # what a loss loses by rounding is told by weights that have learned
    flags = {
        "pretrained_model_name_or_path": base,
        "resolution": 64,
        "max_train_steps": 3,
        "checkpointing_steps": 2,
        "rank": 2,
    }
    flags |= {"gradient_checkpointing": True, "learning_rate": 1e-3}
    _, plain = losses(**flags, output_dir=tmp_path / "plain")
    flags |= {"bnb_quantization_config_path": path}
    whole, packed = losses(**flags, output_dir=tmp_path / "whole")
    for layer in (bases[1].attn.to_q.base_layer, bases[1].attn.to_add_out.base_layer, bases[1].ff.net[2]):
        assert type(layer.weight) is kind
        assert layer.weight.nbytes * 8 == bits * layer.in_features * layer.out_features
    assert bases[1].attn.to_q.lora_A["default"].weight.dtype == torch.float32
    assert packed == pytest.approx(plain, rel=tolerance)
    assert packed != plain

    flags |= {"output_dir": tmp_path / "resumed", "resume_from_checkpoint": whole / "checkpoint-2"}
    resumed, rest = losses(**flags)
    assert rest == {3: packed[3]}
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()

    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    pipeline.load_lora_weights(whole)
    loaded = dict(pipeline.transformer.named_parameters())
    saved = load_file(whole / WEIGHTS)
    assert len(saved) == 2 * 39  # five blocks, the last of which has no to_add_out
    for key, value in saved.items():
        name = key.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        assert torch.equal(loaded[name], value)
    assert any(value.abs().max() > 0 for key, value in saved.items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("{load_in_4bit: true}", "Expecting property name"),
        ("[4]", "(TypeError: "),
        ("4", "(TypeError: "),
        ('{"load_in_4bits": true}', "neither load_in_8bit nor load_in_4bit"),
        ("{}", "neither load_in_8bit nor load_in_4bit"),
        ('{"load_in_4bit": true, "bnb_4bit_quant_type": "nf5"}', "neither load_in_8bit nor load_in_4bit"),
        ('{"load_in_4bit": true, "load_in_8bit": true}', "load_in_4bit and load_in_8bit are both True"),
        ('{"load_in_8bit": true, "llm_int8_threshold": 6}', "llm_int8_threshold must be a float"),
        ('{"load_in_8bit": true}', "there is no GPU"),
    ],
)
def test_refused_before_anything_is_loaded(lora, argv, tmp_path, monkeypatch, capsys, text, message):
    path = tmp_path / "bits.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(lora.PromptTable, "fill", None)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with isolated(), pytest.raises(SystemExit, match="2"):
        lora.main(lora.parse_args(argv(bnb_quantization_config_path=path)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"script.py: error: --bnb_quantization_config_path {str(path)!r}: ")
    assert message in lines[0]
