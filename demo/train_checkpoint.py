#!/usr/bin/env python
"""Trains the demo's small Stable Diffusion 3 pipeline on the picture world, from nothing, and writes demo/tiny-sd3.

    python demo/train_checkpoint.py --work FOLDER

Four stages: the VAE on pictures; the training pictures and their latents, once; the VAE's decoder on these; and the
transformer together with the three text encoders, by the rectified-flow loss. Each stage keeps its state in the work
folder and goes on from there when the program is started again; the last two need only the first two, so that with
--stage they can run side by side. On one core of a shared machine the transformer took 105 minutes, the decoder 20 and
the rest as much again.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
import world
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import train_dreambooth_sd3 as script  # noqa: E402

TOKENS = 12  # of a prompt, for each of the three tokenizers
PICTURES = 24576  # whose latents the transformer is trained on
DECODED = 8192  # of these, which the decoder is trained on
CAPTION_DROPOUT = 0.1


def pixels_of(pictures):
    """PIL pictures as a float32 tensor (B, 3, SIDE, SIDE) in [-1, 1]."""
    rows = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures]
    return torch.stack(rows).view(-1, world.SIDE, world.SIDE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_pictures(count, seed):
    """What `count` pictures show, and their pixels as uint8 (count, SIDE, SIDE, 3)."""
    draw = random.Random(seed)
    shown = [world.choose(draw) for _ in range(count)]
    rows = [bytearray(world.picture(what, seed * 10**6 + number).tobytes()) for number, what in enumerate(shown)]
    return shown, torch.stack([torch.frombuffer(row, dtype=torch.uint8) for row in rows])


def save(state, path):
    """Writes a stage's state so that a kill leaves the old one or the new one."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def cosine(step, steps, peak, warm_up=100):
    """Learning rate of a step: linear warm-up, then a cosine down to nothing."""
    return peak * min(step / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))


def make_vae():
    """SD3's autoencoder, 16 channels and factor 8, at a width for 64 pixels."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 32, 64],
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        sample_size=world.SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(work, steps, batch=8):
    """The VAE, trained on squared error and a little KL divergence, averaged over the last steps."""
    torch.manual_seed(0)
    vae, path = make_vae().to(memory_format=torch.channels_last), work / "vae.pt"
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMAModel(vae.parameters(), decay=0.995)
    first = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
    saved = time.time()
    for step in range(first, steps):
        draw = random.Random(f"vae {step}")
        x = pixels_of(
            [world.picture(world.choose(draw), draw.random()) for _ in range(batch - 1)]
            + [world.subject_picture(draw.choice(list(world.PLACES)), draw.random())]
        )
        generator = torch.Generator().manual_seed(step)
        posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        error = (vae.decode(posterior.sample(generator=generator)).sample - x).square().mean()
        loss = error + 1e-8 * posterior.kl().mean()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step + 1, steps, 2e-3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(vae.parameters())
        if step % 50 == 0:
            print(f"vae {step}: {10 * math.log10(4 / error.item()):.2f} dB", flush=True)
        if time.time() - saved > 60 or step + 1 == steps:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            save(state | {"step": step + 1}, path)
            saved = time.time()
    ema.copy_to(vae.parameters())
    return vae.eval()


@torch.no_grad()
def make_latents(work, vae, batch=64):
    """What the training pictures show, their latents (PICTURES, 16, 8, 8), and the latents' mean and deviation."""
    path = work / "latents.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    shown, pixels = draw_pictures(PICTURES, seed=1)
    latents = []
    for rows in pixels.split(batch):
        x = rows.view(-1, world.SIDE, world.SIDE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append(vae.encode(x).latent_dist.mean.half())
    latents = torch.cat(latents)
    state = {"shown": shown, "pixels": pixels, "latents": latents}
    state |= {"shift": latents.float().mean().item(), "deviation": latents.float().std().item()}
    save(state, path)
    return state


def train_decoder(work, vae, data, steps, batch=8):
    """The VAE with its decoder trained on, on fixed latents to which a little noise is added."""
    path, first = work / "decoder.pt", 0
    decoder = vae.decoder.train()
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMAModel(decoder.parameters(), decay=0.998)
    if path.is_file():
        state = torch.load(path, weights_only=True)
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
    saved = time.time()
    for step in range(first, steps):
        chosen = torch.randint(DECODED, (batch,), generator=torch.Generator().manual_seed(step))
        x = data["pixels"][chosen].view(-1, world.SIDE, world.SIDE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = data["latents"][chosen].float()
        latents += 0.03 * data["deviation"] * torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
        error = (decoder(latents.contiguous(memory_format=torch.channels_last)) - x).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step + 1, steps, 1.5e-3)
        error.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(decoder.parameters())
        if step % 50 == 0:
            print(f"decoder {step}: {10 * math.log10(4 / error.item()):.2f} dB", flush=True)
        if time.time() - saved > 60 or step + 1 == steps:
            state = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            save(state | {"step": step + 1}, path)
            saved = time.time()
    ema.copy_to(decoder.parameters())
    return vae.eval()


def words():
    """Every word that a caption may hold, the most frequent first, and the name of the subject."""
    phrases = " ".join(world.PLACES.values()).split()
    return list(dict.fromkeys(["a", "photo", "of", *phrases, *world.COLOURS, *world.THINGS, *world.SUBJECT.split()]))


def merge(pieces, merges):
    """A word's pieces after byte-pair merges in their order."""
    for pair in merges:
        merged = []
        for piece in pieces:
            if merged and (merged[-1], piece) == pair:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def clip_tokenizer(pad_token):
    """Byte-level BPE that makes one token of each word: what earlier words' merges leave of it is joined last."""
    symbols, merges = sorted(ByteLevel.alphabet()), []
    for word in words():
        pieces = merge([*word[:-1], f"{word[-1]}</w>"], merges)
        merges += [("".join(pieces[:end]), pieces[end]) for end in range(1, len(pieces))]
    tokens = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=TOKENS)


