"""Weights are saved first, and what fails afterwards is named. Secrets are in no file and on no line."""

from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker
from conftest import isolated

pytestmark = pytest.mark.usefixtures("few_steps")
IN_TURN = True  # one script for each test, see conftest.py
WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}


def fail(*args, **kwargs):
    raise RuntimeError("out of\nmemory")


def weights(folder, kind):
    return Path(folder, WEIGHTS[kind]).read_bytes()


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["draw_images"], "validation after update 3 failed"),
        (["write_card"], "writing the model card failed"),
        (["save_validation", "write_card"], "logging the validation failed; writing the model card failed"),
    ],
    ids=["drawing", "card", "both"],
)
def test_a_step_that_fails_costs_no_weights(script, kind, argv, monkeypatch, caplog, capsys, tmp_path, names, what):
    """Neither along the way nor at the end: they are those of a run without it, which ends with 1 and says why."""
    flags = {"max_train_steps": 3, "validation_prompt": "a dog", "num_validation_images": 1, "use_ema": True}
    out = tmp_path / "out"
    for name in names:
        monkeypatch.setattr(script, name, fail)
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(**flags)))
    assert end.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"what was trained is saved in {out}, but {what}"
    on_the_way = {"draw_images": ("validation after update 2", 1), "save_validation": ("logging the validation", 2)}
    for name, (step, times) in on_the_way.items():
        assert caplog.text.count(f"{step} failed (RuntimeError: out of memory)") == (times if name in names else 0)
    assert (out / "README.md").is_file() == ("write_card" not in names)
    assert (out / "image_0.png").is_file() == (names == ["write_card"])
    with isolated():
        plain = {"output_dir": tmp_path / "plain"}
        monkeypatch.undo()
        script.main(script.parse_args(argv(**flags | plain)))
    assert weights(out, kind) == weights(tmp_path / "plain", kind)


def test_a_tracker_that_does_not_start_is_refused_before_the_work(script, argv, monkeypatch, capsys):
    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    monkeypatch.setattr(script.PromptTable, "fill", None)
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(report_to="tensorboard")))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert end.value.code == 2
    assert (
        "--report_to tensorboard: could not start a tracker; fix it or drop it from --report_to (RuntimeError: "
        in line
    )
