"""launch/two_machines.slurm with a real launcher on this machine, whose processes take longer to save than to train.

In place of srun and scontrol there are scripts of a few words, in place of `accelerate launch` torchrun, which it
calls; SIGUSR1 comes to all processes, as SLURM sends it.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
SLOW = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_dreambooth_lora_sd3 as script

write = script.write_manifest
log_update = script.log_update

def save_slowly(*inputs):
    time.sleep(6)
    write(*inputs)

def say(*inputs):
    log_update(*inputs)
    print("UPDATED", flush=True)
    time.sleep(0.2)

script.write_manifest = save_slowly
script.log_update = say
script.main(script.parse_args(sys.argv[1:]))
"""
TOOLS = {
    "srun": 'shift; exec "$@"',  # less --kill-on-bad-exit=1
    "scontrol": 'if [ "$1" = requeue ]; then echo "REQUEUED $2"; else echo localhost; fi',
    "accelerate": 'exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 "$SLOW" $FLAGS',
}


def test_two_machines_save_when_their_time_is_up_and_go_back_into_the_queue(argv, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW)
    flags = argv(max_train_steps=1000, instance_prompt="dog")
    environment = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "a"}
    environment |= {"PYTHON": sys.executable, "SLOW": str(slow), "FLAGS": " ".join(flags)}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"}
    environment |= {"TORCHDYNAMO_DISABLE": "1"}  # nothing is compiled: a second less for each process to import
    for name, text in TOOLS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    command = ["bash", str(ROOT / "launch/two_machines.slurm")]
    log = tmp_path / "log"
    with log.open("w") as file:
        # The batch script itself gets no signal: SLURM sends it to the steps alone.
        job = subprocess.Popen(command, env=os.environ | environment, stdout=file, stderr=file, cwd=ROOT)
    while "UPDATED" not in log.read_text():
        time.sleep(0.1)
        assert job.poll() is None, log.read_text()[-3000:]
    begun = time.monotonic()
    for process in psutil.Process(job.pid).children(recursive=True):
        process.send_signal(signal.SIGUSR1)
    code = job.wait(timeout=100)
    assert time.monotonic() - begun > 6
    assert code == 138, log.read_text()[-3000:]
    assert log.read_text().splitlines()[-1] == "REQUEUED 7"
    (checkpoint,) = (tmp_path / "out").glob("*checkpoint*")
    assert checkpoint.name.startswith("checkpoint-")