def t5_tokenizer():
    """Unigram with a piece for each word of the world, and letters for all others."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in words())]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def clip_encoder(width, tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        eos_token_id=2,  # as in the real configs; pooling takes the highest id, the end mark
        bos_token_id=0,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


def make_parts():
    """Transformer and text encoders, untrained, and the tokenizers."""
    torch.manual_seed(0)
    parts = {"tokenizer": clip_tokenizer("<|endoftext|>"), "tokenizer_2": clip_tokenizer("!")}
    parts["tokenizer_3"] = t5_tokenizer()
    parts["text_encoder"] = clip_encoder(48, parts["tokenizer"])
    parts["text_encoder_2"] = clip_encoder(64, parts["tokenizer_2"])
    t5 = T5Config(
        vocab_size=len(parts["tokenizer_3"]),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        is_encoder_decoder=False,
        use_cache=False,
    )
    parts["text_encoder_3"] = T5EncoderModel(t5)
    parts["transformer"] = SD3Transformer2DModel(
        sample_size=world.SIDE // 8,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        caption_projection_dim=128,
        joint_attention_dim=128,
        pooled_projection_dim=112,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return parts


def all_captions():
    """Every caption of the world, each also with the rare word, which means nothing there; and the empty one."""
    captions = [""]
    for thing in world.THINGS:
        for colour in ("", *world.COLOURS):
            for place in ("", *world.PLACES):
                words = ["a photo of a", colour, thing, world.PLACES.get(place, "")]
                captions.append(" ".join(filter(None, words)))
                captions.append(captions[-1].replace(thing, world.SUBJECT.replace("dog", thing)))
    return captions


def draw_caption(what, draw):
    """A picture's caption, sometimes the empty one, and rarely one with the rare word."""
    if draw.random() < CAPTION_DROPOUT:
        return ""
    text = world.caption(what, draw)
    return text.replace(what["thing"], world.SUBJECT.replace("dog", what["thing"])) if draw.random() < 0.03 else text


def encode(parts, ids, rows):
    """Embeds (B, S, D) and pooled embeds (B, P) of the captions in `rows`, in the layout of the scripts."""
    states = []
    for name, table in zip(script.TEXT_ENCODERS, ids, strict=True):
        states.append(script.encode_text(name, parts[name], table[rows]))
    return script.join_embeds(states, parts["transformer"].config.joint_attention_dim)


def train_transformer(work, data, steps, batch=64):
    """The transformer and the text encoders, trained together; all of their weights averaged."""
    parts, path = make_parts(), work / "transformer.pt"
    models = torch.nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)})
    captions = {caption: number for number, caption in enumerate(all_captions())}
    pairs = zip(script.TEXT_ENCODERS, script.TOKENIZERS, strict=True)
    ids = [script.tokenize(name, parts[tokenizer], TOKENS, list(captions), TOKENS)[0] for name, tokenizer in pairs]
    optimizer = torch.optim.AdamW(models.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema, first = EMAModel(models.parameters(), decay=0.999), 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        models.load_state_dict(state["models"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
    levels = script.noise_levels(FlowMatchEulerDiscreteScheduler(shift=3.0), "cpu")
    flags = argparse.Namespace(weighting_scheme="logit_normal", logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    flags.precondition_outputs = 0
    saved = time.time()
    for step in range(first, steps):
        draw, generator = random.Random(f"transformer {step}"), torch.Generator().manual_seed(step)
        chosen = [draw.randrange(PICTURES) for _ in range(batch)]
        rows = torch.tensor([captions[draw_caption(data["shown"][number], draw)] for number in chosen])
        latents = (data["latents"][chosen].float() - data["shift"]) / data["deviation"]
        noise = torch.randn(latents.shape, generator=generator)
        u = script.draw_density(flags, batch, generator)
        embeds, pooled = encode(parts, ids, rows)
        loss = script.flow_losses(flags, parts["transformer"], levels, latents, noise, u, embeds, pooled).mean()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step + 1, steps, 1.5e-3, warm_up=200)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(models.parameters())
        if step % 100 == 0:
            print(f"transformer {step}: loss {loss.item():.4f}", flush=True)
        if time.time() - saved > 60 or step + 1 == steps:
            state = {"models": models.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            save(state | {"step": step + 1}, path)
            saved = time.time()
    ema.copy_to(models.parameters())
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="Folder for what an interrupted training goes on from."
    )
    parser.add_argument("--output", type=Path, default=HERE / "tiny-sd3", help="Where the pipeline is written.")
    parser.add_argument("--vae_steps", type=int, default=1200)
    parser.add_argument("--decoder_steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--stage", choices=("decoder", "transformer"), help="Run the first two stages and this one.")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(args.work, args.vae_steps)
    data = make_latents(args.work, vae)
    if args.stage != "transformer":
        vae = train_decoder(args.work, vae, data, args.decoder_steps)
    if args.stage != "decoder":
        parts = train_transformer(args.work, data, args.steps)
    if args.stage:
        return
    vae.register_to_config(shift_factor=data["shift"], scaling_factor=1 / data["deviation"])
    pipeline = StableDiffusion3Pipeline(vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipeline.to(dtype=torch.float16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
