#!/usr/bin/env python
"""Runs our scripts once for each flag that saves memory, and prints the table of what it costs and saves.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/options.py --size small

Memory in MiB and updates a second are those of `one_run.py`: the peak from the start to the last update, and that of
the updates alone. The flags of every row are printed above the table. The bases in 8 and 4 bit are quantised on a CPU
as well, where the scripts refuse to, see `one_run.py`.
"""

import argparse
import json
import tempfile
from pathlib import Path

from checkpoints import SIZES, build_checkpoint, build_pictures
from one_run import WARM_UP, measure

LEAST = "--cache_latents --no_t5 --gradient_checkpointing"
QUANTIZED = {"8bit": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
OPTIONS = {
    "train_dreambooth_lora_sd3": (
        "",
        "--mixed_precision bf16",
        "--gradient_checkpointing",
        "--cache_latents",
        "--offload",
        "--no_t5",
        *(f"--bnb_quantization_config_path {name}.json" for name in QUANTIZED),
        LEAST,
    ),
    "train_dreambooth_sd3": (
        "",
        "--gradient_checkpointing",
        "--use_8bit_adam",
        "--fused_backward_pass --max_grad_norm inf",
        "--mixed_precision bf16 --full_bf16 --fused_backward_pass --max_grad_norm inf",
        f"{LEAST} --use_8bit_adam",
    ),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="The random checkpoint.")
    parser.add_argument("--resolution", type=int, default=256, help="Side of the pictures and of the crop in pixels.")
    parser.add_argument("--updates", type=int, default=5, help="Updates that are timed.")
    parser.add_argument("--work", help="Folder for the checkpoint, kept; unset: a temporary one.")
    parser.add_argument("--scripts", choices=OPTIONS, nargs="+", default=list(OPTIONS), help="Some of our scripts.")
    return parser.parse_args(argv)


def main(args):
    work = Path(args.work or tempfile.mkdtemp(prefix="options-"))
    model, pictures = build_checkpoint(work / args.size, args.size), build_pictures(work / "pictures", args.resolution)
    shared = ["--resolution", args.resolution, "--train_batch_size", 1, "--max_train_steps", WARM_UP + args.updates]
    shared += ["--random_flip", "--report_to", "none", "--seed", 0]
    for name, fields in QUANTIZED.items():
        (work / f"{name}.json").write_text(json.dumps(fields))
    print(f"{args.size}: {' '.join(map(str, shared))}\n")
    print("| script | flag | peak MiB | of the updates | updates/s |\n|---|---|---|---|---|", flush=True)
    for script in args.scripts:
        for option in OPTIONS[script]:
            flags = ["--pretrained_model_name_or_path", model, "--instance_data_dir", pictures]
            flags += ["--instance_prompt", "sks dog", *shared, "--output_dir", tempfile.mkdtemp(dir=work)]
            words = [str(work / word) if word.endswith(".json") else word for word in option.split()]
            found = measure(script, [*flags, *words])
            row = f"{found['memory']:.0f} | {found['training memory']:.0f} | {1 / found['seconds']:.2f}"
            print(f"| `{script}.py` | {f'`{option}`' if option else 'none'} | {row} |", flush=True)


if __name__ == "__main__":
    main(parse_args())
