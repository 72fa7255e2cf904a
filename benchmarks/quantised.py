#!/usr/bin/env python
"""Prints what a smaller base costs: weights, what the graph keeps, how far output and gradients are from float32's.

    OMP_NUM_THREADS=1 python benchmarks/quantised.py

Of the transformer of a random checkpoint with adapters of rank 4 on all attention layers, and then of its T5; MiB.
bitsandbytes quantises on a CPU as well; 8-bit floats are diffusers' `enable_layerwise_casting`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from checkpoints import build_checkpoint
from diffusers import BitsAndBytesConfig, SD3Transformer2DModel
from diffusers.training_utils import cast_training_params
from one_run import quantize_anywhere
from peft import LoraConfig
from transformers import BitsAndBytesConfig as TextBitsAndBytesConfig
from transformers import T5EncoderModel

BITS = {
    "8 bit, bitsandbytes": {"load_in_8bit": True},
    "4 bit (nf4), bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
FLOATS = "8-bit floats, `enable_layerwise_casting`"
LAYERS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
MIB = 2**20


def load_transformer(model, base):
    """The frozen transformer on a base of that kind, with the same adapters each time."""
    config = (
        {"quantization_config": BitsAndBytesConfig(**BITS[base]), "device_map": {"": "cpu"}} if base in BITS else {}
    )
    loaded = SD3Transformer2DModel.from_pretrained(model, subfolder="transformer", dtype=torch.float32, **config)
    loaded.requires_grad_(False)
    if base == FLOATS:
        loaded.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    torch.manual_seed(0)
    weights = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    loaded.add_adapter(LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=False))
    cast_training_params(loaded, torch.float32)
    return loaded, weights


def batch(transformer):
    """A batch of one at 256 px and 77 tokens of T5."""
    config, draw = transformer.config, torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, config.in_channels, 32, 32, generator=draw),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 154, config.joint_attention_dim, generator=draw),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=draw),
    }


def run_update(transformer):
    """Output, the adapters' gradients as one vector, and the bytes that the graph keeps besides the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*transformer.parameters(), *transformer.buffers())}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = transformer(**batch(transformer)).sample
    graph = sum(size for place, size in kept.items() if place not in own)
    transformer.zero_grad()
    output.square().mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])
    return output.detach(), gradients, graph


def distance(tensor, reference):
    return ((tensor.float() - reference).norm() / reference.norm()).item()


def compare_transformers(model):
    print("| base | weights | graph | with checkpointing | relative error of the output | cosine of the gradients |")
    print("|---|---|---|---|---|---|")
    reference = None
    for base in ("float32", *BITS, FLOATS):
        transformer, weights = load_transformer(model, base)
        output, gradients, graph = run_update(transformer)
        transformer.enable_gradient_checkpointing()
        _, _, least = run_update(transformer.train())
        reference = reference or (output, gradients)
        cosine = torch.nn.functional.cosine_similarity(gradients, reference[1], dim=0)
        row = f"{weights / MIB:.0f} | {graph / MIB:.0f} | {least / MIB:.0f} | {distance(output, reference[0]):.3f}"
        print(f"| {base} | {row} | {cosine:.5f} |", flush=True)


@torch.no_grad()
def compare_encoders(model):
    print("\n| T5 | weights | relative error of the embeds |\n|---|---|---|")
    ids, reference = None, None
    for base in ("float32", "bfloat16", *BITS):
        config = {"quantization_config": TextBitsAndBytesConfig(**BITS[base])} if base in BITS else {}
        dtype = torch.bfloat16 if base == "bfloat16" else torch.float32
        encoder = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_3", dtype=dtype, **config).eval()
        if ids is None:
            ids = torch.randint(encoder.config.vocab_size, (1, 77), generator=torch.Generator().manual_seed(0))
        embeds = encoder(ids)[0]
        reference = embeds if reference is None else reference
        weights = sum(parameter.nbytes for parameter in encoder.parameters())
        print(f"| {base} | {weights / MIB:.0f} | {distance(embeds, reference):.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help="Folder for the checkpoint, kept; unset: a temporary one.")
    args = parser.parse_args()
    quantize_anywhere()
    model = build_checkpoint(Path(args.work or tempfile.mkdtemp(prefix="quantised-")) / "small", "small")
    compare_transformers(model)
    compare_encoders(model)


if __name__ == "__main__":
    main()
