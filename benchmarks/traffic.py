#!/usr/bin/env python
"""Bytes that an update of the optimizer moves between GPUs, and its share of the update at common link speeds.

    python benchmarks/traffic.py                  # by calculation, for SD3 and SD3.5
    python benchmarks/traffic.py --measure MODEL IMAGES   # the calculation against two processes on this machine

What a GPU sends, with n of them, by the ring algorithms of NCCL and gloo; P are all parameters of the transformer:

    DDP    2 (n - 1) / n x 4 bytes x trained parameters, once an update: an all-reduce of float32 gradients
    FSDP2  3 (n - 1) / n x 2 bytes x P, each batch: bf16 weights are gathered forward and backward, gradients scattered

The time of the computation is that of the matrix products at --tflops. Nothing is taken off for what overlaps with it,
so the shares are upper bounds.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = {  # layers, which are also heads; blocks with a second attention
    "SD3 Medium": (24, ()),
    "SD3.5 Medium": (24, range(13)),
    "SD3.5 Large": (38, ()),
}
LINKS = {"10 Gb/s Ethernet": 1.25e9, "100 Gb/s": 12.5e9, "PCIe 4 x16": 25e9, "400 Gb/s": 50e9, "NVLink 4": 450e9}
GPUS = (1, 2, 8, 64)


def build_transformer(layers, dual):
    """A transformer of SD3 without weights: only the shapes are asked for."""
    import torch
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        return SD3Transformer2DModel(
            num_layers=layers,
            num_attention_heads=layers,
            attention_head_dim=64,
            caption_projection_dim=64 * layers,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            dual_attention_layers=tuple(dual),
        )


def linear_layers(transformer):
    import torch

    return {name: layer for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}


def count_adapters(transformer, rank):
    """Parameters of LoRA adapters on the script's default layers."""
    sys.path.insert(0, str(ROOT))
    from train_dreambooth_lora_sd3 import LORA_LAYERS

    layers = [layer for name, layer in linear_layers(transformer).items() if name.endswith(tuple(LORA_LAYERS))]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def count_products(transformer, pixels, text_tokens):
    """Multiply-adds of one image's forward pass: a product with each weight for each token that meets it."""
    image_tokens, total = (pixels // 16) ** 2, 0
    for name, layer in linear_layers(transformer).items():
        tokens = text_tokens if "context" in name or "add_" in name else image_tokens
        tokens = 1 if "norm" in name or "time_text" in name else tokens
        total += tokens * layer.in_features * layer.out_features
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    total += len(transformer.transformer_blocks) * 2 * (image_tokens + text_tokens) ** 2 * width
    return total + len(transformer.config.dual_attention_layers) * 2 * image_tokens**2 * width


def sent_by_ddp(trained, gpus):
    """Bytes that each GPU sends an update to average float32 gradients."""
    return 2 * (gpus - 1) / gpus * 4 * trained


def sent_by_fsdp(parameters, gpus):
    """Bytes that each GPU sends a batch to gather bf16 weights twice and to scatter bf16 gradients once."""
    return 3 * (gpus - 1) / gpus * 2 * parameters


def print_table(args):
    for model, (layers, dual) in MODELS.items():
        transformer = build_transformer(layers, dual)
        parameters = sum(parameter.numel() for parameter in transformer.parameters())
        adapters = count_adapters(transformer, args.rank)
        products = count_products(transformer, args.resolution, 77 + 77) * args.batch
        print(
            f"\n{model}: {parameters / 1e9:.2f} billion parameters, {adapters / 1e6:.1f} million at rank {args.rank}"
        )
        # Forward 2 operations a product; backward as many for the inputs, and again for the weights where they train.
        kinds = {
            "LoRA, DDP": (lambda n, count=adapters: sent_by_ddp(count, n), 4 * products),
            "full, DDP": (lambda n, count=parameters: sent_by_ddp(count, n), 6 * products),
            "full, FSDP2": (lambda n, count=parameters: sent_by_fsdp(count, n), 6 * products),
        }
        print(f"{'':>12} {'GPUs':>4} {'GB sent':>9} {'compute':>8}  " + "  ".join(f"{link:>16}" for link in LINKS))
        for kind, (sent, operations) in kinds.items():
            seconds = operations / (args.tflops * 1e12)
            for gpus in GPUS:
                data = sent(gpus)
                shares = [data / speed / (data / speed + seconds) for speed in LINKS.values()]
                row = "  ".join(f"{share:>16.1%}" for share in shares)
                print(f"{kind:>12} {gpus:>4} {data / 1e9:>9.3f} {seconds:>7.2f}s  {row}")


def measure(args):
    """Bytes that a process wrote an update, in two processes, beside those that the formula names."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        flags = {"pretrained_model_name_or_path": args.measure[0], "instance_data_dir": args.measure[1]}
        flags |= {"instance_prompt": "a photo", "resolution": 32, "train_batch_size": 1, "max_train_steps": 12}
        flags |= {"report_to": "none", "output_dir": folder}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        subprocess.run([*command, "--worker", *words], check=True)


def work(script, argv):
    """One script in one process of `measure`: counts what it writes from the third update to the last."""
    import importlib
    import os

    os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    import torch

    torch.distributed.destroy_process_group = lambda *group: None  # the next script needs it
    written, trained, log_update, make_optimizer = [], [], module.log_update, module.make_optimizer

    def count(*args):
        log_update(*args)
        lines = Path("/proc/self/io").read_text().splitlines()
        written.append(int(dict(line.split(": ") for line in lines)["wchar"]))

    def note(args, accelerator, models):
        trained[:] = [p.numel() for model in models.values() for p in module.trained_parameters(model)]
        return make_optimizer(args, accelerator, models)

    module.log_update, module.make_optimizer = count, note
    module.main(module.parse_args(argv))
    each = (written[-1] - written[2]) / (len(written) - 3)
    if os.environ["RANK"] == "0":
        expected = sent_by_ddp(sum(trained), 2)
        print(f"{script}: {each:.0f} bytes an update measured, {expected:.0f} calculated, ratio {each / expected:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--measure", nargs=2, metavar=("MODEL", "IMAGES"), help="Folders of a small pipeline, of images."
    )
    parser.add_argument("--rank", type=int, default=4, help="Rank of the adapters.")
    parser.add_argument("--batch", type=int, default=1, help="Images of a batch, on each GPU; one batch an update.")
    parser.add_argument("--resolution", type=int, default=1024, help="Side of the images in pixels.")
    parser.add_argument(
        "--tflops", type=float, default=400.0, help="What a GPU reaches: 400 of an H100's 989 in bf16."
    )
    args = parser.parse_args()
    measure(args) if args.measure else print_table(args)


if __name__ == "__main__":
    if "--worker" in sys.argv[1:2]:
        work("train_dreambooth_lora_sd3", [*sys.argv[2:], "--rank", "64"])
        work("train_dreambooth_sd3", sys.argv[2:])
    else:
        main()
