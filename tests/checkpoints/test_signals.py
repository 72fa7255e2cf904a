"""After a signal a run finishes its update, saves a checkpoint and can be resumed as if nothing had happened."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, in_child, isolated
from diffusers import FlowMatchEulerDiscreteScheduler
from ranks import read_files, tell, watch_updates

IN_TURN = True  # one script for each test, see conftest.py

NUMBERS = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGUSR1": 138}
WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}


def stop(script, argv, code, **flags):
    """Runs main until it ends with that code."""
    with isolated(), watch_updates(script) as updates, pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(**flags)))
    assert end.value.code == code
    return updates


@pytest.mark.parametrize("name", NUMBERS)
def test_stops_at_the_update_and_goes_on(script, argv, run, monkeypatch, capsys, tmp_path, name):
    flags, folder = {"max_train_steps": 4, "output_dir": tmp_path / "stopped"}, tmp_path / "stopped"
    with monkeypatch.context() as patch:
        tell(patch, script, "flow_losses", 2, getattr(signal, name))
        stopped = stop(script, argv, NUMBERS[name], **flags)
    lines = capsys.readouterr().err.splitlines()
    assert f"{name}: the run saves what it has trained and ends; a second ends it at once" in lines
    way = f"{name} came at update 2: --resume_from_checkpoint latest goes on"
    assert lines[-1] == f"what was trained is saved in {folder}, but {way}"
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-2"]
    if name != "SIGTERM":
        return
    with watch_updates(script) as later:
        run(script, **flags, resume_from_checkpoint="latest")
    with watch_updates(script) as updates:
        run(script, **flags | {"output_dir": tmp_path / "whole"})
    assert [update["step"] for update in updates] == [1, 2, 3, 4]
    assert [*stopped, *later] == updates
    assert read_files(folder) == read_files(tmp_path / "whole")


@pytest.mark.parametrize("when", ["along the way", "at the end"])
def test_stops_between_two_images(script, kind, argv, monkeypatch, tmp_path, when):
    """After the image during which it comes, the first of two; at the end after the weights."""
    step, found = FlowMatchEulerDiscreteScheduler.step, []

    def told(*args, **kwargs):
        found.append((tmp_path / "out" / WEIGHTS[kind]).is_file())
        if len(found) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", told)
    flags = {"validation_prompt": "a dog", "num_validation_images": 2, "validation_epochs": 1}
    flags["validation_num_inference_steps"] = 4
    updates = stop(script, argv, 143, **flags, max_train_steps=6 if when == "along the way" else 2)
    assert found == [when == "at the end"] * 4
    assert [name for name in read_files(tmp_path / "out") if name.endswith(".png")] == []
    if when == "at the end":
        assert len(updates) == 2
    else:  # an epoch has two updates
        assert len(updates) == 3
        assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-3"]


def test_a_second_signal_ends_at_once(script, monkeypatch):
    """But not the one that a launcher passes on where all processes have got it. In a process that says no word."""

    def be_told_twice():
        with contextlib.ExitStack() as cleanup:
            caught = script.catch_signals(cleanup)
            for seconds in (100.0, 101.0, 103.0):
                monkeypatch.setattr(script.time, "monotonic", lambda seconds=seconds: seconds)
                os.kill(os.getpid(), signal.SIGTERM)
                if seconds == 101 and list(caught) != [signal.SIGTERM]:
                    return

    assert in_child(be_told_twice) == 143


def test_ignored_signals_stay_so_but_for_a_launchers(script):
    def be_told():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        with contextlib.ExitStack() as cleanup:
            caught = script.catch_signals(cleanup)
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert list(caught) == [signal.SIGUSR1]

    assert in_child(be_told) == 0


RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*sys.modules)
"""
UNUSED = "wandb tensorboard tensorboardX comet_ml mlflow aim datasets pandas pyarrow prodigyopt torchvision matplotlib"


@pytest.fixture(scope="module")
def told(checkpoints, pictures, tmp_path_factory):
    """A run by the command line, with loader processes, whose whole group gets SIGTERM once a checkpoint is there.

    Returns its folder, exit code, what it has imported and what it said.
    """
    out = tmp_path_factory.mktemp("told") / "out"
    words = f"--pretrained_model_name_or_path {checkpoints()} --instance_data_dir {pictures()} --output_dir {out}"
    words += " --instance_prompt dog --resolution 32 --train_batch_size 1 --max_train_steps 1000 --report_to none"
    words += " --dataloader_num_workers 2 --checkpointing_steps 1 --checkpoints_total_limit 1"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RUN, str(SCRIPTS["lora"]), *words.split()]
    with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as run:
        while not list(out.glob("checkpoint-*")) and run.poll() is None:
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGTERM)
        printed, said = run.communicate(timeout=100)
    return out, run.returncode, {name.split(".")[0] for name in printed.split()}, said


@pytest.mark.slow
def test_loader_processes_leave_a_signal_to_the_group_to_the_run(told):
    """As Ctrl-C and launchers give it: they hand out the update's batches, and one process says what will happen."""
    out, code, _, said = told
    assert code == 143, said[-2000:]
    assert said.count(": the run saves what it has trained and ends") == 1
    assert "Traceback" not in said and "Exception ignored" not in said and "FutureWarning" not in said
    (checkpoint,) = out.glob("*checkpoint-*")
    way = f"SIGTERM came at update {checkpoint.name[11:]}: --resume_from_checkpoint latest goes on"
    assert said.splitlines()[-1] == f"what was trained is saved in {out}, but {way}"  # no bar below it


@pytest.mark.slow
def test_a_plain_run_imports_no_optional_package(told):
    """No tracker, dataset reader or optimizer that it does not use. PEFT is not among them: diffusers' SD3 classes
    import it wherever it is installed."""
    _, _, imported, _ = told
    assert {"torch", "diffusers", "safetensors"} <= imported
    assert imported & set(UNUSED.split()) == set()


# Two images on two processes: an epoch is one update. The second process alone is told, within that call; of three
# validation images the third is then not drawn, and none is kept.
TOLD = {
    "update": ({"max_train_steps": 6}, ("flow_losses", 2), 2, ["checkpoint-2"]),
    "drawing": ({"max_train_steps": 6}, ("draw_images", 1), 2, ["checkpoint-2"]),
    "last drawing": ({"max_train_steps": 1}, ("draw_images", 1), 1, []),
}


@pytest.mark.slow
def test_all_processes_stop_where_one_is_told(argv, tmp_path, in_two_processes):
    cases = []
    for name, (flags, (function, call), _, _) in TOLD.items():
        if function == "draw_images":
            flags = flags | {"validation_prompt": "a dog", "num_validation_images": 3, "validation_epochs": 1}
        case = {"script": "lora", "argv": argv(**flags, output_dir=tmp_path / name), "exit": 143}
        case |= {"tell": {"name": function, "call": call, "rank": 1}, "record": str(tmp_path / f"{name}.record")}
        cases.append(case)
    in_two_processes(cases)
    for name, (_, _, updates, checkpoints) in TOLD.items():
        for rank in (0, 1):
            record = torch.load(tmp_path / f"{name}.record.{rank}", weights_only=False)
            assert (record["exit"], len(record["log_update"])) == (143, updates), name
        assert [path.name for path in Path(tmp_path, name).glob("*checkpoint-*")] == checkpoints
        files = read_files(tmp_path / name)
        assert [file for file in files if file.endswith(".png")] == []
        assert (WEIGHTS["lora"] in files) == (name == "last drawing")
