"""A random Stable Diffusion 3 pipeline in diffusers layout, written in a second and without a network.

It has everything that a real checkpoint has, only small: both CLIPs, T5, their tokenizers, VAE, transformer,
scheduler. The tests train on it. The tokenizers' files are written here in a form that transformers 4 and 5 both read,
and give the same ids in both.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

# Width and heads of each part. "real" has SD3 Medium's text widths and CLIP heads. There, twice the CLIPs' joint width
# happens to be T5's; in the others it is not, so code that mixes up the batch and the width axis cannot pass. In "odd"
# the encoders' widths share no factor with each other.
PRESETS = {
    "tiny": {"clip": (16, 2), "clip2": (24, 4), "t5": (56, 4), "transformer": (16, 2)},
    "odd": {"clip": (15, 3), "clip2": (22, 2), "t5": (49, 7), "transformer": (36, 3)},
    "real": {"clip": (768, 12), "clip2": (1280, 20), "t5": (4096, 64), "transformer": (64, 4)},
}
WORDS = "a photo of sks dog in bucket the yarn art".split()
CLIP_POSITIONS = 77


def build(folder, preset="tiny", *, t5=True, sd35=False, variant=None, seed=0, layers=2, **widths):
    """Writes a pipeline to `folder` and returns it as a Path; the same arguments write the same weights.

    `widths` replaces widths of the preset: clip_width, clip2_width, t5_width, transformer_width, each a multiple of
    its heads. `sd35` adds what SD3.5 Medium has: a second attention in the first blocks, and normed queries and keys.
    `t5=False` leaves the third encoder out; diffusers loads that with text_encoder_3=None and tokenizer_3=None.
    `variant="fp16"` writes half precision under the names of that variant alone.
    """
    sizes = {name: (widths.pop(f"{name}_width", width), heads) for name, (width, heads) in PRESETS[preset].items()}
    if widths:
        raise TypeError(f"no such widths: {', '.join(widths)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = make_parts(sizes, t5=t5, sd35=sd35, layers=layers)
    pipeline = StableDiffusion3Pipeline(**parts)
    if variant == "fp16":
        pipeline.to(dtype=torch.float16)
    save(pipeline, folder, variant)
    return Path(folder)


def save(pipeline, folder, variant=None):
    """Writes a pipeline with the tokenizers of this file, whichever version of transformers is to read it."""
    pipeline.save_pretrained(folder, variant=variant)
    index = json.loads(Path(folder, "model_index.json").read_text())
    for name, files in TOKENIZERS.items():
        if index[name][0]:
            index[name] = ["transformers", files()[CONFIG]["tokenizer_class"]]
            shutil.rmtree(Path(folder, name))
            write(Path(folder, name), files())
    Path(folder, "model_index.json").write_text(json.dumps(index, indent=2))


def make_parts(sizes, *, t5, sd35, layers):
    """The parts of a pipeline by their names in it."""
    tokenizer, tokenizer_2 = clip_tokenizer(pad_token="<|endoftext|>"), clip_tokenizer(pad_token="!")
    tokenizer_3 = t5_tokenizer() if t5 else None
    return {
        "text_encoder": clip_encoder(*sizes["clip"], len(tokenizer), "quick_gelu"),
        "text_encoder_2": clip_encoder(*sizes["clip2"], len(tokenizer_2), "gelu"),
        "text_encoder_3": t5_encoder(*sizes["t5"], len(tokenizer_3)) if t5 else None,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "tokenizer_3": tokenizer_3,
        "transformer": transformer(sizes, sd35, layers),
        "vae": vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


CONFIG = "tokenizer_config.json"


def clip_files(pad_token):
    """Byte-level BPE of CLIP: bytes, bytes that end a word, a merge for the start of each word, the two marks.

    CLIP-L pads with the end mark and bigG with "!", id 0, as in the real checkpoints.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(dict.fromkeys((word[0], f"{word[1]}{'</w>' * (len(word) == 2)}") for word in WORDS if word[1:]))
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert tokens[0] == "!"
    marks = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1], "pad_token": pad_token}
    return {
        CONFIG: {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_POSITIONS, **marks},
        "vocab.json": {token: number for number, token in enumerate(tokens)},
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
    }


def t5_files():
    """Unigram of T5: pad 0, end 1, unknown 2, then words, likelier than the letters they are made of."""
    letters = [chr(code) for code in range(33, 127)]
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces = [(mark, 0.0) for mark in marks.values()] + [("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS if word != "a"] + [("▁a", -3.0)]
    pieces += [(letter, -6.0) for letter in letters]
    tokenizer, spaces = Tokenizer(models.Unigram(pieces, unk_id=2)), {"replacement": "▁", "prepend_scheme": "always"}
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(split), decoders.Metaspace(**spaces)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.add_special_tokens(list(marks.values()))
    return {
        CONFIG: {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "extra_ids": 0, **marks},
        "tokenizer.json": tokenizer.to_str(),
    }


TOKENIZERS = {
    "tokenizer": lambda: clip_files("<|endoftext|>"),
    "tokenizer_2": lambda: clip_files("!"),
    "tokenizer_3": t5_files,
}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        Path(folder, name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2))


def read(tokenizer_class, files):
    """A tokenizer by its files: what the constructors take differs from version to version."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), files)
        return tokenizer_class.from_pretrained(folder)


def clip_tokenizer(pad_token):
    return read(CLIPTokenizer, clip_files(pad_token))


def t5_tokenizer():
    return read(T5TokenizerFast, t5_files())


def clip_encoder(width, heads, tokens, activation):
    """CLIP's text model. eos_token_id 2 is what the real configs say: pooling takes the highest id, the end mark."""
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * min(width, 64),
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=CLIP_POSITIONS,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config).eval()


def t5_encoder(width, heads, tokens):
    """T5's encoder, whose heads do not add up to its width, so that the real width stays cheap."""
    config = T5Config(
        vocab_size=tokens,
        d_model=width,
        d_kv=4,
        d_ff=2 * min(width, 64),
        num_layers=2,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval()


def transformer(sizes, sd35, layers):
    """Joint transformer for up to 256 px (32 latents, 16 patches a side)."""
    width, heads = sizes["transformer"]
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        caption_projection_dim=width,
        joint_attention_dim=sizes["t5"][0],
        pooled_projection_dim=sizes["clip"][0] + sizes["clip2"][0],
        pos_embed_max_size=16,
        dual_attention_layers=tuple(range(layers // 2)) if sd35 else (),
        qk_norm="rms_norm" if sd35 else None,
    ).eval()


def vae():
    """Autoencoder with SD3's factor 8, 16 channels, shift and scale."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def images(folder, count, size=(80, 64), seed=0, suffix=".png"):
    """Writes `count` pictures, each a gradient of its own colours, and returns their paths in sorted order."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    paths = [folder / f"{number:03}{suffix}" for number in range(count)]
    for path in paths:
        corners = torch.rand(1, 3, 2, 2, generator=generator) * 255
        pixels = torch.nn.functional.interpolate(corners, size[::-1], mode="bilinear", align_corners=True)
        Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy()).save(path)
    return paths
