"""A process killed while it saves leaves whole checkpoints, or known half ones; a full disk keeps the last one."""

import builtins
import errno
import json
import os
import pathlib
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import isolated
from test_resume import read_run

FLAGS = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 1}


class Fuse:
    """Counts what a process does to its files, and kills it with SIGKILL at the n-th time."""

    def __init__(self, limit):
        self.count, self.limit = 0, limit

    def burn(self):
        self.count += 1
        if self.count == self.limit:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, patch, owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            self.burn()
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)

    def attach(self, patch, script):
        for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
            self.wrap(patch, os, name)
        for name in ("write_text", "write_bytes"):
            self.wrap(patch, pathlib.Path, name)
        self.wrap(patch, torch, "save")
        self.wrap(patch, builtins, "open")


def train(script, argv, fuse=None, **flags):
    """Runs main; the fuse burns only while checkpoints are saved."""
    with isolated(), pytest.MonkeyPatch.context() as patch:
        if fuse:
            original = script.save_checkpoint

            def save_checkpoint(*args):
                with pytest.MonkeyPatch.context() as inner:
                    fuse.attach(inner, script)
                    original(*args)

            patch.setattr(script, "save_checkpoint", save_checkpoint)
        script.main(script.parse_args(argv(**FLAGS, **flags)))


def weights(folder):
    return {name: data for name, data in read_run(folder)[1].items() if name.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora"])
def test_killed_at_twenty_moments_of_saving(script, argv, tmp_path):
    fuse = Fuse(None)
    train(script, argv, fuse, output_dir=tmp_path / "whole")
    assert fuse.count > 40
    expected = weights(tmp_path / "whole")
    moments = sorted({round(1 + n * (fuse.count - 1) / 21) for n in range(22)})
    assert len(moments) >= 20
    for moment in moments:
        folder = tmp_path / f"killed-{moment}"
        child = os.fork()
        if not child:
            train(script, argv, Fuse(moment), output_dir=folder)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
        train(script, argv, output_dir=folder, resume_from_checkpoint="latest")
        assert weights(folder) == expected, moment
        kept = {path.name for path in folder.glob("*checkpoint-*")}
        assert {"checkpoint-3"} <= kept <= {"checkpoint-2", "checkpoint-3"}, moment  # killed before the old one went
        shutil.rmtree(folder)


def test_a_full_disk_ends_in_one_line(script, argv, monkeypatch, tmp_path):
    original = torch.save

    def save(*args, **kwargs):
        if list((tmp_path / "out").glob("checkpoint-1")):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(**FLAGS)))
    folder = Path(tmp_path, "out")
    assert end.value.code == (
        f"{folder / 'checkpoint-2'} could not be written ([Errno 28] No space left on device):"
        f" make room and resume from the last checkpoint, {folder / 'checkpoint-1'}"
    )
    assert [path.name for path in folder.glob("*checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((folder / "checkpoint-1/dreambooth.json").read_text())["step"] == 1
    assert script.read_manifest(folder / "checkpoint-1")
