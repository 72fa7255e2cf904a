"""The end is safe: weights first, and what fails after them is named. Secrets are in no file and on no line."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker
from conftest import SCRIPTS, isolated
from hub_stand_in import HubStandIn

pytestmark = pytest.mark.usefixtures("few_steps")
WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}
AGAIN = "failed: the same command with --resume_from_checkpoint latest repeats that alone"


def fail(*args, **kwargs):
    raise RuntimeError("out of\nmemory")


def weights(folder, kind):
    return Path(folder, WEIGHTS[kind]).read_bytes()


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["draw_images"], "drawing the final images"),
        (["draw_curves", "write_card"], "drawing the loss curves, writing the model card"),
        (["draw_strip"], "drawing the final images"),
    ],
    ids=["drawing", "card", "strip"],
)
def test_a_step_that_fails_is_repeated_alone(script, kind, argv, run, monkeypatch, caplog, tmp_path, names, what):
    """The weights are on disk, there is a checkpoint of the last update, and resuming from it trains no other."""
    flags = {"max_train_steps": 1, "validation_prompt": "a dog", "num_validation_images": 1, "use_ema": True}
    out = tmp_path / "out"
    with isolated(), monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        for name in names:
            patch.setattr(script, name, fail)
        script.main(script.parse_args(argv(**flags)))
    assert end.value.code == f"the weights are whole in {out}, but {what} {AGAIN}"
    assert ("validation at update 1 failed (RuntimeError: " in caplog.text) == (names == ["draw_images"])
    assert (out / "README.md").is_file() == ("write_card" not in names)
    assert [path.name for path in out.glob("*checkpoint-*")] == ["checkpoint-1"]
    before = weights(out, kind)
    monkeypatch.setattr(script, "flow_losses", fail)
    run(script, **flags, resume_from_checkpoint="latest")
    assert weights(out, kind) == before
    made = ["README.md", "image_0.png", "validation.png", "loss.png"]
    assert [name for name in made if not (out / name).is_file()] == []


def test_a_tracker_that_fails_costs_no_training(lora, argv, monkeypatch, capsys, caplog, tmp_path):
    """One that does not start is refused; one that fails later is named, and the run ends as one without it."""
    tracker, calls = TensorBoardTracker, []
    with isolated(), monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(tracker, "start", fail)
        lora.main(lora.parse_args(argv(report_to="tensorboard")))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert end.value.code == 2
    assert "--report_to tensorboard: a tracker does not start (out of memory): mend it or leave it out" in line

    monkeypatch.setattr(tracker, "log", lambda *args, **kwargs: calls.append(1) or len(calls) < 2 or fail())
    with isolated(), pytest.raises(SystemExit) as end:
        lora.main(lora.parse_args(argv(report_to="tensorboard", max_train_steps=3)))
    scalars = tmp_path / "out/logs/scalars.jsonl"
    whole = f"the weights are whole in {tmp_path / 'out'}"
    assert end.value.code == f"{whole}, but the tracker tensorboard failed: see {scalars}"
    assert caplog.text.count("tracker tensorboard failed and gets nothing more (RuntimeError: out of memory)") == 1
    assert [json.loads(row)["step"] for row in scalars.read_text().splitlines()] == [1, 2, 3]
    assert len(calls) == 2
    assert (tmp_path / "out" / WEIGHTS["lora"]).is_file()


def client(path, flags, hub, home, **more):
    environment = {**os.environ, **hub.environment(home), "WANDB_API_KEY": "wandb_Planted" + "0" * 27, **more}
    return subprocess.run(
        [sys.executable, str(path), *flags], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 401, None])
def test_a_failing_hub_keeps_the_weights_and_no_secret_leaks(argv, tmp_path, status):
    with HubStandIn(token="hf_Planted") as hub:
        hub.fail("/commit/", status)
        flags = argv(push_to_hub=True, max_train_steps=1, checkpointing_steps=1, report_to="wandb,tensorboard")
        done = client(SCRIPTS["lora"], flags, hub, tmp_path / "home")
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1, done.stderr[-2000:]
        if status == 500:  # over again
            hub.faults.clear()
            before = weights(tmp_path / "out", "lora")
            again = shlex.split(last.split("the upload failed: ")[1])
            assert again[0] == "hf"
            again = [str(Path(sys.executable).with_name("hf")), *again[1:]]
            subprocess.run(again, env={**os.environ, **hub.environment(tmp_path / "home")}, timeout=100, check=True)
            files = hub.repositories["user/out"]["files"]
            assert {WEIGHTS["lora"], "README.md"} <= files.keys()
            assert weights(tmp_path / "out", "lora") == before == files[WEIGHTS["lora"]]
            assert not [name for name in files if "checkpoint" in name or "logs" in name]
    assert f"the weights are whole in {tmp_path / 'out'}, but the upload failed: hf upload user/out " in last
    assert (tmp_path / "out" / WEIGHTS["lora"]).is_file()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    for secret in ("hf_Planted", "wandb_Planted"):
        assert secret not in done.stdout + done.stderr
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_a_traceback_has_no_secret(argv, tmp_path):
    """An error that nobody foresaw, with the token in the flags."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(SCRIPTS['lora'].parent)!r})\n"
        "import train_dreambooth_lora_sd3 as script\n"
        "script.read_dataset = lambda *args: 1 / 0\n"
        "script.main(script.parse_args())\n"
    )
    with HubStandIn(token="hf_Planted") as hub:
        flags = argv(push_to_hub=True, hub_token="hf_Planted", report_to="tensorboard")
        done = client(program, flags, hub, tmp_path / "home")
    assert "ZeroDivisionError" in done.stderr
    assert "Planted" not in done.stdout + done.stderr
