"""A resumed run has the rates, decays and betas that it is asked for, in its log and in its weights."""

import pytest
import torch
from ranks import watch_updates
from safetensors.torch import load_file

WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}
ROWS = [("lora", {}), ("full", {}), ("full", {"full_bf16": True, "mixed_precision": "bf16"})]


@pytest.mark.parametrize(("kind", "flags"), ROWS)
def test_the_flags_win(script, kind, flags, run, tmp_path, monkeypatch, caplog):
    make_optimizer, made = script.make_optimizer, []
    monkeypatch.setattr(script, "make_optimizer", lambda *inputs: made.append(make_optimizer(*inputs)) or made[-1])
    flags = {"max_train_steps": 3, "checkpointing_steps": 2, "lr_scheduler": "constant_with_warmup", **flags}
    flags |= {"lr_warmup_steps": 4}  # the third update has half the rate, the fourth three quarters
    whole = run(script, **flags, learning_rate=1e-2)
    assert caplog.text.count("changed flags") == 0
    later = {"learning_rate": 1e-6, "adam_weight_decay": 0.5, "adam_beta1": 0.5, "adam_epsilon": 1e-3}
    with watch_updates(script) as updates:
        again = run(
            script,
            **flags,
            **later,
            resume_from_checkpoint=whole / "checkpoint-2",
            output_dir=tmp_path / "again",
        )
    assert [update["lr"] for update in updates] == pytest.approx([0.75e-6])
    (group,) = made[-1].param_groups
    assert (group["weight_decay"], group["betas"][0], group["eps"]) == (0.5, 0.5, 1e-3)
    (line,) = [line for line in caplog.messages if "changed flags" in line]
    assert "learning_rate 0.01 -> 1e-06" in line and "adam_weight_decay 0.0001 -> 0.5" in line
    before = load_file(whole / "checkpoint-2" / WEIGHTS[kind])
    moved = [
        max((load_file(folder / WEIGHTS[kind])[name].float() - before[name].float()).abs().max() for name in before)
        for folder in (whole, again)
    ]
    assert moved[0] > 1e-4
    if not flags.get("full_bf16"):  # whose smallest step is larger
        assert moved[1] < 1e-5
    assert all(torch.isfinite(weight).all() for weight in load_file(again / WEIGHTS[kind]).values())
