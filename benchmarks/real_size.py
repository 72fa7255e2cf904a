#!/usr/bin/env python
"""Trains random weights of a real model's size, by LoRA or in full: seconds and memory of each stage.

    python benchmarks/real_size.py --size sd3.5-medium
    python benchmarks/real_size.py --size sd3.5-medium --other PATH/train_dreambooth_lora_sd3.py
    python benchmarks/real_size.py --full

It trains LoRA at 256 px in bfloat16, batch 1; all scripts get the flags after `--`. --other also runs another script
with the same flags, through torchvision_stand_in.py, which does nothing where torchvision is installed. Only ours
caches latents: diffusers' fails if its flag for that meets bfloat16. --full trains the whole transformer in bfloat16,
with 8-bit optimizer state and --fused_backward_pass: half of the updates, a checkpoint and a result, then a second run
that resumes from there.

A stage lasts from one progress bar to the next; saving begins at the last update. Its peak is the process's largest
resident memory (VmHWM, reset when a stage begins). The part of it that is mapped from the weights' files, which the
system can drop, stands beside it. Processor seconds count all threads; they are the better measure on a machine that
others use. Seconds per update count from when the bar is drawn. SD3.5 Medium needs 16 GB of disk, Large 28, in a
temporary folder unless --work names one to keep.
"""

import argparse
import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import termios
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import torchvision_stand_in  # noqa: E402
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
    parser.add_argument("--work", help="Folder to keep the checkpoint in; unset: a temporary one.")
    parser.add_argument("flags", nargs="*", help="Flags for the scripts, after --.")
    return parser.parse_args(argv)


def start(command):
    """Starts a command with a terminal for its stderr, where bars show each update. Returns it and what it says."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (50, 200))
    environment = os.environ | {"TQDM_MININTERVAL": "0"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=its, env=environment)
    os.close(its)

    def read():
        with contextlib.suppress(OSError):  # it has ended
            while True:
                yield os.read(ours, 65536)

    return process, read()


class Watch:
    """Stages of a process, from its progress bars, with the peaks of its memory in bytes."""

    def __init__(self, pid):
        self.folder, self.begin, self.found = Path(f"/proc/{pid}"), time.monotonic(), []
        self.stage, self.entered, self.updates = ("start", 0.0, 0.0), {"start"}, {}
        self.worked, self.peak, self.largest = 0.0, 0, (0, 0)

    def sample(self):
        """Reads what the process has used, unless it has ended."""
        with contextlib.suppress(OSError, KeyError, ValueError):
            lines = dict(line.split(":", 1) for line in (self.folder / "status").read_text().splitlines())
            peak, size, mapped = (int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssFile"))
            ticks = (self.folder / "stat").read_text().rpartition(")")[2].split()[11:13]  # user, system
            self.worked = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            self.peak, self.largest = peak, max(self.largest, (size, mapped))
        return time.monotonic() - self.begin, self.worked

    def enter(self, stage):
        """Ends a stage and begins the next; its peak starts at the memory in use now."""
        now, worked = self.sample()
        name, since, before = self.stage
        self.found.append((name, now - since, worked - before, self.peak, self.largest[1]))
        self.stage, self.largest = (stage, now, worked), (0, 0)
        self.entered.add(stage)
        if stage:
            (self.folder / "clear_refs").write_text("5")

    def see(self, text):
        for name, _, done, total in BAR.findall(text):
            stages = [name.decode()]
            if stages[0] in ("Steps", "Training"):
                self.updates.setdefault(int(done), self.sample())
                stages = ["Training", "Saving"] if done == total else ["Training"]
            for stage in stages:
                if stage not in self.entered:
                    self.enter(stage)


def measure(command):
    """Runs a command. Returns its stages, [(name, seconds, processor's, peak, mapped)], and when each update was made,
    {number: (seconds, processor's)}, the bar's first drawing among them. Errors: RuntimeError if the command fails."""
    process, said = start(command)
    watch, ended, tail = Watch(process.pid), threading.Event(), b"\n"

    def sample():
        while not ended.wait(0.02):
            watch.sample()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    for piece in said:
        tail = (tail + piece)[-3000:]
        watch.see(tail)
    ended.set()
    thread.join()
    watch.enter(None)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail.decode(errors='replace')}")
    return watch.found, watch.updates


def pace(updates):
    """Seconds, and the processor's, of an update: from the bar's first drawing to the last update."""
    first, last = min(updates), max(updates)
    return [(end - start) / max(last - first, 1) for start, end in zip(updates[first], updates[last], strict=True)]


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
    stages, updates = measure([str(word) for word in command])
    wall, worked = pace(updates)
    print(f"\n{title}: an update takes {wall:.2f} s, {worked:.2f} s of the processor\n")
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
    other = [sys.executable, torchvision_stand_in.__file__, args.other]
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
