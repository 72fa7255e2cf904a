"""One process of two fails alone: the run goes on, or it ends within a minute and says once what was wrong.

The launcher ends the others, see test_two_machines.py for torchrun itself. Where gloo finds the connection closed
before that, the others have a traceback of their own; with NCCL they wait until they are ended.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import processes
import pytest
import ranks
from conftest import load_script
from diffusers import SD3Transformer2DModel

pytestmark = pytest.mark.slow
DRAWING = {"validation_prompt": "a dog", "num_validation_images": 2, "validation_epochs": 1}
CLASSES = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}
FSDP2 = processes.fsdp2_environment()
WEIGHTS = "pytorch_lora_weights.safetensors"


def fail(*args, **kwargs):
    raise OSError("no luck")


def not_finite(original):
    """The function, and after it what draw_images raises."""

    def drawn(*args, **kwargs):
        original(*args, **kwargs)
        raise ValueError("no luck")

    return drawn


def late(original, calls):
    """The function, which fails from one call on."""
    done = []

    def counted(*args, **kwargs):
        done.append(1)
        return original(*args, **kwargs) if len(done) < calls else fail()

    return counted


@pytest.fixture
def run_two(argv, tmp_path):
    """Runs LoRA training in two processes, of which one first calls spoil(monkeypatch, script). Codes and outputs."""

    def run_two(spoil, rank=1, environment=None, **flags):
        def work():
            script = load_script("lora")
            sys.argv = ["script.py"]
            with pytest.MonkeyPatch.context() as monkeypatch:
                ranks.draw_fast(monkeypatch)
                if os.environ["RANK"] == str(rank):
                    spoil(monkeypatch, script)
                script.main(script.parse_args(argv(**{"max_train_steps": 3, "checkpointing_steps": 2} | flags)))

        begun = time.monotonic()
        codes = processes.watch(processes.start(work, 2, tmp_path / "log", **(environment or {})))
        assert time.monotonic() - begun < 60
        return codes, [Path(f"{tmp_path}/log.{rank}").read_text() for rank in (0, 1)]

    return run_two


def errors(text):
    """The lines with which a script says that something failed, and those that end a traceback."""
    marks = (": error: ", "ERROR: ", "Error: ", "what was trained is saved")
    return [line for line in text.splitlines() if any(mark in line for mark in marks)]


def spoil_drawing(monkeypatch, script):
    monkeypatch.setattr(script, "draw_images", fail)


def test_drawing_along_the_way_costs_the_images_alone(run_two, tmp_path):
    codes, said = run_two(spoil_drawing, **DRAWING, skip_final_inference=True)
    assert codes == [0, 0]
    assert errors(said[1]) == ["ERROR: [RANK 1] validation after update 1 failed (OSError: no luck)"] + [
        "ERROR: [RANK 1] validation after update 2 failed (OSError: no luck)"
    ]
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").is_file()


def test_the_final_drawing_is_said_to_have_failed(run_two, tmp_path):
    codes, said = run_two(spoil_drawing, **DRAWING, max_train_steps=1)
    assert codes == [1, 1]
    assert errors(said[1]) == ["ERROR: [RANK 1] validation after update 1 failed (OSError: no luck)"]
    end = f"what was trained is saved in {tmp_path / 'out'}, but validation after update 1 failed"
    assert errors(said[0]) == [end]


def test_under_fsdp2_images_that_are_not_finite_cost_the_images_alone(run_two):
    """They are found once all processes have made their passes."""
    spoil = lambda patch, script: patch.setattr(script, "draw_images", not_finite(script.draw_images))  # noqa: E731
    codes, said = run_two(spoil, environment=FSDP2, **DRAWING, skip_final_inference=True, max_train_steps=2)
    assert codes == [0, 0]
    assert errors(said[1]) == ["ERROR: [RANK 1] validation after update 1 failed (ValueError: no luck)"]


def spoil_pass(monkeypatch, script):
    monkeypatch.setattr(SD3Transformer2DModel, "forward", late(SD3Transformer2DModel.forward, 4))


def spoil_disk(monkeypatch, script):
    monkeypatch.setattr(script.torch, "save", fail)


def spoil_checkpoint(monkeypatch, script):
    """The manifest of the checkpoint alone: what the result needs is written."""
    write = script.write_manifest
    monkeypatch.setattr(script, "write_manifest", lambda *given: fail() if given[1].step < 3 else write(*given))


def spoil_data(monkeypatch, script):
    monkeypatch.setattr(script, "collate", late(script.collate, 2))


def spoil_update(monkeypatch, script):
    monkeypatch.setattr(script, "check_finite", fail)


def spoil_base(monkeypatch, script):
    monkeypatch.setattr(script, "read_pipeline", lambda args: script.refuse("no luck"))


SAVING = [(spoil_checkpoint, 0, None), (spoil_disk, 1, FSDP2)]


@pytest.mark.parametrize(("spoil", "rank", "environment"), SAVING, ids=["the first", "the second under FSDP2"])
def test_saving_costs_the_checkpoint_alone(run_two, tmp_path, spoil, rank, environment):
    codes, said = run_two(spoil, rank=rank, environment=environment)
    assert codes[0] == 1
    assert sum("failed (OSError: no luck)" in line for line in errors(said[rank])) == 1
    assert len(errors(said[0])) == 2 - rank
    assert "GB were free) failed" in errors(said[0])[-1]
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == []
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").is_file()


ENDING = {
    "a pass of a drawing under FSDP2": (spoil_pass, FSDP2, DRAWING, 1, "OSError: no luck"),
    "data": (spoil_data, None, {}, 1, "OSError: no luck"),
    "an update": (spoil_update, None, {}, 1, "OSError: no luck"),
    "class images": (spoil_drawing, None, CLASSES, 2, "script.py: error: class images cannot be drawn"),
    "a refusal": (spoil_base, None, {}, 2, "script.py: error: no luck"),
}


@pytest.mark.parametrize(("spoil", "environment", "flags", "code", "message"), ENDING.values(), ids=ENDING)
def test_it_ends_the_run_and_says_so_once(run_two, tmp_path, spoil, environment, flags, code, message):
    if flags is CLASSES:
        flags = flags | {"class_data_dir": tmp_path / "class"}
    codes, said = run_two(spoil, environment=environment, **flags)
    assert codes[1] == code and codes[0]
    (line,) = errors(said[1])
    assert line.startswith(message)
    assert [line for line in errors(said[0]) if "peer" not in line] == []  # gloo's own, of a closed connection


def test_the_first_process_saves_the_updates_that_were_made(run_two, tmp_path):
    """By itself: the second one waits for it in the next update, and is ended."""
    spoil = lambda patch, script: patch.setattr(script, "check_finite", late(script.check_finite, 3))  # noqa: E731
    codes, said = run_two(spoil, rank=0, checkpointing_steps=10)
    assert codes[0] == 1
    assert errors(said[0]) == ["OSError: no luck"]
    (folder,) = (tmp_path / "out").glob("*checkpoint*")
    assert folder.name == "checkpoint-3"
    assert load_script("lora").read_manifest(folder)["step"] == 3
    assert {path.name for path in folder.iterdir()} > {"optimizer.bin", "scheduler.bin", WEIGHTS}


def test_the_upload_may_take_longer_than_any_process_waits(run_two, tmp_path):
    """It comes after the last time that the processes wait for each other."""

    def spoil(monkeypatch, script):
        monkeypatch.setattr(script, "open_repository", lambda *inputs: "someone/sd3")
        monkeypatch.setattr(script.huggingface_hub, "upload_folder", lambda **options: time.sleep(5))
        # Of both: a process that waits for another notices it.
        monkeypatch.setattr(script, "timedelta", lambda **options: timedelta(seconds=3))

    codes, said = run_two(spoil, rank=0, max_train_steps=1)
    assert codes == [0, 0]
    assert [errors(text) for text in said] == [[], []]
