#!/usr/bin/env python
"""Trains the demo's small Stable Diffusion 3 pipeline on the picture world, from nothing, and writes demo/tiny-sd3.

    python demo/make/train_checkpoint.py --work FOLDER --varied 32768 --pictures 65536 \\
        --vae_steps inf --decoder_steps inf --steps inf --vae_minutes 1.1 --decoder_minutes 0.5 --minutes 4.2

This command wrote the committed pipeline in 372 s on an H100 with 16 cores: 15 s to draw pictures, 66 s for the VAE
(3,947 steps), 5 s for latents, 31 s for the decoder (3,496 steps) and 255 s for the transformer (11,181 steps). The
tokenizers' files are older: transformers 5.17 writes truncation and padding into them.

Four stages: the VAE, on pictures more varied than the world's; the latents of the training pictures, once; the
VAE's decoder on such latents; and the transformer together with the three text encoders, by the rectified-flow loss.
No stage sees the subject, nor anything that wears its scarf.

A stage ends after a number of steps or of minutes, whichever is first; its learning rate falls to nothing until then.
It keeps its state in the work folder and goes on from there when the program is started again, further than before
where its limit is larger, on a GPU or on none. With --vae_steps 0 --decoder_steps 0 --steps 0 it writes the pipeline
as the states have it. On a GPU batches are larger, and a step is recorded as a CUDA graph: these models are so small
that launching their kernels would take most of the time.
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
CAPTION_DROPOUT = 0.1
BATCH = {
    "cpu": {"vae": 4, "latents": 64, "decoder": 8, "transformer": 64},
    "cuda": {"vae": 64, "latents": 1024, "decoder": 64, "transformer": 512},
}


def varied_picture(number):
    """A picture for the VAE: half are odd, a quarter plain, a quarter of things with a name. None has the subject."""
    draw = random.Random(f"varied {number}")
    if number % 2:
        return world.odd_picture(draw.random()).tobytes()
    return world.picture((world.choose, world.choose_nobody)[number // 2 % 2](draw), draw.random()).tobytes()


def choose_what(number):
    """What the training picture of a number shows: 6 in 10 are plain, 2 somebody with a name, 2 nobody."""
    draw = random.Random(f"what {number}")
    return draw.choices((world.choose, world.choose_named, world.choose_nobody), (6, 2, 2))[0](draw)


def training_picture(number):
    return world.picture(choose_what(number), f"picture {number}").tobytes()


class Pictures:
    """Pixels (count, SIDE, SIDE, 3) in uint8 of kind(0), kind(1) and so on; kept in a file.

    They are drawn by the processes of `pool` while the program goes on, until it asks for them.
    """

    def __init__(self, pool, path, kind, count):
        self.path, self.count = path, count
        self.drawing = None if path.is_file() else pool.map_async(kind, range(count), chunksize=64)

    def get(self):
        if self.drawing:
            save(torch.frombuffer(bytearray().join(self.drawing.get()), dtype=torch.uint8), self.path)
        return torch.load(self.path, weights_only=True).view(self.count, world.SIDE, world.SIDE, 3)


def pixels_of(rows):
    """Pixels (B, SIDE, SIDE, 3) in uint8 as (B, 3, SIDE, SIDE) in [-1, 1]."""
    return rows.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def save(state, path):
    """Writes a stage's state so that a kill leaves the old one or the new one."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def mirror_some(pixels):
    """Pixels (B, 3, H, W), each picture mirrored or not, and which are."""
    mirrored = torch.rand(len(pixels), device=pixels.device) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels), mirrored


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan 2024): these small models learn in a third of AdamW's steps.

    Five rounds of Newton-Schulz bring all singular values of a step near 1; the factor gives the step the size that
    AdamW's would have, so that learning rates are alike (Liu et al. 2025). Parameters of one shape go together.
    """

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for shape in {parameter.shape: None for parameter in group["params"]}:
            alike = [parameter for parameter in group["params"] if parameter.shape == shape]
            momenta = [
                self.state[parameter].setdefault("momentum", torch.zeros_like(parameter)) for parameter in alike
            ]
            grads = [parameter.grad for parameter in alike]
            torch._foreach_lerp_(momenta, grads, 0.05)
            wanted = torch.stack(torch._foreach_lerp(grads, momenta, 0.95)).flatten(2)
            tall = wanted.shape[1] > wanted.shape[2]
            x = wanted.mT if tall else wanted
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            x = x.bfloat16() if x.is_cuda else x
            for _ in range(5):
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
            x = (x.mT if tall else x).float() * (-0.2 * max(wanted.shape[1:]) ** 0.5 * group["lr"])
            torch._foreach_add_(alike, list(x.reshape(len(alike), *shape).unbind()))


def make_optimizers(model):
    """Muon for the matrices and convolutions within, AdamW for the first and last layers, tables, biases and norms."""
    ends = "embed shared relative conv_in conv_out proj_out".split()
    inner, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim < 2 or any(end in name for end in ends) else inner).append(parameter)
    device = others[0].device
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True, "capturable": device.type == "cuda"}
    optimizers = Muon(inner), torch.optim.AdamW(others, 0.0, **settings)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = torch.zeros((), device=device)  # a tensor, which a CUDA graph reads anew
    return optimizers


def make_update(loss_of, model, optimizers, record):
    """A step of training as a function that returns the loss; recorded, it is one CUDA graph that is replayed."""
    parameters = list(model.parameters())

    def update():
        model.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    if not record:
        return update
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what libraries set up at their first calls must not be recorded
        for _ in range(3):
            update()  # the learning rates are still nought
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        loss = update()

    def replay():
        graph.replay()
        return loss

    return replay


class Limit:
    """When a stage ends: after steps or minutes, whichever comes first."""

    def __init__(self, steps, minutes):
        self.steps, self.minutes = steps, minutes

    def progress(self, step, seconds):
        """The share of a stage that is done; 1 ends it."""
        if step >= self.steps or seconds >= 60 * self.minutes:
            return 1.0
        return max(step / self.steps, seconds / (60 * self.minutes))


def rate(step, progress, warm_up=100):
    """The learning rate's share of its peak: linear warm-up, then a cosine down to nothing."""
    return min(step / warm_up, 0.5 + 0.5 * math.cos(math.pi * progress))


