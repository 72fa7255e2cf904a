#!/usr/bin/env python
"""Times LoRA and full training on random weights of real shapes: seconds an update, peak memory, share of the card.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --sizes sd3.5-medium sd3-medium --resolutions 512 1024 --ranks 4 128 0 --batches 1 3

The first is SD3.5 Medium with LoRA of rank 128, batch 3, at 1024 px in bfloat16, of which figures of an H100 are
published (SimpleTuner's): they stand in the last column. It builds its checkpoint, needs no network, and ends
after --minutes whatever is left.

The share is the model's floating-point operations of an update by its seconds, over the rate of an 8192 x 8192 matrix
product in bfloat16 on the same card. Operations are those that an update cannot do without, counted by torch on the
transformer's shapes alone: the forward pass, the gradients of activations, and the gradients of what is trained. Those
that gradient checkpointing repeats do not count, nor those of the text encoders and the VAE, which have spoken before.

Without a GPU the matrices are small and in float32, which shows the program on --sizes tiny or small.
"""

import argparse
import itertools
import os
import shutil
import tempfile
import time
from pathlib import Path
from subprocess import TimeoutExpired

import torch
from checkpoints import SIZES, build_checkpoint, build_pictures
from diffusers import SD3Transformer2DModel
from one_run import WARM_UP, measure
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
TOKENS = 77 + 77  # of the CLIPs and of T5, at --max_sequence_length 77
PUBLISHED = {
    ("sd3.5-medium", 1024, 128, 3, "plain"): "0.529 s, 34.6 GiB",
    ("sd3.5-medium", 1024, 128, 3, "checkpointing"): "0.721 s, 7.67 GiB",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["sd3.5-medium"])
    parser.add_argument("--resolutions", type=int, nargs="+", default=[1024])
    parser.add_argument("--ranks", type=int, nargs="+", default=[128], help="Of LoRA; 0 trains all weights.")
    parser.add_argument("--batches", type=int, nargs="+", default=[3])
    ways = ["plain", "checkpointing", "compile", "checkpointing+compile"]
    parser.add_argument("--ways", choices=ways, nargs="+", default=ways)
    parser.add_argument("--updates", type=int, default=10, help="Updates that are timed.")
    parser.add_argument("--minutes", type=float, default=8, help="When the program ends at the latest.")
    parser.add_argument("--work", help="Folder for the checkpoints, kept; unset: a temporary one.")
    return parser.parse_args(argv)


def count_operations(config, resolution, rank, batch, device="meta"):
    """Floating-point operations of an update of the transformer of `config`; rank 0 trains all of it."""
    side = resolution // 8
    with torch.device(device), FlopCounterMode(display=False) as counter:
        model = SD3Transformer2DModel.from_config(config)
        if rank:
            layers = [n for n, _ in model.named_modules() if n.endswith(tuple(f"attn.{name}" for name in ATTENTION))]
            model.requires_grad_(False).add_adapter(LoraConfig(r=rank, target_modules=layers))
        with sdpa_kernel(SDPBackend.MATH):
            model(
                hidden_states=torch.zeros(batch, config["in_channels"], side, side),
                timestep=torch.zeros(batch),
                encoder_hidden_states=torch.zeros(batch, TOKENS, config["joint_attention_dim"]),
                pooled_projections=torch.zeros(batch, config["pooled_projection_dim"]),
            ).sample.sum().backward()
    return counter.get_total_flops()


def matrix_rate():
    """Floating-point operations a second of a square matrix product, the best of several."""
    gpu = torch.cuda.is_available()
    side, dtype, device = (8192, torch.bfloat16, "cuda") if gpu else (1024, torch.float32, "cpu")
    a, b = torch.randn(2, side, side, dtype=dtype, device=device)
    clock, seconds = time.perf_counter if gpu else time.process_time, []
    for _ in range(20):
        start = clock()
        for _ in range(10):
            a @ b
        if gpu:
            torch.cuda.synchronize()
        seconds.append((clock() - start) / 10)
    return 2 * side**3 / min(seconds)


def settings(way):
    """Flags and the environment of a way to train."""
    environment = dict(os.environ)
    if "compile" in way:
        environment |= {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"}
    return ["--gradient_checkpointing"] if "checkpointing" in way else [], environment


def main(args):
    work, gpu = Path(args.work or tempfile.mkdtemp(prefix="gpu-")), torch.cuda.is_available()
    rate, end = matrix_rate(), time.monotonic() + 60 * args.minutes
    print(f"{torch.cuda.get_device_name() if gpu else 'CPU'}: a matrix product reaches {rate / 1e12:.3f} TFLOP/s\n")
    print("| model | px | trained | batch | way | s/update | GiB | TFLOP | share | an H100 |")
    print(f"|{'---|' * 10}", flush=True)
    runs = itertools.product(args.sizes, args.resolutions, args.ranks, args.batches, args.ways)
    for size, resolution, rank, batch, way in runs:
        model, pictures = build_checkpoint(work / size, size), build_pictures(work / f"{resolution}", resolution)
        flags = ["--pretrained_model_name_or_path", model, "--instance_data_dir", pictures, "--instance_prompt", "sks"]
        flags += ["--resolution", resolution, "--train_batch_size", batch, "--repeats", batch, "--cache_latents"]
        flags += ["--max_train_steps", WARM_UP + args.updates, "--report_to", "none", "--seed", 0]
        flags += ["--output_dir", tempfile.mkdtemp(dir=work), "--mixed_precision", "bf16" if gpu else "no"]
        flags += ["--rank", rank] if rank else []
        more, environment = settings(way)
        row = f"| {size} | {resolution} | {f'LoRA {rank}' if rank else 'all'} | {batch} | {way} |"
        try:
            name = f"train_dreambooth_{'lora_' * bool(rank)}sd3"
            found = measure(name, [*flags, *more], environment, max(end - time.monotonic(), 0))
        except (RuntimeError, TimeoutExpired) as error:  # out of memory, most likely, or of time: the others go on
            print(f"{row} {str(error).splitlines()[-1][-60:]} | | | | |", flush=True)
            continue
        operations = count_operations(
            SD3Transformer2DModel.load_config(model / "transformer"), resolution, rank, batch
        )
        share = operations / found["seconds"] / rate
        figures = f"{found['seconds']:.3f} | {found['training memory'] / 1024:.2f} | {operations / 1e12:.3g}"
        published = PUBLISHED.get((size, resolution, rank, batch, way), "")
        print(f"{row} {figures} | {share:.1%} | {published} |", flush=True)
    if not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main(parse_args())
