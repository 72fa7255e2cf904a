"""Two process groups with their own addresses on the loopback, as on two machines; and a process that dies."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

pytestmark = pytest.mark.slow
DYING = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_dreambooth_lora_sd3 as script

def fail(*_):
    print("FAILED", flush=True)
    raise RuntimeError("no luck on process 1")

if os.environ["RANK"] == "1":
    script.is_sound = fail
script.main(script.parse_args(sys.argv[1:]))
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_machines_are_one_run(argv, tmp_path):
    """Launched on each machine by the command of the README: a process each, and a checkpoint of two."""
    port, started = free_port(), []
    for rank in (0, 1):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        command += ["--num_machines", "2", "--machine_rank", str(rank), "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        flags = argv(output_dir=tmp_path / "out", max_train_steps=2, checkpointing_steps=2)
        started.append(
            subprocess.Popen(
                [*command, str(SCRIPTS["lora"]), *flags],
                env={**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    manifest = json.loads(Path(tmp_path, "out/checkpoint-2/dreambooth.json").read_text())
    assert manifest["flags"]["processes"] == 2
    assert ["The result is in" in text for text in said] == [True, False]


def test_a_process_that_dies_ends_the_other_within_a_minute(launch, argv, tmp_path):
    path = tmp_path / "dying.py"
    path.write_text(DYING)
    started = time.monotonic()
    done = launch(path, argv(max_train_steps=1000), processes=2)
    lasted = time.monotonic() - started
    assert done.returncode != 0
    assert done.stdout.count("FAILED") == 1
    assert "[rank1]: RuntimeError: no luck on process 1" in done.stderr
    assert lasted < 60 + 60  # a minute for the start on a busy machine


def test_a_process_that_alone_refuses_says_so(launch, tmp_path):
    """Its number is in the message; where all refuse, the first one speaks for all."""
    path = tmp_path / "refusing.py"
    program = "import os, sys\nsys.path.insert(0, {!r})\nimport train_dreambooth_lora_sd3 as script\n"
    path.write_text(
        program.format(str(ROOT)) + "if os.environ['RANK'] in sys.argv[1]:\n    script.refuse('no')\n"
        "import time\ntime.sleep(30)\n"
    )
    done = launch(path, ["1"], processes=2)
    assert "refusing.py: error: process 1: no\n" in done.stderr
    done = launch(path, ["01"], processes=2)
    assert done.stderr.count("error: no\n") == 1 and "process 1: no" not in done.stderr
