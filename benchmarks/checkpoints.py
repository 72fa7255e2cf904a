"""Random SD3 pipelines of several sizes, and pictures, for the benchmarks.

"small" keeps SD3's proportions at a size that a CPU trains: 53 million parameters in the transformer, 2.4 times as
many in T5. The real sizes have the shapes and files of SD3 Medium, SD3.5 Medium and SD3.5 Large in bfloat16. Their
weights go from one block of random numbers straight into the files, so that 16 to 28 GB take as long as the disk needs
and next to no memory; the text encoders and the VAE are the same in all three and are written once.
"""

import json
import math
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/support"))

import tiny_sd3  # noqa: E402

# transformer: blocks, heads of 64, blocks with a second attention, normed queries and keys, rows of the table of
# positions, side of the latents that it draws unasked; CLIPs: width, layers, heads; T5: width, inner width, layers;
# VAE: channels of its first level
REAL = {"clip": (768, 12, 12), "clip2": (1280, 32, 20), "t5": (4096, 10240, 24), "vae": 128}
SIZES = {
    "tiny": {
        "transformer": (2, 1, 0, None, 192, 32),
        "clip": (32, 2, 2),
        "clip2": (64, 2, 2),
        "t5": (128, 256, 2),
        "vae": 16,
    },
    "small": {
        "transformer": (10, 6, 0, None, 192, 32),
        "clip": (256, 4, 4),
        "clip2": (512, 6, 8),
        "t5": (1024, 2816, 10),
        "vae": 32,
    },
    "sd3-medium": REAL | {"transformer": (24, 24, 0, None, 192, 128)},
    "sd3.5-medium": REAL | {"transformer": (24, 24, 13, "rms_norm", 384, 128)},
    "sd3.5-large": REAL | {"transformer": (38, 38, 0, "rms_norm", 192, 128)},
}
REAL_SIZES = [size for size, shape in SIZES.items() if shape["clip"] == REAL["clip"]]
CLIP_TOKENS, T5_TOKENS = 49408, 32128  # of the real vocabularies; the tokenizers beside them know few words
SHARD = 5 * 10**9  # bytes of a file of weights at most, as in the real checkpoints


def clip(width, layers, heads, tokens, activation):
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config)


