"""What was trained outlives what goes wrong around it: trackers, disks, terminals, signals, files of other people."""

import contextlib
import errno
import io
import os
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from conftest import SCRIPTS, in_child, isolated
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from ranks import read_files, tell, watch_updates

pytestmark = pytest.mark.usefixtures("few_steps")
IN_TURN = True  # one script for each test that asks for no other, see conftest.py
WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def end(argv, capsys):
    """Runs a script that ends itself; gives its code and the last line on stderr, of a refusal the line with it."""

    def end(script, **flags):
        with isolated(), pytest.raises(SystemExit) as end:
            script.main(script.parse_args(argv(**flags)))
        lines = capsys.readouterr().err.splitlines()
        return end.value.code, [line for line in lines if end.value.code != 2 or ": error: " in line][-1]

    return end


# ---- 1: what raises in the loop -------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_dropped_after_one_line(script, end, run, monkeypatch, caplog, tmp_path):
    plain = read_files(run(script, max_train_steps=3, output_dir=tmp_path / "plain"))
    calls = []

    def log(self, values, step=None, **options):
        calls.append(step)
        if step == 2:
            raise FULL

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    code, last = end(script, max_train_steps=3, report_to="tensorboard")
    assert (code, calls) == (1, [1, 2])
    assert last == f"what was trained is saved in {tmp_path / 'out'}, but logging failed"
    assert caplog.text.count("logging failed (OSError: [Errno 28] No space left on device)") == 1
    assert read_files(tmp_path / "out") == plain


def test_a_tracker_that_does_not_end_costs_neither_card_nor_code(script, end, monkeypatch, tmp_path):
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: 1 / 0)
    code, last = end(script, max_train_steps=1, report_to="tensorboard")
    assert (code, last.endswith("but ending the trackers failed")) == (1, True)
    assert (tmp_path / "out/README.md").is_file()


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("the image cannot be read")])
def test_an_error_in_the_loop_saves_a_checkpoint_first(script, run, argv, monkeypatch, tmp_path, error):
    """From which the run goes on as if nothing had been."""
    flags, calls = {"max_train_steps": 4}, []
    with watch_updates(script) as updates:
        run(script, **flags, output_dir=tmp_path / "whole")
    losses = script.batch_losses

    def fail(*inputs):
        calls.append(0)
        if len(calls) == 3:
            raise error
        return losses(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(script, "batch_losses", fail)
        with isolated(), pytest.raises(type(error), match=str(error)):
            script.main(script.parse_args(argv(**flags)))
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-2"]
    with watch_updates(script) as later:
        run(script, **flags, resume_from_checkpoint="latest")
    assert later == updates[2:]
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


def test_no_checkpoint_is_saved_of_weights_that_are_not_finite(script, argv, monkeypatch, tmp_path):
    def spoil(args, accelerator, trained, seen, state):
        trained.parameters[-1].data.fill_(float("nan"))
        raise RuntimeError("diverged")

    update = script.update_weights
    steps = iter([update, spoil])
    monkeypatch.setattr(script, "update_weights", lambda *inputs: next(steps)(*inputs))
    with isolated(), pytest.raises(RuntimeError, match="diverged"):
        script.main(script.parse_args(argv()))
    assert list((tmp_path / "out").glob("*checkpoint-*")) == []


def test_ten_bad_updates_in_a_row_save_the_ones_before(script, argv, monkeypatch, tmp_path):
    losses, calls = script.batch_losses, []

    def spoil(*inputs):
        calls.append(0)
        return losses(*inputs) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(script, "batch_losses", spoil)
    with isolated(), pytest.raises(SystemExit, match="ten updates in a row were not finite"):
        script.main(script.parse_args(argv(max_train_steps=20)))
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-12"]


@pytest.mark.slow
def test_a_log_that_goes_away_does_not_end_the_run(argv, tmp_path):
    """And a log gets a line now and then: two of a bar for twelve updates, where a terminal would get one each."""
    out, flags = tmp_path / "out", {"max_train_steps": 10**6, "checkpointing_steps": 12, "checkpoints_total_limit": 1}
    command = [sys.executable, str(SCRIPTS["lora"]), *argv(**flags)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "TORCHDYNAMO_DISABLE": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as run:
        os.set_blocking(run.stderr.fileno(), False)
        said = b""
        while not (out / "checkpoint-12").exists() and run.poll() is None:
            said += run.stderr.read() or b""
            time.sleep(0.1)
        run.stderr.close()
        while not (out / "checkpoint-24").exists() and run.poll() is None:
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=100) == 143, said.decode()[-2000:]
    assert b"\r" not in said
    assert 1 <= said.count(b"\nTraining: ") <= 3
    assert len(list(out.glob("checkpoint-*"))) == 1


def test_a_terminal_keeps_its_bar(script, monkeypatch):
    """And what cannot be written is dropped."""
    reader, writer = os.pipe()
    stream = script.Stderr(writer, "w")
    for terminal in (True, False):
        monkeypatch.setattr(script.Stderr, "isatty", lambda self, terminal=terminal: terminal)
        assert stream.write(b"\r50%") == 4
    assert os.read(reader, 100) == b"\r50%\n50%"
    os.close(reader)
    assert stream.write(b"nobody reads this") == 17


# ---- 2, 8: signals --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of Unix")
def test_nohup_is_respected(script):
    def be_told():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with contextlib.ExitStack() as cleanup:
            caught = script.catch_signals(cleanup)
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert list(caught) == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    assert in_child(be_told) == 0


def test_ctrl_c_before_the_first_update_is_one_line(script_path, argv, monkeypatch, tmp_path):
    """Here while the base model is read; the script runs as on the command line, in a process of its own."""

    def interrupt(*inputs, **options):
        raise KeyboardInterrupt

    def start():
        file = os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 2)
        runpy.run_path(str(script_path), run_name="__main__")

    def start_and_tell():
        try:
            start()
        except SystemExit as end:
            os._exit(end.code)

    monkeypatch.setattr(StableDiffusion3Pipeline, "load_config", interrupt)
    monkeypatch.setattr(sys, "argv", [str(script_path), *argv()])
    assert in_child(start_and_tell) == 130
    lines = (tmp_path / "said").read_text().split("\n")
    assert [line for line in lines if line] == ["SIGINT: the run ends before its first update"]


