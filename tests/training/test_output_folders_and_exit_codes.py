"""Nothing of a user's is lost or changed silently: folders in use, folders of another run, settings from elsewhere."""

import contextlib
import json
import math
import os
import pickle
import signal
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import SCRIPTS, SIGNALS, isolated
from ranks import read_files, watch_updates

IN_TURN = True  # one script for each test, see conftest.py

WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}


def refuse(script, argv, capsys, **flags):
    """The line with which a run is refused."""
    capsys.readouterr()
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(**flags)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (end.value.code, len(lines)) == (2, 1)
    return lines[0]


def run_beside(script, argv, **flags):
    """Code and words of another run, in a process of its own, while one goes on in this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            sys.stderr = os.fdopen(writer, "w", buffering=1)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            script.main(script.parse_args(argv(**flags)))
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as words:
        said = words.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


BESIDE = {
    "a second run": ({}, 2, "is in use by another run: give another folder"),
    "one that resumes": ({"resume_from_checkpoint": "latest"}, 2, "is in use by another run"),
    "a dry run": ({"dry_run": True}, 0, ""),
    "one with a wrong flag": ({"resolution": 8}, 2, "argument --resolution: 8 is out of range: give 16..1e9"),
    "one of another base": ({"pretrained_model_name_or_path": "/nowhere"}, 2, "error: "),
}


def test_a_live_run_is_left_alone(script, kind, argv, run, monkeypatch, tmp_path):
    """By each second command with its folder: what is in it stays, and its result is that of a run alone."""
    alone = run(script, output_dir=tmp_path / "alone")
    original, ended = script.flow_losses, {}

    def flow_losses(*inputs, **options):
        monkeypatch.setattr(script, "flow_losses", original)  # once, also where one of those beside comes this far
        before = sorted((tmp_path / "out").rglob("*"))
        for name, (flags, _, _) in BESIDE.items():
            ended[name] = run_beside(script, argv, **flags)
        assert before == sorted((tmp_path / "out").rglob("*"))
        return original(*inputs, **options)

    monkeypatch.setattr(script, "flow_losses", flow_losses)
    out = run(script)
    for name, (_, code, words) in BESIDE.items():
        assert ended[name][0] == code, name
        assert words in ended[name][1], name
    assert (out / WEIGHTS[kind]).read_bytes() == (alone / WEIGHTS[kind]).read_bytes()


def test_a_folder_with_checkpoints_is_no_place_for_a_new_run(script, argv, run, capsys):
    """But a dry run may look at it. Going on from an older checkpoint puts the newer ones aside."""
    out = run(script, max_train_steps=3, checkpointing_steps=1)
    before = read_files(out)
    line = refuse(script, argv, capsys, checkpointing_steps=1)
    for way in ("has checkpoint-3 of an earlier run", "--resume_from_checkpoint latest", "another folder", "take"):
        assert way in line
    run(script, dry_run=True)
    assert read_files(out) == before
    flags = {"max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    run(script, **flags, resume_from_checkpoint="checkpoint-1", learning_rate=1e-3)
    names = sorted(path.name for path in out.glob("checkpoint-*"))
    assert [name for name in names if "." not in name] == ["checkpoint-1", "checkpoint-2"]
    assert [name.split(".")[0] for name in names if "." in name] == ["checkpoint-3"]
    assert json.loads((out / "checkpoint-2/dreambooth.json").read_text())["run"]["learning_rate"] == 1e-3


def test_accumulation_is_that_of_the_flag(script, run, monkeypatch):
    """Not of the environment, where `accelerate config` has put a number."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with watch_updates(script) as updates:
        run(script, max_train_steps=6)
    assert len(updates) == 6


def test_a_run_that_did_less_than_asked_for_ends_with_1(script, kind, argv, capsys):
    """It says so in its last line, and keeps the weights."""
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(args := argv(max_train_steps=4, learning_rate=1e29)))
    assert end.value.code == 1
    folder = args[args.index("--output_dir") + 1]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"what was trained is saved in {folder}, but ")
    assert "updates were skipped, not being finite" in last
    assert Path(folder, WEIGHTS[kind]).is_file()


