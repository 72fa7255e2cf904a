"""Weights are saved first, and what fails afterwards is named. Secrets are in no file and on no line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker
from conftest import SCRIPTS, SEVERAL, isolated
from hub_stand_in import HubStandIn

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


def client(path, flags, hub, home, **more):
    environment = {**os.environ, **hub.environment(home), "WANDB_API_KEY": "wandb_Planted" + "0" * 27, **more}
    return subprocess.run(
        [sys.executable, str(path), *flags], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


UNFORESEEN = """
script.read_folder = lambda *args: 1 / 0
with open(sys.argv[3]) as file:  # not on the command line, which wandb keeps
    script.main(script.parse_args(json.load(file)))
"""


@pytest.mark.slow
def test_a_failing_hub_keeps_the_weights_and_no_secret_leaks(argv, tmp_path):
    """Whatever it answers to the commit: an error of its own, that the token is wrong, or nothing.

    Last comes an error that nobody foresaw, with the token in the flags: neither its traceback has it.
    """
    answers = {"error": 500, "wrong": 401, "silent": None}
    flags = {"push_to_hub": True, "max_train_steps": 1, "checkpointing_steps": 1, "report_to": "wandb,tensorboard"}
    runs = [argv(**flags, output_dir=tmp_path / name, hub_model_id=name) for name in answers]
    with HubStandIn(token="hf_Planted") as hub:
        for name, status in answers.items():
            hub.fail(f"/user/{name}/commit/", status)
        last = tmp_path / "last.json"
        last.write_text(json.dumps(argv(push_to_hub=True, hub_token="hf_Planted", report_to="tensorboard")))
        words = [SCRIPTS["lora"].stem, json.dumps(runs), str(last)]
        done = client("-c", [SEVERAL + UNFORESEEN, *words], hub, tmp_path / "home")
    assert done.stdout.split() == ["1"] * len(runs), done.stderr[-2000:]
    assert "ZeroDivisionError" in done.stderr.splitlines()[-1]
    for name, said in zip(answers, done.stderr.split("====\n"), strict=False):
        last = said.strip().splitlines()[-1]
        assert last == f"what was trained is saved in {tmp_path / name}, but the upload failed"
        assert (tmp_path / name / WEIGHTS["lora"]).is_file()
    files = [path for name in answers for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    for secret in ("hf_Planted", "wandb_Planted"):
        assert secret not in done.stdout + done.stderr
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
