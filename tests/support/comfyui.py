"""Writes a transformer as ComfyUI and Civitai have it: one file, with the names of Stability's own code."""

import re

import torch
from safetensors.torch import save_file

OUTSIDE = {  # diffusers' names of what is not in a block, and Stability's
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
INSIDE = {  # of a block; a list is joined
    "attn.to_q attn.to_k attn.to_v": "x_block.attn.qkv",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "context_block.attn.qkv",
    "attn2.to_q attn2.to_k attn2.to_v": "x_block.attn2.qkv",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def rename(state):
    """A transformer's state under ComfyUI's names: the inverse of what diffusers does to read such a file."""
    last = max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    names = {f"{ours}{end}": f"{theirs}{end}" for ours, theirs in OUTSIDE.items() for end in ("", ".weight", ".bias")}
    renamed = {names[key]: weight for key, weight in state.items() if key in names}
    for block in range(last + 1):
        for ours, theirs in INSIDE.items():
            for end in ("weight", "bias"):
                keys = [f"transformer_blocks.{block}.{name}.{end}" for name in ours.split()]
                if keys[0] in state:
                    renamed[f"joint_blocks.{block}.{theirs}.{end}"] = torch.cat([state[key] for key in keys])
    # diffusers has the scale before the shift in the two layers that only normalise, Stability the other way around.
    for key in [
        key for key in renamed if re.match(rf"final_layer\.ada|joint_blocks\.{last}\.context_block\.ada", key)
    ]:
        renamed[key] = torch.cat(renamed[key].chunk(2)[::-1])
    return renamed


def write(state, path, prefix="model.diffusion_model."):
    """Writes the file, with a tensor of another part in it where there is a prefix, as in a whole checkpoint."""
    weights = {f"{prefix}{key}": weight.contiguous() for key, weight in rename(state).items()}
    if prefix:
        weights["first_stage_model.decoder.conv_in.bias"] = torch.zeros(8)
    save_file(weights, path)
    return path
