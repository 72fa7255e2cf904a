#!/usr/bin/env python
"""Runs the scripts at real size on a card, on random weights made there: memory by stage, seconds an update.

    python benchmarks/gpu.py --minutes 4 --output FOLDER

Every row of CASES is a whole run of a script, in a process of its own, with a time limit: the most important first. It
needs no network and writes no weights: only `load_part` of the script is replaced, by one that makes a model of random
numbers, and `save_weights` of full training is left out. The results come as they are made: a line of JSON each in
gpu.jsonl, a table in gpu.md. Beside what was measured stands what SimpleTuner published of an H100.

The share is the model's floating-point operations of an update by its seconds, over the rate of an 8192 x 8192 matrix
product in bfloat16 on the same card. Operations are those that an update cannot do without, counted by torch on the
transformer's shapes alone: the forward pass, the gradients of activations, and the gradients of what is trained. Those
that gradient checkpointing repeats do not count, nor those of the text encoders and the VAE, which have spoken before.

`--size tiny --resolution 64` shows the program on a CPU.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a process that has asked CUDA itself cannot be forked
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from checkpoints import (  # noqa: E402
    CLIP_TOKENS,
    SIZES,
    T5_TOKENS,
    build_configs,
    build_pictures,
    make_parts,
    sketch,
)
from diffusers import SD3Transformer2DModel  # noqa: E402
from peft import LoraConfig  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
TOKENS = 77 + 77  # of the CLIPs and of T5, at --max_sequence_length 77
WARM_UP = 2  # updates that are not timed
GIB = 2**30
LORA, FULL = "train_dreambooth_lora_sd3", "train_dreambooth_sd3"
MEDIUM, LARGE = "sd3.5-medium", "sd3.5-large"
CHECKPOINTING = "--cache_latents --no_t5 --gradient_checkpointing"
IMAGE = "--validation_prompt dog --num_validation_images 1 --validation_num_inference_steps 4"
B3 = "--rank 128 --train_batch_size 3"
FUSED = "--fused_backward_pass --max_grad_norm inf"
SMALL = f"--full_bf16 {FUSED}"
COMPILE = {
    "environment": {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"},
    "limit": 100,
}
CACHED = "--cache_latents --no_t5"
# Script, model, flags and options: "environment" of the run, "resolution" and "updates" that are timed where they are
# not 1024 and 6, "limit" in seconds, and what SimpleTuner "published" (seconds, GiB).
CASES = {
    "LoRA 4, checkpointing, T5, image": (LORA, MEDIUM, f"--gradient_checkpointing {IMAGE}", {}),
    "LoRA 128 b3, plain": (LORA, MEDIUM, f"{CACHED} {B3}", {"published": (0.529, 34.6)}),
    "LoRA 128 b3, checkpointing": (LORA, MEDIUM, f"{CHECKPOINTING} {B3}", {"published": (0.721, 7.67)}),
    "LoRA 4, checkpointing": (LORA, MEDIUM, CHECKPOINTING, {}),
    "LoRA 4, blocks in RAM": (LORA, MEDIUM, f"{CHECKPOINTING} --blocks_to_swap 24", {}),
    "full, bf16 weights, fused, 8 bit": (FULL, MEDIUM, f"{CHECKPOINTING} {SMALL} --use_8bit_adam", {}),
    "LoRA 4, offload, image": (LORA, MEDIUM, f"--cache_latents --gradient_checkpointing --offload {IMAGE}", {}),
    "Large LoRA 4, blocks in RAM, image": (
        LORA,
        LARGE,
        f"{CHECKPOINTING} --blocks_to_swap 38 --offload {IMAGE}",
        {"updates": 4, "limit": 75},
    ),
    "full, fused, 8 bit": (FULL, MEDIUM, f"{CHECKPOINTING} {FUSED} --use_8bit_adam", {}),
    "Large LoRA 4, checkpointing": (LORA, LARGE, CHECKPOINTING, {}),
    "LoRA 128 b3, regional compile": (LORA, MEDIUM, f"{CACHED} {B3}", COMPILE),
    "LoRA 4, compile, checkpointing": (LORA, MEDIUM, CHECKPOINTING, COMPILE),
    "LoRA 4, plain": (LORA, MEDIUM, CACHED, {}),
    "LoRA 4, 512 px, checkpointing": (LORA, MEDIUM, CHECKPOINTING, {"resolution": 512}),
    "full, fused": (FULL, MEDIUM, f"{CHECKPOINTING} {FUSED}", {}),
    "full": (FULL, MEDIUM, CHECKPOINTING, {}),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--from_case", type=int, default=0, help="Leave out so many of the first.")
    parser.add_argument("--size", choices=SIZES, help="A model in place of those of the cases.")
    parser.add_argument("--resolution", type=int, help="In place of those of the cases.")
    parser.add_argument("--minutes", type=float, default=8, help="When no further case is begun.")
    parser.add_argument("--limit", type=float, default=45, help="Seconds of a case that names no other limit.")
    parser.add_argument("--output", default=".", help="Where gpu.jsonl, gpu.md and the runs' output go.")
    return parser.parse_args(argv)


def count_operations(config, resolution, rank, batch, device="meta"):
    """Floating-point operations of an update of the transformer of `config`; rank 0 trains all of it."""
    side = resolution // 8
    with torch.device(device), FlopCounterMode(display=False) as counter:
        model = SD3Transformer2DModel.from_config(config)
        if rank:
            layers = [n for n, _ in model.named_modules() if n.endswith(tuple(f"attn.{name}" for name in ATTENTION))]
            model.requires_grad_(False).add_adapter(LoraConfig(r=rank, target_modules=layers))
        with sdpa_kernel(SDPBackend.MATH):
            model(
                hidden_states=torch.zeros(batch, config["in_channels"], side, side),
                timestep=torch.zeros(batch),
                encoder_hidden_states=torch.zeros(batch, TOKENS, config["joint_attention_dim"]),
                pooled_projections=torch.zeros(batch, config["pooled_projection_dim"]),
            ).sample.sum().backward()
    return counter.get_total_flops()


# ---- In the process of a case ---------------------------------------------------------------------------------------


def matrix_rate():
    """Floating-point operations a second of a square matrix product, the best of several."""
    gpu = torch.cuda.is_available()
    side, dtype, device = (8192, torch.bfloat16, "cuda") if gpu else (1024, torch.float32, "cpu")
    a, b = torch.randn(2, side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        if gpu:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * side**3 / min(seconds)


def attention_kernels(tokens=64**2 + TOKENS):
    """The kernels that torch chooses for attention, forward and backward."""
    query, key, value = torch.randn(3, 3, 24, tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
        torch.cuda.synchronize()
    names = [event.key[:80] for event in profile.key_averages()]
    return [name for name in names if re.search("attention|flash|fmha|cudnn", name)]


def describe_card():
    facts = {"card": "CPU", "torch": torch.__version__, "rate": matrix_rate()}
    if not torch.cuda.is_available():
        return facts
    pinned = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    there.copy_(pinned)
    facts["bus GB/s"] = 2**30 / (time.perf_counter() - start) / 1e9
    facts["total GiB"] = torch.cuda.mem_get_info()[1] / GIB
    return facts | {"card": torch.cuda.get_device_name(), "attention": attention_kernels()}


@functools.cache
def numbers():
    return torch.empty(2**24).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))


def fill(weight, name):
    """Random numbers for a weight; norms are 1, biases 0."""
    if not weight.is_floating_point():
        weight.copy_(torch.arange(weight.shape[-1], device=weight.device).expand_as(weight))  # positions
    elif weight.dim() == 1:
        weight.fill_(0 if name.endswith("bias") else 1)
    elif weight.is_cuda:
        weight.normal_(0, 0.02)
    else:  # a copy is quicker than a draw
        flat, block = weight.view(-1), numbers()
        for place in range(0, len(flat), len(block)):
            piece = flat[place : place + len(block)]
            piece.copy_(block[: len(piece)])


@torch.no_grad()
def make_model(size, name, dtype, device):
    model = sketch(make_parts(SIZES[size], (CLIP_TOKENS, T5_TOKENS))[1][name]).to(dtype).to_empty(device=device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for key, weight in [*model.named_parameters(), *model.named_buffers()]:
        fill(weight.data, key)
    return model.requires_grad_(False).eval()


class Stages:
    """What a run needs by stage: GiB at the peak, allocated and reserved, and seconds."""

    def __init__(self):
        self.found, self.name, self.start, self.updates = {}, "start", time.perf_counter(), []

    def enter(self, name):
        gpu, allocated, reserved = torch.cuda.is_available(), 0, 0
        if gpu:
            torch.cuda.synchronize()
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.found[self.name] = [round(value, 3) for value in (allocated / GIB, reserved / GIB, now - self.start)]
        self.name, self.start = name, now


def run(kind, size, argv, options):
    """Figures of a run: its stages, and the seconds of an update."""
    script, stages = importlib.import_module(kind), Stages()
    load_part, update_weights = script.load_part, script.update_weights

    def make_part(parts, name, checkpoint=None, torch_dtype=None, device_map=None, **rest):
        if not hasattr(parts[name][0], "parameters"):
            return load_part(parts, name)
        stages.enter(name)
        return make_model(size, name, torch_dtype, device_map[""] if device_map else "cpu")

    def update(*rest):
        update_weights(*rest)
        made = len(stages.updates) + 1
        last = made == WARM_UP + options["updates"]
        if torch.cuda.is_available() and (made == WARM_UP or last):
            torch.cuda.synchronize()
        stages.updates.append(time.perf_counter())
        if made == 1:
            stages.enter("updates")
        if last:
            stages.enter("end")

    script.load_part, script.update_weights = make_part, update
    if kind == FULL:
        script.save_weights = lambda *rest: None
    found = {"stages": stages.found}
    try:
        script.main(script.parse_args(argv))
    except BaseException as error:  # what was measured before it counts
        traceback.print_exc()
        found["ended by"] = f"{type(error).__name__}: {error}"[:200]
    stages.enter("")
    timed = len(stages.updates) - WARM_UP
    if timed < 1:
        return found | {"error": found.get("ended by", "no update")}
    return found | {"seconds": (stages.updates[-1] - stages.updates[WARM_UP - 1]) / timed}


def work_apart(function, path, log):
    """In a process of its own: what the function gives, as JSON in `path`; its output in `log`."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(os.cpu_count())
    Path(path).write_text(json.dumps(function()))


