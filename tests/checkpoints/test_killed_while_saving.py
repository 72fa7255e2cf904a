"""A process killed while it saves leaves whole checkpoints or .partial folders; a full disk keeps the last one."""

import argparse
import builtins
import functools
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import in_child, isolated
from ranks import read_files

FLAGS = {"max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
FUSED = {"fused_backward_pass": True, "max_grad_norm": "inf", "use_ema": True}
BF16 = {"full_bf16": True, "mixed_precision": "bf16", "use_8bit_adam": True}


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

    def watch(self, script, save, *inputs):
        """A call of save_checkpoint, whose files it counts."""
        with pytest.MonkeyPatch.context() as patch:
            self.attach(patch, script)
            save(*inputs)


def train(script, argv, in_place_of_save=None, **flags):
    """Runs main. in_place_of_save(save_checkpoint, its arguments) is called where checkpoints are saved."""
    with isolated(), pytest.MonkeyPatch.context() as patch:
        if in_place_of_save:
            patch.setattr(script, "save_checkpoint", functools.partial(in_place_of_save, script.save_checkpoint))
        script.main(script.parse_args(argv(**FLAGS | flags)))


def weights(folder):
    return {name: data for name, data in read_files(folder).items() if name.endswith(".safetensors")}


def contents(folder):
    """Names and bytes of a folder's files, and its folders."""
    paths = sorted(folder.rglob("*"))
    return tuple((str(path.relative_to(folder)), path.is_file() and path.read_bytes()) for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count", "flags"),
    [("lora", 22, {}), ("full", 6, {}), ("full", 3, FUSED), ("full", 3, BF16), ("full", 4, FUSED | BF16)],
    ids=["lora", "full", "fused", "bfloat16", "both"],
)
def test_killed_at_any_moment_of_saving(script, argv, tmp_path, count, flags):
    """A process is forked for each moment, with a copy of the folder. What leaves the same files is resumed once."""
    fuse, begun, left = Fuse(None), [], {}

    def count_calls(save, *inputs):
        begun.append(fuse.count)
        fuse.watch(script, save, *inputs)

    train(script, argv, count_calls, output_dir=tmp_path / "whole", **flags)
    assert fuse.count >= 25  # calls that write, in a run with its checkpoints
    expected = weights(tmp_path / "whole")
    moments = sorted({round(1 + n * (fuse.count - 1) / (count - 1)) for n in range(count)})
    assert len(moments) == count

    def be_killed(save, args, *inputs):
        first, *later = begun
        begun[:] = later
        for moment in [moment for moment in moments if first < moment <= min([*later, fuse.count])]:
            folder = tmp_path / f"killed-{moment}"
            shutil.copytree(args.output_dir, folder, symlinks=True)
            there = argparse.Namespace(**vars(args) | {"output_dir": str(folder)})
            doomed = functools.partial(Fuse(moment - first).watch, script, save, there, *inputs)
            assert in_child(doomed) == -signal.SIGKILL, moment
            left.setdefault(contents(folder), []).append(moment)
        save(args, *inputs)

    train(script, argv, be_killed, output_dir=tmp_path / "alive", **flags)
    assert sorted(sum(left.values(), [])) == moments
    for moment, *_ in left.values():
        folder = tmp_path / f"killed-{moment}"
        train(script, argv, output_dir=folder, resume_from_checkpoint="latest", **flags)
        assert weights(folder) == expected, moment
        kept = {path.name for path in folder.glob("*checkpoint-*")}
        assert {"checkpoint-2"} <= kept <= {"checkpoint-1", "checkpoint-2"}, moment  # killed before the old one went


def test_what_a_killed_run_left_goes(script, argv, tmp_path):
    """Half a checkpoint of another number, and its lock, which nobody holds."""
    out = tmp_path / "out"
    left = out / ".checkpoint-7.partial"
    left.mkdir(parents=True)
    (left / "half").write_text("a file")
    (out / ".lock").touch()
    train(script, argv, max_train_steps=1)
    assert not left.exists()


@pytest.fixture
def tmpfs(tmp_path):
    """Gives a disk of so many bytes, mounted at a folder."""
    mounted = []

    def tmpfs(size, folder):
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(folder)

    yield tmpfs
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def ended(script, argv, limit, **flags):
    """The last words of a run in a process of its own, which may write no file of more than `limit` bytes."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            train(script, argv, **flags)
            words = "done"
        except BaseException as error:  # told to the test
            words = f"{type(error).__name__}: {error}"
        os.write(writer, words.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


def test_a_limit_of_the_system(script, argv, tmp_path):
    """No file may grow beyond it, not that of the optimizer: the last whole checkpoint stays, and no half one."""
    out = tmp_path / "out"
    train(script, argv, max_train_steps=1, checkpointing_steps=1)
    limit = (out / "checkpoint-1/optimizer.bin").stat().st_size - 1000
    words = ended(script, argv, limit, resume_from_checkpoint="latest")
    assert words != "done"
    assert [path.name for path in out.glob("*checkpoint-*")] == ["checkpoint-1"]
    assert script.read_manifest(out / "checkpoint-1")["step"] == 1


def test_a_full_disk_of_the_system(lora, argv, tmpfs, tmp_path):
    """One that holds a checkpoint and a half."""
    train(lora, argv, output_dir=tmp_path / "measured", max_train_steps=1, checkpointing_steps=1)
    size = sum(path.stat().st_size for path in (tmp_path / "measured/checkpoint-1").rglob("*") if path.is_file())
    out = tmp_path / "disk"
    tmpfs(size * 3 // 2, out)
    words = ended(lora, argv, resource.RLIM_INFINITY, output_dir=out)
    assert words != "done"
    assert [path.name for path in out.glob("*checkpoint-*")] == ["checkpoint-1"]
    assert lora.read_manifest(out / "checkpoint-1")["step"] == 1


def test_a_checkpoint_that_cannot_be_saved_is_named_and_costs_no_weights(
    lora, argv, run, monkeypatch, capsys, tmp_path
):
    """Nor is half a one left. The room on the disk is said, because torch's errors do not name it."""
    weights = read_files(run(lora, max_train_steps=2, output_dir=tmp_path / "plain"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *inputs: 1 / 0)
        with isolated(), pytest.raises(SystemExit) as end:
            lora.main(lora.parse_args(argv(**FLAGS | {"checkpointing_steps": 2})))
    assert end.value.code == 1
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint-*")] == []
    assert read_files(tmp_path / "out") == weights
    said = r"\(\d+\.\d{3} GB were free\) failed"
    assert re.search(
        rf"saved in {tmp_path / 'out'}, but saving {tmp_path / 'out/checkpoint-2'} {said}$", capsys.readouterr().err
    )
