#!/usr/bin/env python
"""Prints what a run needs of a card at the models' real sizes, counted without a card: GiB by stage, and work.

    python benchmarks/fits.py
    python benchmarks/fits.py --sizes sd3.5-medium --resolutions 512 1024 --batches 1 4 --ways "LoRA 4" "all"

The scripts' own functions run on torch's fake tensors, which have a shape and no memory. The bytes of live tensors are
counted at each operator, in blocks of 512 as CUDA's allocator has them, with autocast by CUDA's rules. What the VAE's
convolutions need besides is added as an H100 has shown it (ENCODING, DECODING). Not counted:
CUDA's context, workspaces of kernels and fragmentation, for which a card must have MARGIN more than the count.

In brackets: an update that encodes its latents; drawing, the most and the card with --offload and cached latents.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
import tempfile
import types
import weakref
from importlib import import_module
from pathlib import Path
from unittest import mock

os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from bitsandbytes import functional as bnb  # noqa: E402
from checkpoints import CLIP_TOKENS, REAL_SIZES, SIZES, T5_TOKENS, build_configs, make_parts  # noqa: E402
from checkpoints import sketch as sketch_model  # noqa: E402
from diffusers import BitsAndBytesConfig  # noqa: E402
from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count  # noqa: E402

GIB = 2**30
HALF = torch.bfloat16
CARDS = (8, 12, 16, 24, 48, 80)
MARGIN, SHARE = 1.0, 0.97  # of a card in GB: judged, see the docstring
ENCODING, DECODING = 560, 1930  # bytes a pixel that the convolutions' workspaces have taken beside it on an H100
TOKENS = 77
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=HALF)
FUSED = "--fused_backward_pass --max_grad_norm inf"
WAYS = {  # what is trained: rank of LoRA or 0, and flags, or how the base is kept
    "LoRA 4": (4, ""),
    "LoRA 64": (64, ""),
    "LoRA 4, nf4": (4, "nf4"),
    "LoRA 64, nf4": (64, "nf4"),
    "LoRA 4, all blocks in RAM": (4, "ram"),
    "all": (0, ""),
    "all, 8-bit": (0, "--use_8bit_adam"),
    "all, fused, 8-bit": (0, f"--use_8bit_adam {FUSED}"),
    "all, bf16, fused, 8-bit": (0, f"--use_8bit_adam {FUSED} --full_bf16"),
}


def attention_forward(query, key, value, *rest, **options):
    return sdpa_flop_count(query, key, value)


def attention_backward(gradient, query, key, value, *rest, **options):
    return sdpa_backward_flop_count(query, query, key, value)


ATTENTION = {  # operations of the CPU's kernels, which torch does not count
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def most(need, light):
    """GiB of the largest stage; `light`: with --offload and cached latents."""
    stages = ("text_offloaded", "latents", "update", "drawing_offloaded") if light else ("text", "encoding", "drawing")
    return max(need[stage] for stage in stages)


@functools.cache
def as_on_cuda(aten=torch.ops.aten):
    """Has autocast on the CPU do in float32 what it does so on CUDA; attention keeps the same on both."""
    library = torch.library.Library("aten", "IMPL")

    def in_float32(op, *args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            wide = (arg.float() if getattr(arg, "dtype", None) is HALF else arg for arg in args)
            return op(*wide, **kwargs)

    for op in (aten.layer_norm.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.exp.default):
        library.impl(op, lambda *args, op=op, **kwargs: in_float32(op, *args, **kwargs), "AutocastCPU")
    bnb.create_dynamic_map = lambda *args, **kwargs: torch.empty(256)  # bitsandbytes' reads numbers
    return library  # what is registered lasts as long


class Meter(TorchDispatchMode):
    """Bytes of the storages that live, in blocks of 512, and the most so far."""

    def __init__(self, *models):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()
        for model in models:
            weights = [*model.parameters(), *model.buffers()]
            self.add(weights + [weight.quant_state.absmax for weight in weights if hasattr(weight, "quant_state")])

    def add(self, values):
        for value in tree_iter(values):
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in self.known:
                size = -(-storage.nbytes() // 512) * 512
                self.change(storage._cdata, size)
                weakref.finalize(storage, self.change, storage._cdata, -size)
        self.peak = max(self.peak, self.live)

    def change(self, key, size):
        self.known ^= {key}
        self.live += size

    def restart(self):
        """GiB at the peak, which starts anew."""
        peak, self.peak = self.peak / GIB, self.live
        return peak

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        self.add(result := op(*args, **(kwargs or {})))
        return result


def sketch(size, name, dtype=HALF):
    return (
        sketch_model(make_parts(SIZES[size], (CLIP_TOKENS, T5_TOKENS))[1][name]).to(dtype).requires_grad_(False).eval()
    )


def give_tensors(model):
    """Fake tensors in place of a model's own of the meta device; what was shared stays shared."""
    given = {}
    for store in [store for module in model.modules() for store in (module._parameters, module._buffers)]:
        for name, old in store.items():
            if old is None:
                continue
            four_bit = type(old).__name__ == "Params4bit"
            if old not in given:
                shape, dtype = ((old.numel() // 2, 1), torch.uint8) if four_bit else (old.shape, old.dtype)
                new = torch.empty(shape, dtype=dtype)
                given[old] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
            if four_bit:
                scales = {"absmax": torch.empty(old.numel() // 64), "code": torch.empty(16), "blocksize": 64}
                given[old].quant_state = bnb.QuantState(**scales, shape=old.shape, dtype=HALF, quant_type="nf4")
            store[name] = given[old]
    return model


def bytes_of(model):
    return Meter(model).live / GIB


@functools.cache
def count_text(size):
    """GiB of T5 that encodes a prompt, on the card and layer by layer."""
    t5 = sketch(size, "text_encoder_3")
    with FakeTensorMode(), torch.no_grad():
        with Meter(give_tensors(t5)) as meter:
            t5(torch.zeros(1, TOKENS, dtype=torch.long))
        layer = max(bytes_of(module) for module in t5.modules() if not list(module.children()))
        return meter.peak / GIB, meter.peak / GIB - bytes_of(t5) + layer


@functools.cache
def count_vae(size, px):
    """GiB of the VAE, and at the peaks of encoding and decoding an image."""
    vae = sketch(size, "vae", torch.float32)
    with FakeTensorMode(), torch.no_grad():
        with Meter(give_tensors(vae)) as meter:
            vae.encode(torch.zeros(1, 3, px, px))
            encoding = meter.restart() + ENCODING * px**2 / GIB
            vae.decode(torch.zeros(1, 16, px // 8, px // 8))
        return bytes_of(vae), encoding, meter.restart() + DECODING * px**2 / GIB


def without_streams():
    """For blocks in RAM: there is one kind of fake tensors, so that what comes to the card is a clone."""
    stream = mock.Mock(spec=["wait_event", "wait_stream", "record_event"])
    patches = contextlib.ExitStack()
    for name in ("Stream", "current_stream", "Event"):
        patches.enter_context(mock.patch(f"torch.cuda.{name}", return_value=stream))
    patches.enter_context(mock.patch("torch.cuda.stream", contextlib.nullcontext))
    patches.enter_context(mock.patch("torch.Tensor.pin_memory", torch.Tensor.detach))
    clones = lambda weights, *_, **__: {key: weight.clone() for key, weight in weights.items()}  # noqa: E731
    patches.enter_context(mock.patch("accelerate.utils.send_to_device", clones))
    return patches


@contextlib.contextmanager
def fake_run(size, px, batch, way, checkpointing):
    """A script and its arguments, whose `load_part` gives models on the meta device."""
    rank, changes = WAYS[way]
    script = import_module("train_dreambooth_lora_sd3" if rank else "train_dreambooth_sd3")
    load_part, swapped = script.load_part, getattr(script, "SwappedBlocks", None)

    def sketch_part(parts, name, checkpoint=None, torch_dtype=None, **options):
        model = sketch(size, name, torch_dtype)
        if changes == "nf4":
            model = replace_with_bnb_linear(model, [], quantization_config=NF4).requires_grad_(False)
            model.is_loaded_in_4bit = True
        return model

    with tempfile.TemporaryDirectory() as folder:
        build_configs(Path(folder, "model"), size)
        words = f"--pretrained_model_name_or_path {folder}/model --instance_data_dir {folder} --instance_prompt x"
        words += f" --output_dir {folder}/out --seed 0 --mixed_precision bf16 --resolution {px} --report_to none"
        words += f" --train_batch_size {batch} {changes if changes.startswith('--') else ''}"
        words += f" --rank {rank}" if rank else ""
        words += " --gradient_checkpointing" if checkpointing else ""
        args = script.parse_args(words.split())
        script.load_part, script.SwappedBlocks = sketch_part, lambda *given: None
        try:
            with without_streams():
                yield script, args, swapped
        finally:
            script.load_part, script.SwappedBlocks = load_part, swapped


def count_training(size, px, batch, way, checkpointing, mode=FakeTensorMode):
    """GiB of an update whose optimizer has its state, of a step of drawing after it, and what stays; TFLOP."""
    as_on_cuda()
    vae_config = sketch(size, "vae").config
    with fake_run(size, px, batch, way, checkpointing) as (script, args, swapped):
        accelerator = script.start_accelerator(args)
        accelerator.device_placement = False  # fake tensors cannot be moved in place
        parts = script.read_pipeline(args)
        with torch.device("meta"):
            targets = script.choose_targets(args, parts, accelerator, None)
            models = script.load_trained(args, parts, accelerator, targets, None)
        model = models["transformer"]
        with mode():
            give_tensors(model)
            widths = model.config.joint_attention_dim, model.config.pooled_projection_dim
            text = torch.zeros(batch, 2 * TOKENS, widths[0], dtype=HALF), torch.zeros(batch, widths[1], dtype=HALF)
            scheduler = types.SimpleNamespace(timesteps=torch.zeros(1000), sigmas=torch.ones(1000))
            frozen = types.SimpleNamespace(embed=lambda prompts: text, scheduler=scheduler)
            if WAYS[way][1] == "ram":
                swapped(model.transformer_blocks, accelerator.device)
            trained = script.prepare_models(args, accelerator, models, 100)

            def update():
                moments = torch.zeros(batch, 32, px // 8, px // 8)
                drawn = script.draw_latents(args, vae_config, moments, [0] * batch, torch.device("cpu"))
                losses = script.batch_losses(args, accelerator, trained.models, frozen, ["x"] * batch, drawn)
                accelerator.backward(script.mean_losses(args, losses)["loss"])
                script.clip_gradient(args, accelerator, trained)
                trained.optimizer.step()
                trained.optimizer.zero_grad(set_to_none=True)

            with Meter(model) as meter:
                update()  # makes the optimizer's state
                meter.restart()
                update()
                peak = meter.restart()
                live = meter.live / GIB
                with torch.no_grad(), accelerator.autocast():  # two of a batch, for guidance
                    pair = text[0][:1].expand(2, -1, -1), text[1][:1].expand(2, -1), torch.zeros(2)
                    model.eval()(torch.zeros(2, 16, px // 8, px // 8), *pair)
                step = meter.restart()
                weights = bytes_of(model)
            model.train()
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                update()
    return peak, step, live, weights, counter.get_total_flops() / 1e12


def count(size, px, batch, way, checkpointing):
    """GiB that a run of this kind needs by stage, and the TFLOP of an update."""
    update, step, live, weights, work = count_training(size, px, batch, way, checkpointing)
    if way.endswith("nf4"):  # torch does not see these products, which are those of weights in bfloat16
        *_, work = count_training(size, px, batch, way.removesuffix(", nf4"), checkpointing)
    vae, encoding, decoding = count_vae(size, px)
    text, text_offloaded = count_text(size)
    return {
        "text": text,
        "text_offloaded": text_offloaded,
        "latents": encoding,  # alone on the card
        "update": update,
        "encoding": max(update + vae, live + encoding),  # an update that encodes its latents
        "drawing": max(step + vae, live + decoding),
        "drawing_offloaded": max(step, live - weights + decoding),
        "work": work,
    }


def card_for(need):
    return next((f"{card}" for card in CARDS if need + MARGIN <= SHARE * card), "more")


def settings(args):
    """Size, pixels, batch, way, gradient checkpointing of the table's rows: those that a reader may ask for."""
    for size, way, px, batch, again in itertools.product(args.sizes, WAYS, args.resolutions, args.batches, (1, 0)):
        plain_lora = way in ("LoRA 4", "LoRA 64")
        if way in args.ways and (plain_lora or (again and batch == 1 and ("LoRA" in way or size != "sd3-medium"))):
            yield size, px, batch, way, bool(again)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=REAL_SIZES, default=REAL_SIZES)
    parser.add_argument("--resolutions", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", help="A file that gets a line for each row; rows that it has are not counted again.")
    return parser.parse_args(argv)


def counted(args):
    """Rows and what they need; those of the file are not counted again."""
    path = Path(args.json or os.devnull)
    known = {tuple(row): need for row, need in map(json.loads, path.open() if path.is_file() else ())}
    for row in settings(args):
        if row not in known:
            known[row] = count(*row)
            with path.open("a") as file:
                file.write(json.dumps([row, known[row]]) + "\n")
        yield row, known[row]


def main(args):
    print("| model | trained | px | batch | checkpointing | update | drawing | most | card, GB | TFLOP |")
    print(f"|{'---|' * 10}", flush=True)
    for (size, px, batch, way, again), need in counted(args):
        plain, light = most(need, False), most(need, True)
        cells = [size, way, px, batch, "yes" if again else "no", f"{need['update']:.1f} ({need['encoding']:.1f})"]
        cells += [f"{need['drawing']:.1f} ({need['drawing_offloaded']:.1f})", f"{plain:.1f} ({light:.1f})"]
        cells += [f"{card_for(plain)} ({card_for(light)})", f"{need['work']:.1f}"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main(parse_args())
