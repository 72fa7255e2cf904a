#!/usr/bin/env python
"""Trains the demo's small Stable Diffusion 3 pipeline on the picture world, from nothing, and writes demo/tiny-sd3.

    python demo/make/train_checkpoint.py --work FOLDER

Four stages: the VAE, on pictures more varied than the world's; the latents of the training pictures, once; the
VAE's decoder on such latents; and the transformer together with the three text encoders, by the rectified-flow loss.
No stage sees the subject, nor anything that wears its scarf. On one core the transformer takes 57 minutes, the decoder
13, the VAE 8, and drawing and encoding 10: an hour and a half in all.

Each stage keeps its state in the work folder and goes on from there when the program is started again, further than
before where its number of steps is larger. The last two need only the first two, so that with --stage they can run
side by side. With --vae_steps 0 --decoder_steps 0 --steps 0 it writes the pipeline as the states have it.
"""

import argparse
import math
import multiprocessing
import random
import sys
import time
from pathlib import Path

import torch
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

DEMO = Path(__file__).resolve().parent.parent
sys.path.append(str(DEMO))

import world  # noqa: E402

TOKENS = 12  # of a prompt, for each of the three tokenizers
VARIED = 12288  # pictures that the VAE is trained on
PICTURES = 16384  # whose latents, and whose mirrored latents, the transformer is trained on
CAPTION_DROPOUT = 0.1


