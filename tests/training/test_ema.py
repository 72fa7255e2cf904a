"""--use_ema: the average follows the formula, is drawn and saved, and survives a stop."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

FLAGS = {"use_ema": True, "ema_decay": 0.25, "learning_rate": 0.01}
WEIGHTS = {
    "full": "transformer/diffusion_pytorch_model.safetensors",
    "lora": "pytorch_lora_weights.safetensors",
}


def test_average_of_the_updates(script, kind, run, monkeypatch, tmp_path):
    """The result is the average, and training itself goes on as if there was none."""
    plain = run(script, max_train_steps=3, checkpointing_steps=1, learning_rate=0.01, output_dir=tmp_path / "plain")
    steps = [load_file(plain / f"checkpoint-{n}" / WEIGHTS[kind]) for n in (1, 2, 3)]
    seen, evaluation, make_in_turn = [], script.evaluation, script.make_in_turn

    def enter(trained):
        look.model = trained.models["transformer"]
        return evaluation(trained)

    def look(*inputs):
        seen.append({name: p.detach().clone() for name, p in look.model.named_parameters()})
        return make_in_turn(*inputs)

    monkeypatch.setattr(script, "evaluation", enter)
    monkeypatch.setattr(script, "make_in_turn", look)
    output = run(script, max_train_steps=3, checkpointing_steps=1, validation_epochs=1, repeats=1, **FLAGS)
    result = load_file(output / WEIGHTS[kind])
    assert result.keys() == steps[0].keys()
    for key, value in result.items():
        average = steps[0][key]  # decay is 0 at the first update, at the second (1 + 1) / (10 + 1), the third 3 / 12
        for decay, step in ((2 / 11, steps[1]), (0.25, steps[2])):
            average = average - (1 - decay) * (average - step[key])
        torch.testing.assert_close(value, average, rtol=1e-6, atol=1e-8, msg=key)
    assert any(not torch.allclose(value, steps[2][key], rtol=1e-4) for key, value in result.items())
    for n in (1, 2, 3):
        assert all(
            torch.equal(v, steps[n - 1][k]) for k, v in load_file(output / f"checkpoint-{n}" / WEIGHTS[kind]).items()
        )
    assert len(seen) == 4  # losses and images after the first of two epochs, and at the end
    transformer = {key.removeprefix("transformer."): value for key, value in result.items()}
    for name, value in seen[-1].items():
        name = name.replace(".default", "")
        if name in transformer:
            assert torch.equal(value, transformer[name])


@pytest.mark.parametrize("optimizer", ["AdamW", "prodigy"])
def test_resumed_average_is_that_of_the_uninterrupted_run(optimizer, script, kind, run, tmp_path):
    flags = FLAGS | {"optimizer": optimizer, "checkpointing_steps": 2}
    whole = run(script, max_train_steps=4, output_dir=tmp_path / "whole", **flags)
    run(script, max_train_steps=2, **flags)
    parts = run(script, max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert (parts / WEIGHTS[kind]).read_bytes() == (whole / WEIGHTS[kind]).read_bytes()


def test_full_result_loads(full, run):
    output = run(full, **FLAGS)
    SD3Transformer2DModel.from_pretrained(output, subfolder="transformer")


@pytest.mark.parametrize("value", ["1.1", "-0.1"])
def test_decay_out_of_range(value, script, argv, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(argv(ema_decay=value))
    assert "--ema_decay" in capsys.readouterr().err