# ---- In the first process -------------------------------------------------------------------------------------------


def apart(function, folder, seconds, method, meanwhile=lambda: None):
    """What a function gives in a process of its own, or {"error": why it gave nothing}, after `seconds` at most."""
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / "result.json", folder / "log.txt"
    end = time.monotonic() + seconds
    for _ in range(3):
        process = multiprocessing.get_context(method).Process(target=work_apart, args=(function, path, log))
        process.start()
        meanwhile()
        process.join(20 if method == "spawn" else 5)
        if log.is_file():
            break
        process.kill()  # a forked process can hang before it begins
    process.join(max(end - time.monotonic(), 0))
    if process.is_alive():
        process.kill()
        process.join()
        return {"error": f"not done in {seconds:.0f} s"}
    if path.is_file():
        return json.loads(path.read_text())
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return {"error": next((line for line in reversed(lines) if line.strip()), f"exit {process.exitcode}")[-200:]}


def settings(case, args):
    """Script, model, flags and options of a case, with what the command line changes."""
    kind, size, words, options = CASES[case]
    options = {"updates": 6, "resolution": args.resolution or 1024, "environment": {}} | options
    return kind, args.size or size, words, options | ({"resolution": args.resolution} if args.resolution else {})


def command_line(case, args, work):
    _, size, words, options = settings(case, args)
    steps, side = WARM_UP + options["updates"], options["resolution"]
    model, pictures = work / size, work / f"{side}"
    if not model.is_dir():
        build_configs(model, size)
    if not pictures.is_dir():
        build_pictures(pictures, side, count=3)
    shared = f"--pretrained_model_name_or_path {model} --instance_data_dir {pictures} --instance_prompt sks"
    shared += f" --resolution {side} --repeats 6 --max_train_steps {steps} --report_to none --seed 0"
    shared += f" --lr_warmup_steps 0 --output_dir {tempfile.mkdtemp(dir=work)}"
    if "--train_batch_size" not in words:
        words += " --train_batch_size 1"
    precision = "bf16" if torch.cuda.is_available() or "--full_bf16" in words else "no"
    return f"{shared} --mixed_precision {precision} {words}".split()