def train(path, model, loss_of, limit, peaks, decay, record=False):
    """Trains `model` by loss_of(); its state is kept in a file. Leaves the averaged weights in it.

    `peaks` are the highest learning rates of Muon and AdamW, `decay` is that of the average of the weights.
    """
    parameters, optimizers = list(model.parameters()), make_optimizers(model)
    average = [parameter.detach().clone() for parameter in parameters]
    step, before, update, started = 0, 0.0, None, time.time()
    if path.is_file():
        state = torch.load(path, map_location=parameters[0].device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
        average, step, before = state["average"], state["step"], state["seconds"]
    torch.manual_seed(step)
    saved_at = time.time()
    while (progress := limit.progress(step, before + time.time() - started)) < 1:
        update = update or make_update(loss_of, model, optimizers, record)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"].fill_(peak * rate(step + 1, progress))
        loss = update()
        step += 1
        torch._foreach_lerp_(
            average, [parameter.detach() for parameter in parameters], 1 - min(decay, step / (step + 9))
        )
        if step % 100 == 1:
            report(path, step, loss)
        if time.time() - saved_at > 60:
            save_training(path, model, optimizers, average, step, before + time.time() - started)
            saved_at = time.time()
    if update:
        report(path, step, loss)
        save_training(path, model, optimizers, average, step, before + time.time() - started)
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.data.copy_(mean)
    return model.eval()


def report(path, step, loss):
    print(f"{time.strftime('%H:%M:%S')} {path.stem} {step}: loss {loss.item():.5f}", flush=True)
    if not loss.isfinite():
        raise SystemExit(f"{path.stem}: the loss is no longer finite; the state of before is kept")


def save_training(path, model, optimizers, average, step, seconds):
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    state = {"model": model.state_dict(), "optimizers": states, "average": average, "step": step, "seconds": seconds}
    save(state, path)


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


def train_vae(path, rows, batch, **how):
    """The VAE, trained on varied pictures by the loss of pictures and a little KL divergence."""
    torch.manual_seed(0)
    vae = make_vae().to(rows.device)

    def loss_of():
        wanted, _ = mirror_some(pixels_of(rows[torch.randint(len(rows), (batch,), device=rows.device)]))
        posterior = vae.encode(wanted).latent_dist
        found = vae.decode(posterior.sample()).sample
        return picture_loss(found.float(), wanted) + 2e-7 * posterior.kl().mean()

    return train(path, vae, loss_of, peaks=(4e-3, 2e-3), decay=0.998, **how)


@torch.no_grad()
def make_latents(path, vae, rows, batch):
    """Latents (2N, 16, 8, 8) of N pictures and then of their mirror images, in float16, kept in a file."""
    if not path.is_file():
        both = [*rows.split(batch), *rows.flip(2).split(batch)]
        save(torch.cat([vae.encode(pixels_of(some)).latent_dist.mean.half() for some in both]), path)
    return torch.load(path, map_location=rows.device, weights_only=True)


def train_decoder(path, vae, rows, latents, batch, **how):
    """The VAE with its decoder trained on, on fixed latents to which a little noise is added."""
    deviation = latents.float().std()

    def loss_of():
        chosen = torch.randint(len(rows), (batch,), device=rows.device)
        wanted, mirrored = mirror_some(pixels_of(rows[chosen]))
        known = latents[chosen + mirrored * len(rows)].float()
        return picture_loss(vae.decoder(known + 0.03 * deviation * torch.randn_like(known)).float(), wanted)

    train(path, vae.decoder, loss_of, peaks=(4e-3, 1.5e-3), decay=0.998, **how)
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
        patch_size=1,
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


def caption_rows(pictures):
    """For each picture, rows of all_captions(): whole, without colour, without place, without both; the empty one."""
    row = {text: number for number, text in enumerate(all_captions())}
    left_out = (), ("colour",), ("place",), ("colour", "place")
    shown = [choose_what(number) for number in range(pictures)]
    return torch.tensor([[*(row[world.caption(what, parts)] for parts in left_out), row[""]] for what in shown])


def train_transformer(path, latents, batch, **how):
    """The transformer and the text encoders, trained together by the loss of rectified flow."""
    parts, device, captions = make_parts(), latents.device, all_captions()
    models = torch.nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)})
    models.to(device)
    tables = [tokenize(parts[name], captions).to(device) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    rows = caption_rows(len(latents) // 2).to(device)
    odds = torch.tensor([[world.LEFT_OUT], [world.LEFT_OUT], [CAPTION_DROPOUT]], device=device)
    latents = (latents.float() - latents.float().mean()) / latents.float().std()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    all_sigmas, timesteps = scheduler.sigmas.to(device), scheduler.timesteps.to(device)

    def loss_of():
        chosen = torch.randint(len(latents), (batch,), device=device)
        no_colour, no_place, empty = torch.rand(3, batch, device=device) < odds
        texts = rows[chosen % len(rows), torch.where(empty, 4, no_colour + 2 * no_place)]
        clean, noise = latents[chosen], torch.randn(batch, *latents.shape[1:], device=device)
        levels = (torch.randn(batch, device=device).sigmoid() * len(timesteps)).long()
        sigmas = all_sigmas[levels].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            embeds, pooled = encode(parts, [table[texts] for table in tables])
            velocity = parts["transformer"](
                hidden_states=(1 - sigmas) * clean + sigmas * noise,
                timestep=timesteps[levels],
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
            ).sample
        return (velocity.float() - (noise - clean)).square().mean()

    train(path, models, loss_of, peaks=(6e-3, 1.5e-3), decay=0.999, **how)
    return parts


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="Folder for what a stage goes on from.")
    parser.add_argument("--output", type=Path, default=DEMO / "tiny-sd3", help="Where the pipeline is written.")
    parser.add_argument("--varied", type=int, default=12288, help="Pictures that the VAE is trained on.")
    parser.add_argument("--pictures", type=int, default=16384, help="Pictures that the transformer is trained on.")
    for prefix, steps in (("vae_", 1700), ("decoder_", 3000), ("", 7500)):
        parser.add_argument(
            f"--{prefix}steps", type=float, default=steps, help="Most steps of the stage; inf for any."
        )
        parser.add_argument(f"--{prefix}minutes", type=float, default=math.inf, help="Most minutes of the stage.")
    parser.add_argument("--stage", choices=("decoder", "transformer"), help="Run the first two stages and this one.")
    parser.add_argument("--device", choices=BATCH, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_graphs", action="store_true", help="On a GPU, launch every kernel of every step.")
    return parser.parse_args()


def main():
    args, start = arguments(), time.time()
    work, device, batch = args.work, torch.device(args.device), BATCH[args.device]
    record = device.type == "cuda" and not args.no_graphs
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # NaN on an H100 with torch 2.11

    def say(what):
        print(f"{time.time() - start:.0f} s: {what}", flush=True)

    with multiprocessing.Pool() as pool:
        varied = Pictures(pool, work / "varied.pt", varied_picture, args.varied)
        pictures = Pictures(pool, work / "pictures.pt", training_picture, args.pictures)
        varied = varied.get().to(device)
        say("the VAE's pictures are drawn")
        limit = Limit(args.vae_steps, args.vae_minutes)
        vae = train_vae(work / "vae.pt", varied, batch["vae"], limit=limit, record=record)
        say("the VAE is trained")
        pictures = pictures.get().to(device)
    latents = make_latents(work / "latents.pt", vae, pictures, batch["latents"])
    say("latents are made")
    if args.stage != "transformer":
        more = make_latents(work / "varied_latents.pt", vae, varied, batch["latents"])
        both = torch.cat([half for pair in zip(latents.chunk(2), more.chunk(2), strict=True) for half in pair])
        rows, limit = torch.cat([pictures, varied]), Limit(args.decoder_steps, args.decoder_minutes)
        train_decoder(work / "decoder.pt", vae, rows, both, batch["decoder"], limit=limit, record=record)
        say("the decoder is trained")
    if args.stage != "decoder":
        limit = Limit(args.steps, args.minutes)
        parts = train_transformer(work / "transformer.pt", latents, batch["transformer"], limit=limit, record=record)
        say("the transformer is trained")
    if args.stage:
        return
    shift, deviation = latents.float().mean().item(), latents.float().std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=1 / deviation)
    pipeline = StableDiffusion3Pipeline(vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipeline.to("cpu", dtype=torch.float16).save_pretrained(args.output)
    say(f"written to {args.output}")


if __name__ == "__main__":
    main()
