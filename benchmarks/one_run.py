#!/usr/bin/env python
"""Runs one of our scripts, with clocks in it, and prints what its updates cost as a line of JSON.

    python benchmarks/one_run.py train_dreambooth_lora_sd3 --pretrained_model_name_or_path MODEL ...

Seconds an update are the processor's on a CPU, so that other work on the machine counts little, and the clock's on a
GPU. Memory is the peak of the process, or on a GPU of torch's tensors, in MiB: from the start to the last update, and
of the updates after the first. The first updates, which warm up and compile, are left out of the times.
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
    """Puts clocks into a script's module. Returns the readings of time and memory, filled as it runs."""
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


def quantize_anywhere():
    """Lets bitsandbytes quantise on a CPU, which it can do: diffusers' quantisers ask for a GPU."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        getattr(bnb_quantizer, name).validate_environment = lambda *args, **kwargs: None


def measure(script, flags, environment=None, seconds=None):
    """Figures of a run in a process of its own, which is ended after `seconds` with subprocess.TimeoutExpired.

    Errors: RuntimeError with the end of its output where it fails.
    """
    command = [sys.executable, __file__, script, *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(name, *flags):
    sys.path.insert(0, str(ROOT))
    script = import_module(name)
    if "--bnb_quantization_config_path" in flags:
        quantize_anywhere()
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
