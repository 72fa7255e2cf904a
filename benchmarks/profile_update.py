#!/usr/bin/env python
"""Profiles updates of one of our scripts: the share of time outside the transformer's forward and backward pass.

    python benchmarks/profile_update.py --size small -- --cache_latents

Everything after `--` goes to the script. The device is waited for at the borders of the forward and the backward pass,
so the shares hold on a GPU as well; the first updates, which warm up, are left out. Then one more update runs under
torch.profiler, whose longest operators are printed.
"""

import argparse
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from checkpoints import SIZES, build_checkpoint, build_pictures  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

WARM_UP = 3


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default="train_dreambooth_lora_sd3", help="Which of our scripts.")
    parser.add_argument("--size", choices=SIZES, default="small", help="The random checkpoint.")
    parser.add_argument("--resolution", type=int, default=256, help="Side of the pictures and of the crop in pixels.")
    parser.add_argument("--updates", type=int, default=10, help="Updates that are timed.")
    parser.add_argument("--work", help="Folder for the checkpoint, kept; unset: a temporary one.")
    parser.add_argument("flags", nargs="*", help="Flags for the script, after --.")
    return parser.parse_args(argv)


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, spent, name):
    """The function, adding its seconds to `spent[name]`."""

    def call(*args, **kwargs):
        start = now()
        result = function(*args, **kwargs)
        spent[name] = spent.get(name, 0) + now() - start
        return result

    return call


def watch(script, updates):
    """Puts clocks into a script's module. Returns {pass: seconds} and the ends of the updates, filled as it runs."""
    spent, ends, log_update, flow_losses = {}, [], script.log_update, script.flow_losses
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def losses(args, transformer, *rest, **target):
        return flow_losses(args, timed(transformer, spent, "forward"), *rest, **target)

    def end(*args):
        log_update(*args)
        ends.append(now())
        if len(ends) == WARM_UP:
            spent.clear()
        if len(ends) == WARM_UP + updates:
            ends.append(dict(spent))
            profiler.start()
        if len(ends) == WARM_UP + updates + 2:
            profiler.stop()

    script.flow_losses, script.log_update = losses, end
    Accelerator.backward = timed(Accelerator.backward, spent, "backward")
    return ends, profiler


def main(args):
    work = Path(args.work or tempfile.mkdtemp(prefix="profile-"))
    script = import_module(args.script)
    ends, profiler = watch(script, args.updates)
    flags = ["--pretrained_model_name_or_path", build_checkpoint(work / args.size, args.size)]
    flags += [
        "--instance_data_dir",
        build_pictures(work / "pictures", args.resolution),
        "--instance_prompt",
        "sks dog",
    ]
    flags += [
        "--resolution",
        args.resolution,
        "--train_batch_size",
        1,
        "--max_train_steps",
        WARM_UP + args.updates + 1,
    ]
    flags += ["--report_to", "none", "--seed", 0, "--output_dir", tempfile.mkdtemp(dir=work), *args.flags]
    script.main(script.parse_args(list(map(str, flags))))
    total = ends[WARM_UP + args.updates - 1] - ends[WARM_UP - 1]
    spent = ends[WARM_UP + args.updates]
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    print(f"{' '.join(args.flags)}  ({args.script}, {args.size}, {args.resolution} px, {args.updates} updates)")
    for name, seconds in [*spent.items(), ("everything else", total - sum(spent.values()))]:
        print(f"{name}: {1000 * seconds / args.updates:.1f} ms an update, {seconds / total:.1%}")


if __name__ == "__main__":
    main(parse_args())
