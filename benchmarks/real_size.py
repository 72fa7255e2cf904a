#!/usr/bin/env python
"""Trains random weights of a real model's size, by LoRA or in full: seconds and memory of each stage.

    python benchmarks/real_size.py --size sd3.5-medium
    python benchmarks/real_size.py --size sd3.5-medium --other PATH/train_dreambooth_lora_sd3.py --runner RUNNER
    python benchmarks/real_size.py --full

It trains LoRA at 256 px in bfloat16, batch 1; all scripts get the flags after `--`. --other also runs another script
with the same flags, through --runner if it cannot run by itself on this machine. Only ours caches latents: diffusers'
fails if its flag for that meets bfloat16. --full trains the whole transformer in bfloat16, with 8-bit optimizer state
and --fused_backward_pass: half of the updates, a checkpoint and a result, then a second run that resumes from there.

A stage lasts from one progress bar to the next; saving begins at the last update. Its peak is the process's largest
resident memory (VmHWM, reset when a stage begins). The part of it that is mapped from the weights' files, which the
system can drop, stands beside it. Processor seconds count all threads; they are the better measure on a machine that
others use. Seconds per update are measured from the first update to the last. SD3.5 Medium needs 16 GB of disk, Large
28, in a temporary folder unless --work names one to keep.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from checkpoints import REAL_SIZES, SIZES, build_checkpoint, build_pictures  # noqa: E402

BAR = re.compile(rb"[\r\n]([A-Z][\w .]*?): +(\d+)%\|[^\r\n]*?\| *(\d+)/(\d+) \[")
LORA = "--mixed_precision bf16 --train_batch_size 1 --resolution 256"
FULL = LORA + " --cache_latents --gradient_checkpointing --fused_backward_pass --full_bf16 --use_8bit_adam"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="sd3.5-medium", help=f"Real sizes: {', '.join(REAL_SIZES)}.")
    parser.add_argument("--full", action="store_true", help="Train the whole transformer, then resume.")
    parser.add_argument("--updates", type=int, default=4, help="Updates per run.")
    parser.add_argument("--ours", help="Our script; unset: this repository's.")
    parser.add_argument("--other", help="Another script to compare it with.")
    parser.add_argument("--runner", help="A program that runs the other script; it gets its path and flags.")
    parser.add_argument("--work", help="Folder to keep the checkpoint in; unset: a temporary one.")
    parser.add_argument("flags", nargs="*", help="Flags for the scripts, after --.")
    return parser.parse_args(argv)


class Watch:
    """Stages of a process, from its progress bars, with the peaks of its memory in bytes."""

    def __init__(self, pid):
        self.status, self.clear = Path(f"/proc/{pid}/status"), Path(f"/proc/{pid}/clear_refs")
        self.stat, self.worked = Path(f"/proc/{pid}/stat"), 0.0
        self.stages, self.start, self.mapped, self.at_once = [("start", 0.0, 0.0)], time.monotonic(), 0, 0
        self.found, self.updates = [], {}

    def read(self):
        """VmHWM, VmRSS and RssFile in bytes; nothing once the process has ended."""
        lines = dict(line.split(":", 1) for line in self.status.read_text().splitlines())
        return [int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssFile")]

    def sample(self):
        try:
            peak, size, mapped = self.read()
            ticks = self.stat.read_text().rpartition(")")[2].split()[11:13]  # user, system
        except (OSError, KeyError, ValueError):
            return
        self.worked = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        self.peak = peak
        if size > self.at_once:
            self.at_once, self.mapped = size, mapped

    def enter(self, stage):
        """Ends a stage and begins the next; its peak starts at the memory in use now."""
        self.sample()
        now = time.monotonic() - self.start
        name, began, worked = self.stages[-1]
        self.found.append((name, now - began, self.worked - worked, self.peak, self.mapped))
        self.stages.append((stage, now, self.worked))
        self.at_once = self.mapped = 0
        if stage:
            self.clear.write_text("5")

    def see(self, text):
        for name, _, done, total in BAR.findall(text):
            name = name.decode()
            if name in ("Steps", "Training"):
                self.sample()
                self.updates.setdefault(int(done), (time.monotonic() - self.start, self.worked))
                name = "Training"
            for stage in (name, "Saving") if name == "Training" and done == total else (name,):
                if stage not in [entered for entered, *_ in self.stages]:
                    self.enter(stage)


def measure(command, environment=None):
    """Runs a command; returns its stages [(name, seconds, processor's, peak, mapped)], and both seconds an update."""
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
    first, last = min(watch.updates), max(watch.updates)
    ends = zip(watch.updates[first], watch.updates[last], strict=True)
    return watch.found, [(end - start) / max(last - first, 1) for start, end in ends]


def prepare(work, size):
    """Builds the checkpoint and the pictures. Returns the rates of matrix products on one thread, in GFLOP/s."""
    import torch

    build_checkpoint(work / size, size)
    build_pictures(work / "pictures", 256)
    torch.set_num_threads(1)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        tokens, weight, seconds = torch.randn(512, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype), []
        for _ in range(10):
            start = time.process_time()
            torch.nn.functional.linear(tokens, weight)
            seconds.append(time.process_time() - start)
        rates[str(dtype).removeprefix("torch.")] = 2 * 512 * 2048**2 / min(seconds) / 1e9
    return rates


def report(title, command):
    """Runs a command and prints its stages."""
    stages, (wall, worked) = measure([str(word) for word in command])
    print(f"\n{title}: an update takes {wall:.1f} s, {worked:.1f} s of the processor\n")
    stages.append(("in all", sum(s[1] for s in stages), sum(s[2] for s in stages), *max(s[3:] for s in stages)))
    print("| stage | s | processor's s | peak, GB | of it files |\n|---|---|---|---|---|")
    for name, seconds, own, peak, mapped in stages:
        print(f"| {name} | {seconds:.1f} | {own:.1f} | {peak / 1e9:.2f} | {mapped / 1e9:.2f} |", flush=True)


def main(args):
    work = Path(args.work or tempfile.mkdtemp(prefix="real-size-"))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # children start with this process's peak memory
        rates = pool.submit(prepare, work, args.size).result()
    slow = ": no fast bfloat16, so the seconds mean little" if rates["bfloat16"] < rates["float32"] else ""
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in rates.items())
    print(f"{args.size}: a matrix product on one thread reaches {rates}{slow}", flush=True)
    output = work / "output"
    flags = ["--pretrained_model_name_or_path", work / args.size, "--instance_data_dir", work / "pictures"]
    flags += ["--instance_prompt", "a photo of sks dog", "--seed", 0, "--output_dir", output]
    ours = [sys.executable, args.ours or ROOT / f"train_dreambooth_{'' if args.full else 'lora_'}sd3.py"]
    other = [sys.executable, *([args.runner] if args.runner else []), args.other]
    try:
        if args.full:
            half = args.updates // 2
            run = [*ours, *flags, *FULL.split(), "--checkpointing_steps", half, *args.flags]
            report("full", [*run, "--max_train_steps", half])
            report("resumed", [*run, "--max_train_steps", args.updates, "--resume_from_checkpoint", "latest"])
            return
        flags += [*LORA.split(), "--max_train_steps", args.updates, *args.flags]
        report("ours", [*ours, *flags, "--cache_latents"])
        if args.other:
            shutil.rmtree(output)
            report("other", [*other, *flags])
    finally:
        shutil.rmtree(output if args.work else work, ignore_errors=True)


if __name__ == "__main__":
    main(parse_args())