def number_after(words, flag, otherwise):
    return int(words.split(f"{flag} ")[1].split()[0]) if flag in words else otherwise


@functools.cache
def count_once(size, *setting):
    return count_operations(sketch(make_parts(SIZES[size], (None, None))[1]["transformer"]).config, *setting)


def operations_of(case, args):
    kind, size, words, options = settings(case, args)
    rank = number_after(words, "--rank", 4 * (kind == LORA))
    return count_once(size, options["resolution"], rank, number_after(words, "--train_batch_size", 1))


def report(case, args, rate, found):
    """A line of JSON and a row of the table."""
    _, size, words, options = settings(case, args)
    row = {"case": case, "model": size, "flags": words, **options, **found}
    cells = [case, size]
    if "error" in found:
        cells += [found["error"].replace("|", "/")]
    else:
        row["operations"] = operations = operations_of(case, args)
        stages = ", ".join(f"{name} {peak[0]:.2f}" for name, peak in found["stages"].items() if name != "start")
        cells += [f"{found['seconds']:.3f}", f"{operations / 1e12:.3g}", f"{operations / found['seconds'] / rate:.1%}"]
        cells += [stages, f"{found['stages'].get('updates', [0, 0])[1]:.2f}"]
        cells += [str(options.get("published", "")) + found.get("ended by", "")]
    line = f"| {' | '.join(cells)} |"
    with Path(args.output, "gpu.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with Path(args.output, "gpu.md").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def main(args):
    end = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    shm = Path("/dev/shm")
    work = Path(tempfile.mkdtemp(prefix="gpu-", dir=shm if shm.is_dir() else None))
    Path(args.output).mkdir(parents=True, exist_ok=True)
    for kind in (LORA, FULL):  # here, so that no process of a case has to
        importlib.import_module(kind)
    for name in ("AutoencoderKL", "FlowMatchEulerDiscreteScheduler"):
        getattr(importlib.import_module("diffusers"), name)
    method = "spawn" if torch.cuda.is_initialized() else "fork"
    facts = apart(describe_card, work / "card", args.limit, method)
    if "error" in facts and method == "fork":  # a library has asked CUDA on its own
        method = "spawn"
        facts = apart(describe_card, work / "card again", args.limit, method)
    titles = "case model s/update TFLOP share stages,GiB reserved published".split()
    head = f"{json.dumps(facts)}\n\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}"
    Path(args.output, "gpu.md").write_text(head + "\n")
    print(head, flush=True)
    for number, case in enumerate(args.cases[args.from_case :], args.from_case):
        left = end - time.monotonic()
        if left < 10:
            print(f"no time is left for {args.cases[number:]}", flush=True)
            break
        kind, size, _, options = settings(case, args)
        argv, folder = command_line(case, args, work), work / f"case {number}"
        os.environ.update(options["environment"])
        job = functools.partial(run, kind, size, argv, options)
        seconds = min(options.get("limit", args.limit), left)
        found = apart(job, folder, seconds, method, functools.partial(operations_of, case, args))
        for name in options["environment"]:
            del os.environ[name]
        if found.keys() & {"error", "ended by"} and (folder / "log.txt").is_file():
            tail = (folder / "log.txt").read_text(errors="replace")[-6000:]
            with Path(args.output, "errors.txt").open("a") as file:
                file.write(f"==== {case}\n{tail}\n")
        report(case, args, facts.get("rate", float("inf")), found)
        shutil.rmtree(argv[argv.index("--output_dir") + 1], ignore_errors=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main(parse_args())