def varied_picture(number):
    """A picture for the VAE: half are odd, a quarter plain, a quarter of things with a name. None has the subject."""
    draw = random.Random(f"varied {number}")
    if number % 2:
        return world.odd_picture(draw.random())
    return world.picture((world.choose, world.choose_nobody)[number // 2 % 2](draw), draw.random())


def choose_what(number):
    """What the training picture of a number shows: 6 in 10 are plain, 2 somebody with a name, 2 nobody."""
    draw = random.Random(f"what {number}")
    return draw.choices((world.choose, world.choose_named, world.choose_nobody), (6, 2, 2))[0](draw)


def training_picture(number):
    return world.picture(choose_what(number), f"picture {number}")


def draw_pictures(path, kind, count):
    """Pixels (count, SIDE, SIDE, 3) in uint8 of kind(0), kind(1) and so on, on all processors; kept in a file."""
    if not path.is_file():
        with multiprocessing.Pool() as pool:
            rows = [bytearray(picture.tobytes()) for picture in pool.imap(kind, range(count), chunksize=64)]
        save(torch.stack([torch.frombuffer(row, dtype=torch.uint8) for row in rows]), path)
    return torch.load(path, weights_only=True).view(count, world.SIDE, world.SIDE, 3)


def pixels_of(rows):
    """Pixels (B, SIDE, SIDE, 3) in uint8 as (B, 3, SIDE, SIDE) in [-1, 1]."""
    return rows.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def save(state, path):
    """Writes a stage's state so that a kill leaves the old one or the new one."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def cosine(step, steps, peak, warm_up=100):
    """Learning rate of a step: linear warm-up, then a cosine down to nothing."""
    return peak * min(step / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan 2024): these small models learn in a third of AdamW's steps.

    Five rounds of Newton-Schulz bring all singular values of a step near 1; the factor gives the step the size that
    AdamW's would have, so that learning rates are alike (Liu et al. 2025).
    """

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                wanted = parameter.grad.lerp(momentum, 0.95).flatten(1)
                tall = wanted.shape[0] > wanted.shape[1]
                x = wanted.T if tall else wanted
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
                x = (x.T if tall else x).reshape(parameter.shape)
                parameter.add_(x, alpha=-group["lr"] * 0.2 * max(wanted.shape) ** 0.5)


def make_optimizers(model):
    """Muon for the matrices and convolutions within, AdamW for the first and last layers, tables, biases and norms."""
    ends = "embed shared relative conv_in conv_out proj_out".split()
    inner, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim < 2 or any(end in name for end in ends) else inner).append(parameter)
    return Muon(inner), torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def train(path, model, steps, peaks, decay, loss_of):
    """Trains `model` by loss_of(step); its state is kept in a file. Leaves the averaged weights in it.

    `peaks` are the highest learning rates of Muon and AdamW, `decay` is that of the average of the weights.
    """
    optimizers = make_optimizers(model)
    ema, first = EMAModel(model.parameters(), decay=decay, foreach=True), 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
        first = state["step"]
    saved_at = time.time()
    for step in range(first, steps):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = cosine(step + 1, steps, peak)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        if step % 100 == 0:
            print(f"{time.strftime('%H:%M:%S')} {path.stem} {step}: loss {loss.item():.5f}", flush=True)
        if time.time() - saved_at > 60 or step + 1 == steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            save({"model": model.state_dict(), "optimizers": states, "ema": ema.state_dict(), "step": step + 1}, path)
            saved_at = time.time()
    ema.copy_to(model.parameters())
    return model.eval()


def make_vae():
    """SD3's autoencoder, 16 channels and factor 8, narrow where pixels are many and wide where they are few."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 32, 96, 128],
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        sample_size=world.SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def picture_loss(found, wanted):
    """Squared error, a little absolute error, and squared error of the differences to the next pixels: the edges."""
    error = found - wanted
    edges = error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()
    return error.square().mean() + 0.01 * error.abs().mean() + 0.25 * edges


def train_vae(work, rows, steps, batch=4):
    """The VAE, trained on varied pictures by the loss of pictures and a little KL divergence."""
    torch.manual_seed(0)
    vae = make_vae()

    def loss_of(step):
        generator = torch.Generator().manual_seed(step)
        wanted = pixels_of(rows[torch.randint(len(rows), (batch,), generator=generator)])
        wanted = wanted.flip(-1) if step % 2 else wanted
        posterior = vae.encode(wanted).latent_dist
        return picture_loss(vae.decode(posterior.sample(generator)).sample, wanted) + 2e-7 * posterior.kl().mean()

    return train(work / "vae.pt", vae, steps, (4e-3, 2e-3), decay=0.995, loss_of=loss_of)


@torch.no_grad()
def make_latents(path, vae, rows, batch=64):
    """Latents (2N, 16, 8, 8) of N pictures and then of their mirror images, in float16, kept in a file."""
    if not path.is_file():
        both = [*rows.split(batch), *rows.flip(2).split(batch)]
        save(torch.cat([vae.encode(pixels_of(some)).latent_dist.mean.half() for some in both]), path)
    return torch.load(path, weights_only=True)


def train_decoder(work, vae, rows, latents, steps, batch=8):
    """The VAE with its decoder trained on, on fixed latents to which a little noise is added."""
    deviation = latents.float().std()

    def loss_of(step):
        generator = torch.Generator().manual_seed(step)
        chosen, mirrored = torch.randint(len(rows), (batch,), generator=generator), step % 2
        wanted = pixels_of(rows[chosen].flip(2) if mirrored else rows[chosen])
        known = latents[chosen + mirrored * len(rows)].float()
        noise = torch.randn(known.shape, generator=generator)
        return picture_loss(vae.decoder(known + 0.03 * deviation * noise), wanted)

    train(work / "decoder.pt", vae.decoder, steps, (4e-3, 1.5e-3), decay=0.998, loss_of=loss_of)
    return vae


def words():
    """Every word that a caption may hold, the most frequent first, and the names."""
    phrases = " ".join(world.PLACES.values()).split()
    known = ["a", "photo", "of", *phrases, *world.COLOURS, *world.THINGS, *world.NAMES, *world.NOBODY]
    return list(dict.fromkeys(known))


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
    """Every caption of the world, and the empty one."""
    who = [f"a {colour}{thing}" for thing in world.THINGS for colour in ("", *(f"{name} " for name in world.COLOURS))]
    who += [f"{name} {of['thing']}" for name, of in world.NAMED.items()]
    who += [f"{name} {thing}" for name in world.NOBODY for thing in world.THINGS]
    places = ["", *(f" {place}" for place in world.PLACES.values())]
    return ["", *(f"a photo of {this}{place}" for this in who for place in places)]


def tokenize(tokenizer, captions):
    return tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def encode(parts, ids):
    """Embeds (B, S, D) and pooled embeds (B, P) of three tables of ids, as StableDiffusion3Pipeline makes them."""
    clips = [
        parts[f"text_encoder{end}"](rows, output_hidden_states=True) for end, rows in (("", ids[0]), ("_2", ids[1]))
    ]
    t5 = parts["text_encoder_3"](ids[2])[0]
    clip = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
    clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return torch.cat([clip, t5], dim=-2), torch.cat([output.text_embeds for output in clips], dim=-1)


def train_transformer(work, latents, steps, batch=64):
    """The transformer and the text encoders, trained together by the loss of rectified flow."""
    parts, shown = make_parts(), [choose_what(number) for number in range(PICTURES)]
    captions = {caption: number for number, caption in enumerate(all_captions())}
    tables = [tokenize(parts[name], list(captions)) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    latents = (latents.float() - latents.float().mean()) / latents.float().std()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def loss_of(step):
        draw, generator = random.Random(f"transformer {step}"), torch.Generator().manual_seed(step)
        chosen = [draw.randrange(2 * PICTURES) for _ in range(batch)]
        texts = [world.caption(shown[number % PICTURES], draw) for number in chosen]
        rows = [captions["" if draw.random() < CAPTION_DROPOUT else text] for text in texts]
        embeds, pooled = encode(parts, [table[rows] for table in tables])
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        levels = (torch.randn(batch, generator=generator).sigmoid() * len(scheduler.timesteps)).long()
        sigmas = scheduler.sigmas[levels].view(-1, 1, 1, 1)
        velocity = parts["transformer"](
            hidden_states=(1 - sigmas) * clean + sigmas * noise,
            timestep=scheduler.timesteps[levels],
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample
        return (velocity - (noise - clean)).square().mean()

    models = torch.nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)})
    train(work / "transformer.pt", models, steps, (6e-3, 1.5e-3), decay=0.999, loss_of=loss_of)
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="Folder for what an interrupted training goes on from."
    )
    parser.add_argument("--output", type=Path, default=DEMO / "tiny-sd3", help="Where the pipeline is written.")
    parser.add_argument("--vae_steps", type=int, default=1700)
    parser.add_argument("--decoder_steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--stage", choices=("decoder", "transformer"), help="Run the first two stages and this one.")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    varied = draw_pictures(args.work / "varied.pt", varied_picture, VARIED)
    pictures = draw_pictures(args.work / "pictures.pt", training_picture, PICTURES)
    vae = train_vae(args.work, varied, args.vae_steps)
    latents = make_latents(args.work / "latents.pt", vae, pictures)
    if args.stage != "transformer":
        more = make_latents(args.work / "varied_latents.pt", vae, varied)
        both = torch.cat([half for pair in zip(latents.chunk(2), more.chunk(2), strict=True) for half in pair])
        vae = train_decoder(args.work, vae, torch.cat([pictures, varied]), both, args.decoder_steps)
    if args.stage != "decoder":
        parts = train_transformer(args.work, latents, args.steps)
    if args.stage:
        return
    shift, deviation = latents.float().mean().item(), latents.float().std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=1 / deviation)
    pipeline = StableDiffusion3Pipeline(vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipeline.to(dtype=torch.float16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
