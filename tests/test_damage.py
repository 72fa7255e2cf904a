"""A damaged checkpoint is seen and named: `latest` falls back, a name ends in one line."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from conftest import isolated


@pytest.fixture
def saved(script, kind, run, tmp_path_factory):
    """A copy of the output of three updates with a checkpoint each, as output_dir of a script; trained once."""
    if kind not in SAVED:
        SAVED[kind] = run(
            script, max_train_steps=3, checkpointing_steps=1, output_dir=tmp_path_factory.mktemp("saved")
        )
    folder = tmp_path_factory.mktemp("damaged") / "out"
    shutil.copytree(SAVED[kind], folder)
    return folder


SAVED = {}


def truncate(folder):
    path = folder / "optimizer.bin"
    path.write_bytes(path.read_bytes()[:-100])
    return "optimizer.bin has "


def flip_a_bit(folder):
    path = folder / "scheduler.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return "scheduler.bin is not what was written: its checksum differs"


def lose(folder):
    (folder / "random_states_0.pkl").unlink()
    return "random_states_0.pkl is missing"


def lose_manifest(folder):
    (folder / "dreambooth.json").unlink()
    return "No such file or directory"


def spoil_manifest(folder):
    (folder / "dreambooth.json").write_text("[]")
    return "is not a whole checkpoint: "


def other_processes(folder):
    path = folder / "dreambooth.json"
    manifest = json.loads(path.read_text())
    manifest["flags"]["processes"] = 2
    path.write_text(json.dumps(manifest))
    return "is of 2 processes, not of 1"


DAMAGES = [truncate, flip_a_bit, lose, lose_manifest, spoil_manifest, other_processes]


@pytest.mark.parametrize("damage", DAMAGES)
def test_seen(script, argv, saved, monkeypatch, caplog, capsys, damage):
    monkeypatch.setattr(script, "log", logging.getLogger("damage"))
    reason = damage(saved / "checkpoint-3")
    args = script.parse_args(argv(output_dir=saved, resume_from_checkpoint="latest"))
    assert script.choose_checkpoint(args, 1)[0] == saved / "checkpoint-2"
    assert str(saved / "checkpoint-3") in caplog.text
    assert reason in caplog.text
    if damage is other_processes:
        return
    args.resume_from_checkpoint = "checkpoint-3"
    with pytest.raises(SystemExit) as end:
        script.choose_checkpoint(args, 1)
    lines = capsys.readouterr().err.splitlines()
    assert (end.value.code, len(lines)) == (2, 1)
    assert f"--resume_from_checkpoint: {saved / 'checkpoint-3'} is not a whole checkpoint: " in lines[0]


def test_another_number_of_processes_is_refused(script, argv, saved, capsys):
    for number in (1, 2, 3):
        other_processes(saved / f"checkpoint-{number}")
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(output_dir=saved, resume_from_checkpoint="latest")))
    assert end.value.code == 2
    assert "trained with the number of processes 2, this run has 1: give the same" in capsys.readouterr().err


def test_checkpoints_without_checksums(script, kind, argv, saved, capsys):
    """Those of earlier versions are read; noise of the right size ends in one line."""
    folder = saved / "checkpoint-3"
    manifest = json.loads((folder / "dreambooth.json").read_text())
    del manifest["checksums"]
    (folder / "dreambooth.json").write_text(json.dumps(manifest))
    assert script.read_manifest(folder) == manifest
    weights = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}
    for name in ("optimizer.bin", weights[kind]):
        before = Path(folder, name).read_bytes()
        Path(folder, name).write_bytes(b"\xa7" * len(before))
        with isolated(), pytest.raises(SystemExit) as end:
            script.main(script.parse_args(argv(output_dir=saved, max_train_steps=4, resume_from_checkpoint="latest")))
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert (end.value.code, len(lines)) == (2, 1)
        assert f"{folder} cannot be loaded (" in lines[0]
        Path(folder, name).write_bytes(before)
