#!/usr/bin/env python
"""Runs one of our scripts and another one in turn, with the same flags, and compares their time and memory.

    python benchmarks/compare.py --other PATH/train_dreambooth_lora_sd3.py --size small -- --max_train_steps 20

Both scripts get the flags after `--`, and the model, pictures and prompt that this program makes. It measures wall
time in seconds, from the start of the process to its end; the time to the first update and updates per second after
it, from the progress bar; and the peak resident memory of the process in MiB. Each row has the medians of the runs and
their ratio, ours / other.

The other script runs through torchvision_stand_in.py, which does nothing where torchvision is installed.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import real_size  # noqa: E402
import torchvision_stand_in  # noqa: E402
from checkpoints import SIZES, build_checkpoint, build_pictures  # noqa: E402

FIGURES = ("wall", "first update", "updates/s", "memory")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", default=str(ROOT / "train_dreambooth_lora_sd3.py"), help="Our script.")
    parser.add_argument("--other", required=True, help="The script to compare it with.")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="The random checkpoint that both train.")
    parser.add_argument("--resolution", type=int, default=256, help="Side of pictures and crops in pixels.")
    parser.add_argument("--native", type=int, default=256, help="Pixels that the checkpoint says it draws.")
    parser.add_argument("--captions", action="store_true", help="Use a dataset with one caption per picture.")
    parser.add_argument("--runs", type=int, default=3, help="Measured runs of each, after one that is not measured.")
    parser.add_argument("--work", help="Folder to keep the checkpoint in; unset: a temporary one.")
    parser.add_argument("flags", nargs="*", help="Flags for both scripts, after --.")
    return parser.parse_args(argv)


def measure(command):
    """Figures of one run of a command. Errors: RuntimeError with the end of its output if it fails."""
    stages, updates = real_size.measure(command)
    first, last = min(filter(None, updates)), max(updates)
    rate = (last - first) / (updates[last][0] - updates[first][0]) if last > first else float("nan")
    wall, memory = sum(stage[1] for stage in stages), max(stage[3] for stage in stages) / 2**20
    return dict(zip(FIGURES, (wall, updates[first][0], rate, memory), strict=True))


def build(work, args):
    """Builds the checkpoint and the pictures in a separate process: a child starts with its parent's peak memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        model = pool.submit(build_checkpoint, work / args.size, args.size)
        folder = work / ("captioned" if args.captions else "pictures")
        data = pool.submit(build_pictures, folder, args.resolution, captions=args.captions)
        config = Path(model.result(), "transformer", "config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": args.native // 8}))
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
        "other": [sys.executable, torchvision_stand_in.__file__, args.other, *shared],
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
        print(f"| {figure} | {ours:.2f} | {other:.2f} | {ours / other:.2f} |")
    if not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main(parse_args())
