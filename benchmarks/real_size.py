#!/usr/bin/env python
"""Trains SD3 at its real size, with random weights, and prints time and peak memory of each stage of the run.

    python benchmarks/real_size.py --size sd3.5-medium
    python benchmarks/real_size.py --size sd3.5-medium --other PATH/train_dreambooth_lora_sd3.py --runner RUNNER
    python benchmarks/real_size.py --full

LoRA on 256 px in bfloat16 with latents cached, batch 1, for four updates; flags after `--` are added for all scripts.
--other runs another script with the same flags, and --runner puts a program before it, for one that does not run by
itself on this machine. --full trains the whole transformer in bfloat16, with 8-bit states and the step taken in the
backward pass, for four updates with a checkpoint after the second, and then resumes there.

A stage lasts from one progress bar to the next. Its peak is the most that the process had in memory at once (VmHWM,
set back when a bar appears), next to it the part that was read from files and can be dropped at will (pages of the
weights' files that are mapped). SD3.5 Medium needs 16 GB of disk, Large 28, in a temporary folder unless --work names
one that is kept.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

BAR = re.compile(rb"[\r\n]([A-Z][\w .]*?): +(\d+)%\|[^\r\n]*?\| *(\d+)/(\d+) \[")
LORA = "--mixed_precision bf16 --cache_latents --train_batch_size 1 --max_train_steps 4 --resolution 256"
FULL = LORA + " --gradient_checkpointing --fused_backward_pass --full_bf16 --use_8bit_adam --checkpointing_steps 2"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="sd3.5-medium", help="sd3-medium, sd3.5-medium or sd3.5-large.")
    parser.add_argument("--full", action="store_true", help="Train the whole transformer, and resume.")
    parser.add_argument("--ours", help="Our script; unset: the one of this repository.")
    parser.add_argument("--other", help="A script that is run beside it.")
    parser.add_argument("--runner", help="A program that is given the other script and its flags.")
    parser.add_argument("--work", help="Folder for the checkpoint, kept; unset: a temporary one.")
    parser.add_argument("flags", nargs="*", help="Flags for the scripts, after --.")
    return parser.parse_args(argv)


class Watch:
    """Stages of a process, from its progress bars, with the peaks of its memory in bytes."""

    def __init__(self, pid):
        self.status, self.clear = Path(f"/proc/{pid}/status"), Path(f"/proc/{pid}/clear_refs")
        self.stages, self.start, self.mapped, self.at_once = [("start", 0.0)], time.monotonic(), 0, 0
        self.found, self.updates = [], {}

    def read(self):
        """VmHWM, VmRSS and RssFile in bytes; nothing once the process has ended."""
        lines = dict(line.split(":", 1) for line in self.status.read_text().splitlines())
        return [int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssFile")]

    def sample(self):
        try:
            peak, size, mapped = self.read()
        except (OSError, KeyError, ValueError):
            return
        self.peak = peak
        if size > self.at_once:
            self.at_once, self.mapped = size, mapped

    def enter(self, stage):
        """Ends a stage and begins the next, whose peak starts from what is in memory now."""
        self.sample()
        now = time.monotonic() - self.start
        name, began = self.stages[-1]
        self.found.append((name, now - began, self.peak, self.mapped))
        self.stages.append((stage, now))
        self.at_once = self.mapped = 0
        if stage:
            self.clear.write_text("5")

    def see(self, text):
        for name, _, done, _ in BAR.findall(text):
            name = name.decode()
            if name in ("Steps", "Training"):
                self.updates.setdefault(int(done), time.monotonic() - self.start)
                name = "Training"
            if name not in [stage for stage, _ in self.stages]:
                self.enter(name)


def measure(command, environment=None):
    """Runs a command; returns its stages [(name, seconds, peak, mapped)], seconds in all and of an update."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0, env=environment)
    watch, ended, tail = Watch(process.pid), threading.Event(), b"\n"

    def sample():
        while not ended.wait(0.02):
            watch.sample()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    while chunk := os.read(process.stderr.fileno(), 65536):
        sys.stderr.buffer.write(chunk) if os.environ.get("SHOW") else None
        tail = (tail + chunk)[-3000:]
        watch.see(tail)
    ended.set()
    thread.join()
    watch.enter(None)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail.decode(errors='replace')}")
    first, last = min(filter(None, watch.updates)), max(watch.updates)
    each = (watch.updates[last] - watch.updates[first]) / max(last - first, 1)
    return watch.found, time.monotonic() - watch.start, each