# ---- 3: a run that is finished --------------------------------------------------------------------------------------

DRAWN = {"validation_prompt": "a dog", "num_validation_images": 2, "max_train_steps": 2, "validation_epochs": 9}
DRAWN |= {"validation_num_inference_steps": 3}


@pytest.fixture
def unfinished(argv, tmp_path):
    """Runs a script that a signal stops while the final images are drawn."""

    def unfinished(script, **flags):
        with pytest.MonkeyPatch.context() as patch, isolated(), pytest.raises(SystemExit) as end:
            tell(patch, script, "draw_images", 1)
            script.main(script.parse_args(argv(**DRAWN | flags)))
        assert end.value.code == 143
        return tmp_path / "out"

    return unfinished


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_signal_after_the_last_update_says_what_is_missing(script, kind, unfinished, capsys):
    out = unfinished(script)
    last = capsys.readouterr().err.splitlines()[-1]
    way = "SIGTERM came at update 2: --resume_from_checkpoint latest makes what is missing"
    assert last == f"what was trained is saved in {out}, but {way}"
    assert (out / WEIGHTS[kind]).is_file()
    assert not (out / "image_0.png").exists() and not (out / "README.md").exists()


@pytest.mark.parametrize("kind", SCRIPTS)
def test_latest_makes_what_a_finished_run_lacks_and_no_more(
    script, kind, unfinished, run, pictures, monkeypatch, tmp_path
):
    """The images are those of a run that was left alone; no update is made, no class image and no caption encoded."""
    flags = {"with_prior_preservation": True, "class_prompt": "an animal", "class_data_dir": pictures(3)}
    flags |= {"num_class_images": 3, "cache_latents": True, "learning_rate": 1e-2}
    if kind == "lora":
        flags |= {"lora_alpha": 8}  # its scale, 2, is in the result's weights
    out = unfinished(script, **flags)
    written = (out / WEIGHTS[kind]).stat().st_mtime_ns
    encoded, encode = [], script.PromptTable.encode

    def watch(self, name, encoder, prompts):
        encoded.extend(prompts)
        return encode(self, name, encoder, prompts)

    monkeypatch.setattr(script.PromptTable, "encode", watch)
    monkeypatch.setattr(script, "add_class_images", None)
    monkeypatch.setattr(script, "encode_moments", None)
    with watch_updates(script) as updates:
        run(script, **DRAWN | flags, resume_from_checkpoint="latest")
    assert updates == []
    assert set(encoded) == {"", "a dog", "an animal"}
    assert (out / WEIGHTS[kind]).stat().st_mtime_ns == written
    assert "trained for 2 updates: no update was left to make" in (out / "README.md").read_text()
    monkeypatch.undo()
    whole = run(script, **DRAWN | flags, output_dir=tmp_path / "whole")
    for name in ("image_0.png", "image_1.png"):
        drawn, alone = ((folder / name).read_bytes() for folder in (out, whole))
        assert torch.allclose(*(torch.tensor(list(open_pixels(data))).float() for data in (drawn, alone)), atol=2)


