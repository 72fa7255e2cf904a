"""Random SD3 pipelines of several sizes, and pictures, for the benchmarks.

"small" keeps SD3's proportions at a size that a CPU trains: 53 million parameters in the transformer, 2.4 times as
many in T5. The real sizes have the shapes of SD3 Medium and SD3.5 Medium in bfloat16, without T5 (10 GB that a run has
freed before it trains), and are for a GPU.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tiny_sd3  # noqa: E402

# transformer: blocks, heads of 64, blocks with a second attention, side of the latents that it draws unasked;
# CLIPs: width, layers, heads; T5: width, inner width, layers; VAE: channels of its first level
SIZES = {
    "tiny": {"transformer": (2, 1, 0, 32), "clip": (32, 2, 2), "clip2": (64, 2, 2), "t5": (128, 256, 2), "vae": 16},
    "small": {
        "transformer": (10, 6, 0, 32),
        "clip": (256, 4, 4),
        "clip2": (512, 6, 8),
        "t5": (1024, 2816, 10),
        "vae": 32,
    },
    "sd3-medium": {
        "transformer": (24, 24, 0, 128),
        "clip": (768, 12, 12),
        "clip2": (1280, 32, 20),
        "t5": None,
        "vae": 128,
    },
}
SIZES["sd3.5-medium"] = SIZES["sd3-medium"] | {"transformer": (24, 24, 13, 128)}


def clip(width, layers, heads, tokens):
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config)


def transformer(blocks, heads, dual, side, joint, pooled):
    return SD3Transformer2DModel(
        sample_size=side,
        num_layers=blocks,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        joint_attention_dim=joint,
        pooled_projection_dim=pooled,
        pos_embed_max_size=192,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm" if dual else None,
    )


def vae(width):
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[width, 2 * width, 4 * width, 4 * width],
        layers_per_block=2,
        norm_num_groups=min(32, width),
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_checkpoint(folder, size):
    """Writes the pipeline of a size to `folder`, unless it is there. Returns the folder."""
    folder, shape = Path(folder), SIZES[size]
    if Path(folder, "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    if shape["t5"] is None:
        torch.set_default_dtype(torch.bfloat16)
    tokenizers = [tiny_sd3.clip_tokenizer("<|endoftext|>"), tiny_sd3.clip_tokenizer("!"), tiny_sd3.t5_tokenizer()]
    width, inner, layers = shape["t5"] or (4096, 0, 0)
    t5 = T5Config(
        vocab_size=len(tokenizers[2]), d_model=width, d_ff=inner, num_layers=layers, num_heads=width // 64, d_kv=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer(*shape["transformer"], width, shape["clip"][0] + shape["clip2"][0]),
        vae=vae(shape["vae"]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(*shape["clip"], len(tokenizers[0])),
        text_encoder_2=clip(*shape["clip2"], len(tokenizers[1])),
        text_encoder_3=T5EncoderModel(t5) if shape["t5"] else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=tokenizers[2] if shape["t5"] else None,
    )
    torch.set_default_dtype(torch.float32)
    pipeline.save_pretrained(folder)
    return folder


def build_pictures(folder, side, captions=False, count=5):
    """Writes pictures to `folder`, with captions as imagefolder has them. Returns the folder."""
    folder = Path(folder)
    paths = tiny_sd3.images(folder, count, size=(side, side))
    if captions:
        rows = [{"file_name": path.name, "text": f"a photo of dog {number}"} for number, path in enumerate(paths)]
        Path(folder, "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
