"""The end is safe: weights first, and what fails after them is named. Secrets are in no file and on no line."""

import os
import subprocess
import sys

import pytest
from conftest import SCRIPTS, isolated
from hub_stand_in import HubStandIn

WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}
AGAIN = "failed: the same command with --resume_from_checkpoint latest goes from the last checkpoint to the end again"


def fail(*args, **kwargs):
    raise RuntimeError("out of\nmemory")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("draw_curves", "drawing the loss curves"),
        ("write_card", "writing the model card"),
        ("draw_strip", "drawing the final images"),
    ],
)
def test_a_failure_after_the_weights(script, kind, argv, monkeypatch, capsys, tmp_path, name, what):
    monkeypatch.setattr(script, name, fail)
    flags = {"max_train_steps": 1, "validation_prompt": "a dog", "num_validation_images": 1}
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(**flags)))
    assert end.value.code == f"the weights are whole in {tmp_path / 'out'}, but {what} {AGAIN}"
    assert (tmp_path / "out" / WEIGHTS[kind]).is_file()
    assert (tmp_path / "out/README.md").is_file() == (name != "write_card")


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
    assert f"the result is whole in {tmp_path / 'out'}, but its upload failed" in last
    assert f"again: hf upload user/out {tmp_path / 'out'} ." in last
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
