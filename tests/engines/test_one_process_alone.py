"""One process of two fails alone: the run ends within a minute and says once what was wrong, or goes on."""

import os
import sys
import time
from pathlib import Path

import processes
import pytest
import ranks
import torch
from conftest import load_script

pytestmark = pytest.mark.slow


def fail(*args, **kwargs):
    raise MemoryError("no luck")


def refuse_alone(script):
    """The function that reads the base model: this process cannot."""

    def read_pipeline(args):
        script.refuse("this process cannot read the base")

    return read_pipeline


def after(calls, function, then):
    """The function, which does `then` instead from one call on."""
    done = []

    def counted(*args, **kwargs):
        done.append(1)
        return function(*args, **kwargs) if len(done) < calls else then(*args, **kwargs)

    return counted


@pytest.fixture
def two(argv, tmp_path):
    """Runs main in two processes, of which `rank` first calls spoil(monkeypatch, script). Codes, lines and seconds."""

    def two(spoil, rank=1, kind="lora", environment=None, **flags):
        def work():
            script = load_script(kind)
            with pytest.MonkeyPatch.context() as monkeypatch:
                ranks.draw_fast(monkeypatch)
                if os.environ["RANK"] == str(rank):
                    spoil(monkeypatch, script)
                script.main(script.parse_args(argv(**flags)))

        sys.argv = ["script.py"]
        begun = time.monotonic()
        codes = processes.watch(processes.start(work, 2, tmp_path / "log", **(environment or {})))
        said = [Path(f"{tmp_path}/log.{rank}").read_text() for rank in (0, 1)]
        assert time.monotonic() - begun < 60
        return codes, said

    return two


DRAWING = {"validation_prompt": "a dog", "num_validation_images": 2, "validation_epochs": 1}
CLASSES = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}