def t5(width, inner, layers, tokens):
    config = T5Config(
        vocab_size=tokens, d_model=width, d_ff=inner, num_layers=layers, num_heads=width // 64, d_kv=64,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def transformer(blocks, heads, dual, norm, positions, side, joint, pooled):
    return SD3Transformer2DModel(
        sample_size=side,
        num_layers=blocks,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        joint_attention_dim=joint,
        pooled_projection_dim=pooled,
        pos_embed_max_size=positions,
        dual_attention_layers=tuple(range(dual)),
        qk_norm=norm,
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


def make_parts(shape, vocabularies):
    """The parts of a pipeline that are no models, and functions that make those that are, by their names in it."""
    clip_tokens, t5_tokens = vocabularies
    joint, pooled = shape["t5"][0], shape["clip"][0] + shape["clip2"][0]
    light = {
        "tokenizer": tiny_sd3.clip_tokenizer("<|endoftext|>"),
        "tokenizer_2": tiny_sd3.clip_tokenizer("!"),
        "tokenizer_3": tiny_sd3.t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    models = {
        "text_encoder": lambda: clip(*shape["clip"], clip_tokens or len(light["tokenizer"]), "quick_gelu"),
        "text_encoder_2": lambda: clip(*shape["clip2"], clip_tokens or len(light["tokenizer_2"]), "gelu"),
        "text_encoder_3": lambda: t5(*shape["t5"], t5_tokens or len(light["tokenizer_3"])),
        "vae": lambda: vae(shape["vae"]),
        "transformer": lambda: transformer(*shape["transformer"], joint, pooled),
    }
    return light, models


def write_tensors(path, tensors, block):
    """Writes a safetensors file of bfloat16 tensors {name: shape}: norms are 1, biases 0, and the rest is cut from
    `block`, random numbers, at a place that moves on. The file is never in memory."""
    header, end, place = {"__metadata__": {"format": "pt"}}, 0, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            left = 2 * math.prod(shape)
            if len(shape) == 1:
                value = torch.zeros if name.endswith("bias") else torch.ones
                file.write(value(shape, dtype=torch.bfloat16).view(torch.uint8).numpy())
                continue
            while left:
                piece = block[place : place + left]
                file.write(piece)
                place, left = (place + len(piece)) % len(block), left - len(piece)


def sketch(make):
    """A model without weights, on the meta device."""
    with torch.device("meta"):
        return make()


def write_config(folder, model):
    if hasattr(model, "save_config"):
        model.save_config(folder)
        return
    model.config.save_pretrained(folder)
    config = json.loads(Path(folder, "config.json").read_text())
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    Path(folder, "config.json").write_text(json.dumps(config, indent=2))


def write_weights(folder, model, block):
    """Writes random weights for a model, in files of up to SHARD bytes."""
    once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # T5 names its table twice
    shards = [{}]
    for name, tensor in model.state_dict().items():
        if name not in once:
            continue
        if sum(2 * math.prod(shape) for shape in [*shards[-1].values(), tensor.shape]) > SHARD:
            shards.append({})
        shards[-1][name] = tuple(tensor.shape)
    stem = "diffusion_pytorch_model" if hasattr(model, "save_config") else "model"
    count, files = len(shards), {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"
        write_tensors(Path(folder, name), shard, block)
        files |= dict.fromkeys(shard, name)
    if count > 1:
        index = {"metadata": {}, "weight_map": files}
        Path(folder, f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def build_light(folder, size):
    """Writes of a pipeline what has no weights. Returns its models, on the meta device, and the text of its index."""
    light, models = make_parts(SIZES[size], (CLIP_TOKENS, T5_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in light.items():
        part.save_pretrained(folder / name)
    models = {name: sketch(make) for name, make in models.items()}
    libraries = {name: "transformers" if name.startswith("text") else "diffusers" for name in models}
    libraries |= {name: type(part).__module__.partition(".")[0] for name, part in light.items()}
    classes = {name: [libraries[name], type(part).__name__] for name, part in (models | light).items()}
    absent = dict.fromkeys(("image_encoder", "feature_extractor"), [None, None])
    index = {"_class_name": "StableDiffusion3Pipeline", **classes, **absent}
    return models, json.dumps(index, indent=2)


def build_configs(folder, size):
    """Writes a pipeline whose models have a config and no weights. Returns the folder."""
    models, index = build_light(folder, size)
    for name, model in models.items():
        (folder / name).mkdir(exist_ok=True)
        write_config(folder / name, model)
    Path(folder, "model_index.json").write_text(index)
    return folder


def build_real(folder, size):
    """Writes a pipeline of a real size; what the sizes share lies beside it, in `shared`."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(2**24, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    block = numbers.view(torch.uint8).numpy().data
    models, index = build_light(folder, size)
    for name, model in models.items():
        place = folder / name if name == "transformer" else folder.parent / "shared" / name
        if not place.is_dir():
            partial = place.with_name(f".{name}")
            partial.mkdir(parents=True)
            write_config(partial, model)
            write_weights(partial, model, block)
            partial.rename(place)
        if name != "transformer":
            (folder / name).symlink_to(Path("..", "shared", name))
    Path(folder, "model_index.json").write_text(index)


def build_checkpoint(folder, size):
    """Writes the pipeline of a size to `folder`, unless it is there. Returns the folder."""
    folder = Path(folder)
    if Path(folder, "model_index.json").is_file():
        return folder
    if size in REAL_SIZES:
        build_real(folder, size)
        return folder
    torch.manual_seed(0)
    light, models = make_parts(SIZES[size], (None, None))
    StableDiffusion3Pipeline(**light, **{name: make() for name, make in models.items()}).save_pretrained(folder)
    return folder


def build_pictures(folder, side, captions=False, count=5):
    """Writes pictures to `folder`, with captions as imagefolder has them. Returns the folder."""
    folder = Path(folder)
    paths = tiny_sd3.images(folder, count, size=(side, side))
    if captions:
        rows = [{"file_name": path.name, "text": f"a photo of dog {number}"} for number, path in enumerate(paths)]
        Path(folder, "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