@pytest.mark.parametrize(("kind", "skipped"), [("full", 1), ("lora", 2)])
def test_a_tenth_of_the_updates_may_be_skipped(script, argv, monkeypatch, capsys, skipped):
    """One of ten is a tenth, and the run ends with 0."""
    original, places = script.batch_losses, iter(range(10))
    spoilt = [3, 6][:skipped]
    monkeypatch.setattr(
        script,
        "batch_losses",
        lambda *given: original(*given) * (math.nan if next(places) in spoilt else 1),
    )
    with isolated(), pytest.raises(SystemExit) if skipped > 1 else contextlib.nullcontext() as end:
        script.main(script.parse_args(argv(max_train_steps=10)))
    last = capsys.readouterr().err.splitlines()[-1]
    assert (end.value.code if end else 0) == (skipped > 1)
    assert ("2 of 10 updates were skipped" in last) == (skipped > 1)


def test_in_a_notebook(script, kind, argv, tmp_path):
    """Runs one after the other in a process, with other settings; signals as they were; in a thread of its own too."""
    before = [signal.getsignal(number) for number in SIGNALS]
    changes = {"seed": 1, "mixed_precision": "bf16", "gradient_accumulation_steps": 2, "report_to": "tensorboard"}
    with isolated():
        for name, flags in {"one": {"max_train_steps": 1}, "two": changes, "three": {"max_train_steps": 1}}.items():
            script.main(script.parse_args(argv(**flags, output_dir=tmp_path / name)))
            assert [signal.getsignal(number) for number in SIGNALS] == before
        flags = {"max_train_steps": 1, "output_dir": tmp_path / "thread"}
        thread = threading.Thread(target=lambda: script.main(script.parse_args(argv(**flags))))
        thread.start()
        thread.join()
    files = [(tmp_path / name / WEIGHTS[kind]).read_bytes() for name in ("one", "two", "three", "thread")]
    assert files[0] == files[2] == files[3] != files[1]


def test_files_have_the_mode_that_the_umask_gives(script, run):
    before = os.umask(0o027)
    try:
        out = run(script, max_train_steps=1, validation_prompt="a dog", num_validation_images=1)
    finally:
        os.umask(before)
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o137 or not mode & 0o040} == {}


# Names that accelerate knows, or knew, of which a checkpoint of ours has none: they are not read.
PLANTED = (
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "scaler.pt",
    "sampler.bin",
    "dl_state_dict.bin",
    "pytorch_model.bin",
)


class Forged:
    """Its pickle makes a file where it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def list_checkpoint(kind, use_ema):
    names = [WEIGHTS[kind], "optimizer.bin", "scheduler.bin", "dreambooth.json"]
    return names + (["transformer/config.json"] if kind == "full" else []) + (["ema.bin"] if use_ema else [])


@pytest.mark.parametrize("kind", SCRIPTS)  # their files differ
@pytest.mark.parametrize("use_ema", [False, True], ids=["plain", "ema"])
def test_a_checkpoint_runs_no_code(script, kind, argv, run, capsys, tmp_path, use_ema):
    """A pickle in the place of each of its files is refused or not read."""
    flags = {"use_ema": use_ema, "checkpointing_steps": 1}
    folder, trace = run(script, max_train_steps=1, **flags) / "checkpoint-1", tmp_path / "code has run"
    forged = pickle.dumps(Forged(trace))
    with pytest.raises(FileNotFoundError):
        trace.stat()
    pickle.loads(forged)
    trace.unlink()  # it works
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert set(files) >= set(list_checkpoint(kind, use_ema))
    for name in files:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(forged)
        refuse(script, argv, capsys, max_train_steps=2, resume_from_checkpoint=folder, **flags)
        assert not trace.exists(), name
        (folder / name).write_bytes(whole)
    for name in PLANTED:
        (folder / name).write_bytes(forged)
    run(script, max_train_steps=2, resume_from_checkpoint=folder, use_ema=use_ema)
    assert not trace.exists()
    assert torch.load(folder / "optimizer.bin", weights_only=True)["state"]
