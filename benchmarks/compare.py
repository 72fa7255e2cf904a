#!/usr/bin/env python
"""Runs one of our scripts and another one in turn, with the same flags, and compares their time and memory.

    python benchmarks/compare.py --other PATH/train_dreambooth_lora_sd3.py --size small -- --max_train_steps 20

Both scripts get the flags after `--`, and the model, pictures and prompt that this program makes. It measures wall
time in seconds, from the start of the process to its end; the time to the first update and updates per second after
it, from the progress bar; and the peak resident memory of the process in MiB, with the GPU's if nvidia-smi is there.
Each row has the medians of the runs and their ratio, ours / other.

--runner PROGRAM runs the other script if it cannot run by itself on this machine.
"""

import argparse
import os
import re
import shutil
import statistics
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

from checkpoints import SIZES, build_checkpoint, build_pictures  # noqa: E402

FIGURES = ("wall", "first update", "updates/s", "memory", "gpu memory")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", default=str(ROOT / "train_dreambooth_lora_sd3.py"), help="Our script.")
    parser.add_argument("--other", required=True, help="The script to compare it with.")
    parser.add_argument("--runner", help="A program that runs the other script; it gets its path and flags.")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="The random checkpoint that both train.")
    parser.add_argument("--resolution", type=int, default=256, help="Side of pictures and crops in pixels.")
    parser.add_argument("--captions", action="store_true", help="Use a dataset with one caption per picture.")
    parser.add_argument("--runs", type=int, default=3, help="Measured runs of each, after one that is not measured.")
    parser.add_argument("--work", help="Folder to keep the checkpoint in; unset: a temporary one.")
    parser.add_argument("flags", nargs="*", help="Flags for both scripts, after --.")
    return parser.parse_args(argv)


def gpu_memory(pid):
    """MiB of GPU memory that a process uses, or 0 without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return sum(int(row.split(",")[1]) for row in rows if row.split(",")[0].strip() == str(pid))


def measure(command):
    """Figures of one run of a command. Errors: RuntimeError with the end of its output if it fails."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0)
    updates, seen, tail, gpu = {}, b"", b"", [0]
    alive = threading.Event()

    def watch_gpu():
        while not alive.wait(0.5):
            gpu[0] = max(gpu[0], gpu_memory(process.pid))

    threading.Thread(target=watch_gpu, daemon=True).start()
    while chunk := os.read(process.stderr.fileno(), 65536):
        now = time.monotonic() - start
        seen, tail = (seen + chunk)[-400:], (tail + chunk)[-3000:]
        for done in re.findall(rb"(?:Steps|Training):[^\r\n]*?\| *(\d+)/\d+ \[", seen):
            updates.setdefault(int(done), now)
    _, status, usage = os.wait4(process.pid, 0)
    alive.set()
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail.decode(errors='replace')}")
    wall, first, last = time.monotonic() - start, min(filter(None, updates)), max(updates)
    rate = (last - first) / (updates[last] - updates[first]) if last > first else float("nan")
    return dict(zip(FIGURES, (wall, updates[first], rate, usage.ru_maxrss / 1024, gpu[0]), strict=True))


def build(work, args):
    """Builds the checkpoint and the pictures in a separate process: a child starts with its parent's peak memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        model = pool.submit(build_checkpoint, work / args.size, args.size)
        folder = work / ("captioned" if args.captions else "pictures")
        data = pool.submit(build_pictures, folder, args.resolution, captions=args.captions)
        return model.result(), data.result()


def main(args):
    work = Path(args.work or tempfile.mkdtemp(prefix="compare-"))
    model, data = build(work, args)
    source = (
        ["--dataset_name", str(data), "--caption_column", "text"] if args.captions else ["--instance_data_dir", data]
    )
    shared = ["--pretrained_model_name_or_path", model, *source, "--instance_prompt", "a photo of sks dog"]
    shared += ["--resolution", args.resolution, "--seed", 0, "--train_batch_size", 1, *args.flags]
    commands = {
        "ours": [sys.executable, args.ours, *shared],
        "other": [sys.executable, *([args.runner] if args.runner else []), args.other, *shared],
    }
    runs = {name: [] for name in commands}
    for number in range(args.runs + 1):
        for name, command in commands.items():
            output = tempfile.mkdtemp(prefix=name, dir=work)
            figures = measure([str(word) for word in [*command, "--output_dir", output]])
            runs[name] += [figures] if number else []  # the first run fills the file cache
            shutil.rmtree(output)
    print(f"{' '.join(args.flags)}  ({args.size}, {args.resolution} px, medians of {args.runs})\n")
    print("| | ours | other | ours / other |\n|---|---|---|---|")
    for figure in FIGURES:
        ours, other = (statistics.median(run[figure] for run in runs[name]) for name in ("ours", "other"))
        if other:
            print(f"| {figure} | {ours:.2f} | {other:.2f} | {ours / other:.2f} |")
    if not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main(parse_args())
