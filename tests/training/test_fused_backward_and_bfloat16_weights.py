"""Full training on a small card: each weight is updated in the backward pass, or kept in bfloat16."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import isolated
from ranks import watch_updates
from safetensors.torch import load_file

FUSED = {"fused_backward_pass": True}
BF16 = {"full_bf16": True, "mixed_precision": "bf16"}
LONG = {"max_train_steps": 6, "checkpointing_steps": 3, "learning_rate": 1e-3, "max_grad_norm": "inf"}


def weights(folder, part="transformer"):
    return load_file(next(Path(folder, part).glob("*.safetensors")))


@pytest.mark.parametrize("extra", [{}, {"train_text_encoder": True, "text_encoder_lr": 1e-3}], ids=["", "encoders"])
def test_the_fused_backward_pass_changes_no_bit(full, run, tmp_path, extra):
    flags = LONG | extra | {"lr_scheduler": "cosine", "gradient_checkpointing": True}
    plain = run(full, **flags, output_dir=tmp_path / "plain")
    fused = run(full, **flags, **FUSED, output_dir=tmp_path / "fused")
    for part in ("transformer", "text_encoder") if extra else ("transformer",):
        one, other = weights(plain, part), weights(fused, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(FUSED | {"use_ema": True}, id="fused, averaged"),
        pytest.param(BF16, id="bfloat16"),
        pytest.param(FUSED | BF16 | {"use_8bit_adam": True}, id="both, 8 bit"),
        pytest.param(FUSED | BF16 | {"train_text_encoder": True, "use_ema": True}, id="both, encoders, averaged"),
    ],
)
def test_resumed_equals_uninterrupted(full, run, tmp_path, flags):
    whole = run(full, **LONG, **flags)
    checkpoint = shutil.copytree(whole / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    resumed = run(full, **LONG, **flags, output_dir=checkpoint.parent, resume_from_checkpoint="latest")
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {weight.dtype for weight in one.values()} == {torch.bfloat16 if "full_bf16" in flags else torch.float32}
    if "use_ema" in flags:
        average = torch.load(whole / "checkpoint-6/ema.bin", weights_only=True)
        assert {weight.dtype for weight in average["shadow_params"]} == {torch.float32}


def moved(make, steps=200):
    """How far as many steps of an optimizer move bfloat16 weights of 0.02, on average."""
    model = torch.nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, 0.02)
    optimizer = make(model.parameters())
    for _ in range(steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    return (torch.tensor(0.02, dtype=torch.bfloat16).double() - model.weight.double().mean()).item()


def test_small_updates_of_bfloat16_weights_are_not_lost(full, argv):
    """Of 1e-6, where two numbers in bfloat16 are 1.2e-4 apart; torch's own steps, to the nearest, lose all of them."""
    args, defaults = full.parse_args(argv(**BF16)), {"lr": 1e-6}
    plain = functools.partial(torch.optim.SGD, **defaults)
    assert moved(lambda weights: full.SingleUpdates(args, weights, defaults, plain)) == pytest.approx(2e-4, rel=0.05)
    assert moved(plain) == 0.0


def spoil_losses(full, monkeypatch, number):
    whole = full.flow_losses
    monkeypatch.setattr(full, "flow_losses", lambda *inputs: (whole(*inputs)[0] * float(number), None))


def test_a_loss_that_is_not_finite_reaches_no_weight(full, run, monkeypatch, capsys):
    spoil_losses(full, monkeypatch, "nan")
    with pytest.raises(SystemExit) as ended:
        run(full, **FUSED, max_train_steps=3)
    assert ended.value.code == 1
    assert "3 of 3 updates were skipped" in capsys.readouterr().err


def test_weights_stay_as_they_were_where_the_loss_is_not_finite(full, run, monkeypatch, checkpoints, tmp_path):
    spoil_losses(full, monkeypatch, "inf")
    with pytest.raises(SystemExit):
        run(full, **FUSED, max_train_steps=2, output_dir=tmp_path / "out")
    before, after = weights(checkpoints()), weights(tmp_path / "out")
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


def test_losses_of_bfloat16_weights_are_near_those_of_float32(full, run, tmp_path):
    losses = []
    for number, flags in enumerate(({"mixed_precision": "bf16"}, BF16, BF16 | FUSED)):
        with watch_updates(full) as updates:
            run(full, **LONG | flags, output_dir=tmp_path / str(number))
        losses.append([update["loss"] for update in updates])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[2] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({**FUSED, "gradient_accumulation_steps": 2}, "accumulation 1"),
        ({**FUSED, "optimizer": "prodigy"}, "take adamw"),
        ({**BF16, "optimizer": "prodigy"}, "take adamw"),
        ({"full_bf16": True}, "--full_bf16 needs --mixed_precision bf16, not no"),
    ],
)
def test_what_excludes_it_is_refused_in_one_line(full, argv, capsys, flags, message):
    with isolated(), pytest.raises(SystemExit) as refused:
        full.main(full.parse_args(argv(**flags)))
    assert refused.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_the_lora_script_has_neither_flag(lora, argv):
    for name in ("fused_backward_pass", "full_bf16"):
        with pytest.raises(SystemExit):
            lora.parse_args(argv(**{name: True}))


def test_a_resume_with_other_weights_is_refused(full, run, argv, capsys):
    folder = run(full, **BF16, max_train_steps=1, checkpointing_steps=1)
    assert json.loads((folder / "checkpoint-1" / full.MANIFEST).read_text())["run"]["full_bf16"] is True
    with isolated(), pytest.raises(SystemExit) as refused:
        full.main(full.parse_args(argv(mixed_precision="bf16", resume_from_checkpoint="latest")))
    assert refused.value.code == 2
    assert "full_bf16 True, not False" in capsys.readouterr().err
