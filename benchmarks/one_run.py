#!/usr/bin/env python
"""Runs one of the scripts, measures its updates, and prints seconds and memory as one line of JSON.

    python benchmarks/one_run.py train_dreambooth_lora_sd3 --pretrained_model_name_or_path MODEL ...

On a GPU seconds are wall time. On a CPU they are processor time, which other work on the machine affects less. Memory
is in MiB: torch's tensors on a GPU, else the whole process; the peak from start to finish, and the peak of the updates
after the first. The first updates, which warm up and compile, are not timed.
"""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2


def watch(script):
    """Reads time and memory after each update of a script. Returns the list that the readings go into."""
    import torch

    gpu, readings, log_update = torch.cuda.is_available(), [], script.log_update

    def read(*args):
        log_update(*args)
        if gpu:
            torch.cuda.synchronize()
            readings.append((time.perf_counter(), torch.cuda.max_memory_allocated() / 2**20))
        else:
            status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            readings.append((time.process_time(), int(status["VmHWM"].split()[0]) / 1024))
        if len(readings) == 1 and gpu:
            torch.cuda.reset_peak_memory_stats()
        elif len(readings) == 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    script.log_update = read
    return readings


def measure(script, flags, environment=None, seconds=None):
    """Figures of a run in a process of its own.

    Errors: subprocess.TimeoutExpired after `seconds`, RuntimeError with the end of its output if the run fails.
    """
    command = [sys.executable, __file__, script, *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(name, *flags):
    sys.path.insert(0, str(ROOT))
    script = import_module(name)
    readings = watch(script)
    script.main(script.parse_args(flags))
    times, peaks = zip(*readings, strict=True)
    figures = {
        "seconds": (times[-1] - times[WARM_UP - 1]) / (len(times) - WARM_UP),
        "memory": max(peaks),
        "training memory": peaks[-1],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