def open_pixels(data):
    return Image.open(io.BytesIO(data)).tobytes()


def test_a_finished_run_of_another_length_is_trained_on(script, run, caplog):
    """From its checkpoint, or anew; and its result does not count as one while that lasts."""
    out = run(script, max_train_steps=2, checkpointing_steps=1)
    with watch_updates(script) as updates:
        run(script, max_train_steps=3, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert [update["step"] for update in updates] == [3]
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path)
    with watch_updates(script) as updates:
        run(script, max_train_steps=4, resume_from_checkpoint="latest")
    assert [update["step"] for update in updates] == [1, 2, 3, 4]
    assert "training starts anew" in caplog.text


def test_a_result_does_not_count_while_another_run_trains_over_it(script, run, argv, monkeypatch, tmp_path):
    assert (run(script) / "dreambooth.json").is_file()
    monkeypatch.setattr(script, "batch_losses", lambda *inputs: 1 / 0)
    with isolated(), pytest.raises(ZeroDivisionError):
        script.main(script.parse_args(argv(learning_rate=1e-3)))
    assert not (tmp_path / "out/dreambooth.json").exists()


# ---- 4, 5: files of other people and other disks --------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCRIPTS)
def test_files_of_others_are_left_alone(script, kind, run, monkeypatch, tmp_path):
    """And a file system that knows no modes ends no run."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "theirs.safetensors").write_bytes(b"theirs")
    (out / "theirs.safetensors").chmod(0o600)
    (out / "link.safetensors").symlink_to(tmp_path / "gone")
    run(script, max_train_steps=1)
    assert stat.S_IMODE((out / "theirs.safetensors").stat().st_mode) == 0o600

    def chmod(self, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", chmod)
    monkeypatch.setattr(script.time, "sleep", None)  # it does not wait for another file system
    run(script, max_train_steps=1, checkpointing_steps=1, output_dir=tmp_path / "other")


def test_of_a_checkpoint_that_was_moved_and_linked_the_link_goes(lora, run, tmp_path):
    out, disk = run(lora, max_train_steps=1, checkpointing_steps=1), tmp_path / "disk"
    shutil.move(out / "checkpoint-1", disk)
    (out / "checkpoint-1").symlink_to(disk)
    flags = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
    run(lora, max_train_steps=2, **flags)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert lora.read_manifest(disk)["step"] == 1


# ---- 6: what is in the way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    "flags",
    [
        {"logging_dir": "../logs"},
        {"logging_dir": "/logs"},
        {"tracker_run_name": "../../x"},
        {"tracker_project_name": "../../x"},
        {"logging_dir": "README.md"},
        {"logging_dir": "checkpoint-5"},
        {"logging_dir": "validation"},
        {"logging_dir": "logs/../image_0.png"},
        {"logging_dir": "WEIGHTS"},
    ],
    ids=str,
)
def test_logs_elsewhere_or_in_the_result_are_refused(kind, refused, flags):
    if "WEIGHTS" in flags.values():
        flags = {"logging_dir": WEIGHTS[kind].split("/")[0]}
    line = refused(**flags)
    assert line.startswith("--logging_dir, --tracker_run_name, --tracker_project_name: ")
    assert line.endswith("leads out of --output_dir or into the result: give other names")


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    "name", ["README.md", "image_0.png", "dreambooth.json", "validation", "checkpoint-5", "RESULT"]
)
def test_what_is_in_the_way_of_the_result_is_refused(kind, refused, tmp_path, name):
    """A folder where a file will be, or the other way round."""
    path = tmp_path / "out" / name.replace("RESULT", WEIGHTS[kind].split("/")[0])
    path.parent.mkdir()
    is_folder = path.name in ("validation", "checkpoint-5", "transformer")
    path.touch() if is_folder else path.mkdir()
    assert refused().startswith(f"{path} is in the way of what the run writes: take it away")


# ---- 7: full disks --------------------------------------------------------------------------------------------------


def test_a_full_disk_before_training_is_one_line(script, end, monkeypatch, tmp_path):
    """Here of class images."""

    def fail(*inputs, **options):
        raise FULL

    monkeypatch.setattr(Image.Image, "save", fail)
    flags = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a dog"}
    code, line = end(script, **flags, num_class_images=1)
    assert code == 2
    assert f"error: class images cannot be drawn in torch.float32 into {str(tmp_path / 'class')!r}: " in line
    assert "(OSError: [Errno 28] No space left on device)" in line


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("by", ["room", "signal"])
def test_the_result_waits_for_room(script, kind, argv, monkeypatch, caplog, tmp_path, by):
    """A line a minute, until there is room or a signal comes."""
    waits, save = [], script.save_weights

    def save_weights(*inputs):
        if len(waits) < 2:
            raise FULL
        save(*inputs)

    def sleep(seconds):
        waits.append(seconds)
        if by == "signal":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script, "save_weights", save_weights)
    monkeypatch.setattr(script.time, "sleep", sleep)
    with isolated(), pytest.raises(SystemExit) if by == "signal" else contextlib.nullcontext() as end:
        script.main(script.parse_args(argv(max_train_steps=1)))
    assert waits == [60] * (1 if by == "signal" else 2)
    line = f"writing the result to {tmp_path / 'out'} (tried every minute until a signal) failed (OSError: [Errno 28]"
    assert caplog.text.count(line) == len(waits)
    assert (tmp_path / "out" / WEIGHTS[kind]).is_file() == (by == "room")
    assert by == "room" or end.value.code == 143


# ---- 16: disks that cannot be flushed -------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "saved"), [(errno.EINVAL, True), (errno.ENOSPC, False)])
def test_a_disk_that_cannot_be_flushed(lora, argv, monkeypatch, caplog, tmp_path, number, saved):
    """Without fsync it goes on after a line; where fsync says that the disk is full, the old checkpoint is kept."""
    fsync = os.fsync

    def refuse(file):
        if "checkpoint-2.partial" in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse)
    flags = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    with isolated(), contextlib.nullcontext() if saved else pytest.raises(SystemExit):
        lora.main(lora.parse_args(argv(**flags)))
    left = [path.name for path in (tmp_path / "out").glob("*checkpoint-*")]
    assert left == ["checkpoint-2" if saved else "checkpoint-1"]
    assert caplog.text.count("cannot be flushed to its disk") == saved
