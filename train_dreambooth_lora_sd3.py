#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate==1.15.0",
#     "diffusers==0.42.1",
#     "huggingface_hub==2.4.0",
#     "numpy==2.4.6",
#     "peft==0.21.2",
#     "pillow==13.0.0",
#     "protobuf==7.36.2",
#     "psutil==7.2.2",
#     "safetensors==0.8.0",
#     "sentencepiece==0.2.3",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "transformers==5.23.0",
#     "Jinja2==3.1.6",
#     "datasets==5.2.0",
#     "prodigyopt==1.1.2",
#     "bitsandbytes==0.50.2",
#     "wandb==0.31.0",
# ]
# ///
"""DreamBooth training of LoRA adapters on Stable Diffusion 3 and 3.5, with the rectified-flow loss of the SD3 paper.

One GPU, then all the GPUs that `accelerate config` was told of:

    accelerate launch train_dreambooth_lora_sd3.py --mixed_precision bf16 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir dog-lora
    accelerate launch --multi_gpu train_dreambooth_lora_sd3.py ...

A run writes into output_dir: pytorch_lora_weights.safetensors, the model card README.md with its images, checkpoint-N/
(resume with --resume_from_checkpoint latest), validation/ and the trackers' logs/.

Shapes in the comments: B images of a batch (instance images first, then class images), C latent channels, h and w the
latent's height and width (pixels / 8), S text tokens, D joint width, P pooled width. sigma is the noise level in
[0, 1], a step is one update of the optimizer.

The twin, train_dreambooth_sd3.py, trains the whole transformer; `diff` of the two files shows what LoRA is.
"""

import argparse
import atexit
import contextlib
import csv
import errno
import fnmatch
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import weakref
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

TRAINED_ENCODERS = ("text_encoder", "text_encoder_2")  # by --train_text_encoder; T5 stays frozen
LORA_LAYERS = [f"attn.{n}" for n in "add_k_proj add_q_proj add_v_proj to_add_out to_k to_out.0 to_q to_v".split()]
VERSION = "1.0.0"
STARTED = time.monotonic()
PROJECT = "dreambooth-sd3-lora"  # the trackers' name for it
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMIZERS = {"adamw": "AdamW", "prodigy": "prodigy"}
TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
PRIOR_PRECISIONS = ("no", "fp32", "fp16", "bf16")
WEIGHTINGS = ("sigma_sqrt", "logit_normal", "mode", "cosmap")


def refuse(message):
    """Ends the run with one line on stderr and exit code 2.

    The first process of a machine writes it at once; the others by then have been ended, unless they alone refuse.
    """
    rank, local_rank = os.environ.get("RANK", "0"), int(os.environ.get("LOCAL_RANK", 0))
    time.sleep(2 if local_rank else 0)
    where = f"process {rank}: " if rank != "0" else ""
    print(f"{Path(sys.argv[0]).name}: error: {where}{' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def boolean(text):
    """Value of a true/false flag. Errors: argparse.ArgumentTypeError for any other word."""
    if text.lower() not in {"true", "false", "1", "0", "yes", "no"}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in {"true", "1", "yes"}


def optimizer_name(text):
    """An optimizer's name in its one spelling, whatever the case of its letters."""
    if text.lower() not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"{text!r} is no optimizer here; choose AdamW or prodigy")
    return OPTIMIZERS[text.lower()]


def add_input_flags(parser):
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="MODEL", help="Hub id or folder of an SD3.")
    add("--revision", help="Hub revision of every part that is loaded.")
    add("--variant", help="Variant of the base model's weight files, such as fp16.")
    add("--cache_dir", help="Where downloaded models and datasets are kept.")
    add("--no_t5", action="store_true", help="Leave out T5, the largest text encoder: less memory, weaker text.")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="Hub id or folder of an image dataset, read by the datasets library.")
    add("--dataset_config_name", help="Configuration of that dataset.")
    add("--instance_data_dir", metavar="FOLDER", help="Folder with the subject's images, in place of --dataset_name.")
    add("--dataset_split", default="train", help="Split of that dataset.")
    add("--image_column", default="image", help="Dataset column with the images.")
    add("--caption_column", help="Dataset column with a caption an image; empty ones fall back to --instance_prompt.")
    add("--repeats", type=int, default=1, help="How often each instance image occurs in an epoch.")
    add("--instance_prompt", metavar="PROMPT", help="Such as 'a photo of sks dog'; for images without a caption.")
    add(
        "--caption_dropout",
        type=float,
        default=0.0,
        help="Probability of the empty prompt in place of an image's own.",
    )
    add("--max_sequence_length", type=int, default=77, help="T5 tokens of a prompt, 1 to 512; CLIP has its own 77.")
    add("--resolution", type=int, default=512, help="Side of the square crop in pixels, a multiple of 16.")
    add("--use_aspect_ratio_buckets", action="store_true", help="Keep shapes: crop to the nearest of several sizes.")
    add(
        "--aspect_ratio_buckets",
        metavar="H,W;H,W",
        help="These sizes, for --use_aspect_ratio_buckets; unset: by shape.",
    )
    add("--center_crop", action="store_true", help="Crop the middle instead of a random place.")
    add("--random_flip", action="store_true", help="Mirror half of the images.")
    add("--dataloader_num_workers", type=int, default=0, help="Loader processes; 0 loads in the training process.")

    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", action="store_true", help="Train on class images too, against drift.")
    add("--class_data_dir", metavar="FOLDER", help="Folder of class images; missing ones are drawn into it.")
    add("--class_prompt", metavar="PROMPT", help="Prompt of the class images, such as 'a photo of a dog'.")
    add("--num_class_images", type=int, default=100, help="How many class images there have to be.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the class images' loss.")
    add("--sample_batch_size", type=int, default=4, help="Batch a process when class images are generated.")
    add("--prior_generation_precision", choices=PRIOR_PRECISIONS, help="Unset: fp16 on an accelerator, fp32 on a CPU.")


def add_method_flags(parser):
    add = parser.add_argument_group("lora").add_argument
    add("--rank", type=int, default=4, help="Rank of the adapters.")
    add("--lora_alpha", type=float, help="Adapters are scaled by alpha / rank; unset: the rank.")
    add("--lora_dropout", type=float, default=0.0, help="Dropout on the adapters' input.")
    add("--use_rslora", action="store_true", help="Scale by alpha / sqrt(rank): rank-stabilised LoRA.")
    add("--use_dora", action="store_true", help="Train the magnitude of each weight row too: DoRA.")
    add("--lora_layers", metavar="NAMES", help="Such as attn.to_q,attn2.*,ff.* or all-linear; unset: joint attention.")
    add("--lora_blocks", metavar="NUMBERS", help="Comma-separated blocks that get adapters; unset: all.")
    add("--upcast_before_saving", action="store_true", help="Save the final adapters in float32.")
    add("--bnb_quantization_config_path", metavar="FILE", help="BitsAndBytesConfig of a base in 8 or 4 bit; on a GPU.")


def add_training_flags(parser):
    add = parser.add_argument_group("training").add_argument
    add("--train_text_encoder", action="store_true", help=f"Train {', '.join(TRAINED_ENCODERS)} too.")
    add("--train_batch_size", type=int, default=4, help="Instance images of a batch, on each process.")
    add("--num_train_epochs", type=int, default=1, help="Epochs; --max_train_steps wins.")
    add("--max_train_steps", type=int, help="Updates of the optimizer in all.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Batches an update.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations in the backward pass.")
    add("--offload", action="store_true", help="Keep the VAE on the CPU between its uses.")
    add("--use_ema", action="store_true", help="Average the weights over the updates; validate and save the average.")
    add(
        "--ema_decay",
        type=float,
        default=0.9999,
        help="Decay of that average, at most (1 + n) / (10 + n) at update n.",
    )
    add("--max_grad_norm", type=float, default=1.0, help="Clip the gradient to this norm over all; inf does not.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Unset: as accelerate was configured.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and later.")
    add("--seed", type=int, help="Seed of all draws; unset: one is drawn, and kept in the checkpoints.")
    add("--local_rank", type=int, default=-1, help="For old launchers; LOCAL_RANK in the environment wins.")

    add = parser.add_argument_group("loss").add_argument
    add("--weighting_scheme", choices=WEIGHTINGS, default="logit_normal", help="SD3 paper, section 3.1.")
    add("--logit_mean", type=float, default=0.0, help="Mean of the logit-normal density.")
    add("--logit_std", type=float, default=1.0, help="Standard deviation of the logit-normal density.")
    add("--mode_scale", type=float, default=1.29, help="Scale of the mode density.")
    add("--precondition_outputs", type=int, default=1, help="1 compares clean latents, 0 velocities.")

    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", type=optimizer_name, default="AdamW", help="AdamW or prodigy, in any case of letters.")
    add("--learning_rate", type=float, default=1e-4, help="Learning rate after warm-up.")
    add("--text_encoder_lr", type=float, default=5e-6, help="Text encoders' rate; prodigy takes --learning_rate.")
    add("--scale_lr", action="store_true", help="Multiply --learning_rate by processes, accumulation and batch.")
    add("--lr_scheduler", metavar="NAME", default="constant", help=f"One of {', '.join(LR_SCHEDULERS)}.")
    add("--lr_warmup_steps", type=int, default=500, help="Updates of warm-up.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state, from bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9, help="First beta, also Prodigy's.")
    add("--adam_beta2", type=float, default=0.999, help="Second beta, also Prodigy's.")
    add("--adam_weight_decay", type=float, default=1e-4, help="Weight decay of the transformer.")
    add("--adam_weight_decay_text_encoder", type=float, default=1e-3, help="Weight decay of the text encoders.")
    add("--adam_epsilon", type=float, default=1e-8, help="Epsilon, also Prodigy's.")
    on_by_default = {"type": boolean, "nargs": "?", "const": True, "default": True}
    add("--prodigy_beta3", type=float, help="Unset: the square root of the second beta.")
    add("--prodigy_decouple", **on_by_default, help="Decoupled weight decay.")
    add("--prodigy_use_bias_correction", **on_by_default, help="Adam's bias correction.")
    add("--prodigy_safeguard_warmup", **on_by_default, help="Keep the rate out of D's denominator in warm-up.")


def add_output_flags(parser):
    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", metavar="PROMPT", help="Prompt of the images drawn along the way and at the end.")
    add("--validation_data_dir", metavar="FOLDER", help="Held-out images: their loss at fixed noise is logged.")
    add("--num_validation_images", type=int, default=4, help="How many images each time.")
    add("--validation_epochs", type=int, default=50, help="Draw after epoch 0 and every so many epochs.")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="sd3-dreambooth", metavar="FOLDER", help="Where everything is written.")
    add("--logging_dir", default="logs", help="The trackers' folder inside output_dir.")
    add("--report_to", metavar="TRACKERS", default="tensorboard", help=f"Some of {','.join(TRACKERS)}; or all, none.")
    add("--tracker_project_name", default=PROJECT, metavar="NAME", help="The trackers' project.")
    add("--tracker_run_name", metavar="NAME", help="The run's name there; unset: the tracker chooses one.")
    add("--checkpointing_steps", type=int, default=500, help="Updates from one checkpoint to the next.")
    add("--checkpoints_total_limit", type=int, help="Keep the newest so many checkpoints; unset: all.")
    add("--resume_from_checkpoint", metavar="PATH", help="A checkpoint's path or name, or latest.")
    add(
        "--cache_latents",
        action="store_true",
        help="Encode each image once, in one crop; a few whose crop never varies always are.",
    )
    add(
        "--dry_run",
        action="store_true",
        help="Check all input, draw dry_run.png, print the run's costs, train nothing.",
    )
    add("--push_to_hub", action="store_true", help="Upload the result when training ends.")
    add("--hub_token", help="Token for the upload; it is written nowhere.")
    add("--hub_model_id", help="Repository of the upload; unset: the name of output_dir.")
    add("--hub_private_repo", action="store_true", help="Make the repository private when it is created.")


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt TEXT ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse  # one line, where argparse would print its usage first
    add_input_flags(parser)
    add_method_flags(parser)
    add_training_flags(parser)
    add_output_flags(parser)
    return parser


def check_numbers(args):
    """Refuses numbers outside their range."""
    positive = """repeats num_class_images sample_batch_size rank lora_alpha train_batch_size num_train_epochs
        max_train_steps
        gradient_accumulation_steps max_grad_norm lr_num_cycles adam_epsilon num_validation_images validation_epochs
        checkpointing_steps checkpoints_total_limit logit_std"""
    not_negative = """dataloader_num_workers prior_loss_weight learning_rate text_encoder_lr lr_warmup_steps lr_power
        adam_weight_decay adam_weight_decay_text_encoder"""
    for names, low, words in ((positive, 0, "greater than 0"), (not_negative, -1e-30, "0 or greater")):
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not value > low:
                refuse(f"--{name} {value} is out of range: give a number {words}")
    if args.resolution < 16 or args.resolution % 16:
        near = max(16, round(args.resolution / 16) * 16)
        refuse(f"--resolution {args.resolution} is not a multiple of 16 (VAE 8, patch 2): {near} is the nearest")
    if not 1 <= args.max_sequence_length <= 512:
        refuse(f"--max_sequence_length {args.max_sequence_length} is out of range: give 1 to 512")
    if args.precondition_outputs not in (0, 1):
        refuse(f"--precondition_outputs {args.precondition_outputs} is out of range: give 0 or 1")
    for name in ("adam_beta1", "adam_beta2", "prodigy_beta3", "lora_dropout", "caption_dropout", "ema_decay"):
        value = getattr(args, name, None)
        if value is not None and not 0 <= value < 1:
            refuse(f"--{name} {value} is out of range: give 0 or greater, below 1")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value) and name != "max_grad_norm":
            refuse(f"--{name} {value} is out of range: give a finite number")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        refuse(f"--seed {args.seed} is out of range: give 0 to {2**32 - 1}")


def check_data_flags(args):
    """Refuses data flags that contradict each other and folders that are not there."""
    if bool(args.dataset_name) == bool(args.instance_data_dir):
        given = f"{args.dataset_name!r} and {args.instance_data_dir!r}" if args.dataset_name else "neither of them"
        refuse(f"--dataset_name, --instance_data_dir: {given} given, give exactly one")
    for name in ("instance_data_dir", "validation_data_dir"):
        folder = getattr(args, name)
        if folder and not Path(folder).is_dir():
            refuse(f"--{name} {folder!r} is not a folder: give the folder with the images")
    if args.aspect_ratio_buckets and not args.use_aspect_ratio_buckets:
        refuse("--aspect_ratio_buckets needs --use_aspect_ratio_buckets")
    for bucket in (args.aspect_ratio_buckets or "16,16").split(";"):
        sides = bucket.split(",")
        if len(sides) != 2 or not all(
            side.strip().isdecimal() and int(side) and int(side) % 16 == 0 for side in sides
        ):
            refuse(
                f"--aspect_ratio_buckets: {bucket!r} is no height,width in multiples of 16, such as 512,768;768,512"
            )
    for name in ("class_data_dir", "class_prompt"):
        if args.with_prior_preservation and not getattr(args, name):
            refuse(f"--with_prior_preservation needs --{name}")
    for name in ("output_dir", "class_data_dir"):
        path = Path(getattr(args, name) or "")
        if path.exists() and not path.is_dir():
            refuse(f"--{name} {str(path)!r} is a file: give a folder")
    if os.path.normpath(args.logging_dir).startswith((".", os.sep)):
        refuse(f"--logging_dir {args.logging_dir!r} is not inside --output_dir: give a folder's name, such as logs")
    if args.dataset_name and importlib.util.find_spec("datasets") is None:
        refuse("--dataset_name needs the datasets package: pip install datasets")


def check_training_flags(args):
    """Refuses unknown choices, packages that are absent and a token that would end in a tracker."""
    if args.lr_scheduler not in LR_SCHEDULERS:
        refuse(f"--lr_scheduler {args.lr_scheduler!r} is unknown: choose from {', '.join(LR_SCHEDULERS)}")
    if args.optimizer == "prodigy" and importlib.util.find_spec("prodigyopt") is None:
        refuse("--optimizer prodigy needs the prodigyopt package: pip install prodigyopt")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        refuse("--use_8bit_adam needs the bitsandbytes package: pip install bitsandbytes")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and importlib.util.find_spec("deepspeed") is None:
        refuse("accelerate is configured for DeepSpeed, which needs the deepspeed package: pip install deepspeed")
    trackers = [] if args.report_to == "none" else args.report_to.split(",")
    for name in trackers:
        if name not in (*TRACKERS, "all"):
            refuse(f"--report_to {name!r} is unknown: choose from {', '.join(TRACKERS)}, all, none")
        if name != "all" and importlib.util.find_spec(name) is None:
            refuse(f"--report_to {name} needs the {name} package: pip install {name}")
    readers = [name for name in trackers if name != "tensorboard"]  # most record the command line
    if args.hub_token and readers:
        refuse(f"--hub_token would be readable in {readers[0]}: leave it out and run `hf auth login` instead")


# Flags that have an effect only with another one, at the values in the middle; True is any value.
NEEDS = (
    ("with_prior_preservation", (True,), "class_data_dir class_prompt num_class_images prior_loss_weight"),
    ("with_prior_preservation", (True,), "sample_batch_size prior_generation_precision"),
    ("train_text_encoder", (True,), "text_encoder_lr adam_weight_decay_text_encoder"),
    ("optimizer", ("AdamW",), "use_8bit_adam text_encoder_lr"),
    ("optimizer", ("prodigy",), "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup"),
    ("lr_scheduler", [name for name in LR_SCHEDULERS if name != "constant"], "lr_warmup_steps"),
    ("lr_scheduler", ("cosine_with_restarts",), "lr_num_cycles"),
    ("lr_scheduler", ("polynomial",), "lr_power"),
    ("weighting_scheme", ("logit_normal",), "logit_mean logit_std"),
    ("weighting_scheme", ("mode",), "mode_scale"),
    ("use_ema", (True,), "ema_decay"),
    ("dataset_name", (True,), "dataset_config_name dataset_split image_column"),
    ("validation_prompt", (True,), "num_validation_images"),
    ("push_to_hub", (True,), "hub_model_id hub_private_repo hub_token"),
    ("max_train_steps", (None,), "num_train_epochs"),
)


def report_idle(args, given_flags):
    """Says on stderr, a line for each flag that they lack, which of the given flags have no effect."""
    idle = []
    for needed, values, names in NEEDS:
        value = getattr(args, needed)
        given = [name for name in names.split() if getattr(given_flags, name) is not None]
        if needed == "lr_scheduler" and not args.lr_warmup_steps:
            given = [name for name in given if name != "lr_warmup_steps"]  # 0 is what happens anyway
        if given and not (value in values or True in values and value):
            idle.append((given, f"without --{needed}" if True in values else f"with --{needed} {value}"))
    if args.revision and Path(args.pretrained_model_name_or_path).is_dir():
        idle.append((["revision"], "on a folder"))
    folders = [folder for folder in (args.instance_data_dir, args.validation_data_dir) if folder]
    if args.caption_column and not args.dataset_name and not any(any(Path(f).glob("metadata.*")) for f in folders):
        idle.append((["caption_column"], "without --dataset_name or a metadata file in the folder"))
    for given, reason in idle if os.environ.get("RANK", "0") == "0" else []:
        flags, have = ", ".join(f"--{name}" for name in given), "have" if given[1:] else "has"
        print(f"{Path(sys.argv[0]).name}: {flags} {have} no effect {reason}", file=sys.stderr)


def parse_args(argv=None):
    """Flags of a run. Errors: SystemExit with code 2 and one line for flags that are wrong or contradictory."""
    args = build_parser().parse_args(argv)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    check_numbers(args)
    check_data_flags(args)
    check_training_flags(args)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # where the parser leaves None, no flag was given
    report_idle(args, build_parser().parse_args(argv, unset))
    return args


def needs_bitsandbytes(args):
    """Whether a flag asks for it, or the base may: the configs of a quantised one say so, and those on the Hub may."""
    configs = list(Path(args.pretrained_model_name_or_path).glob("*/config.json"))
    quantized = not configs or any("quantization_config" in path.read_text(errors="replace") for path in configs)
    return quantized or args.use_8bit_adam or bool(vars(args).get("bnb_quantization_config_path"))


if __name__ == "__main__":  # before the imports below, which take seconds: --help and a wrong flag answer at once
    ARGS = parse_args()
    if not needs_bitsandbytes(ARGS):
        sys.modules["bitsandbytes"] = None  # else PEFT imports it, and it torch's compiler: a fifth of all imports
gc.disable()  # imports leave no garbage, and the search for it takes a fifth of their time
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a torchvision that nothing here needs
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # the libraries' bars: those of one process will do

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    EMAModel,
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    find_nearest_bucket,
    free_memory,
    generate_aspect_ratio_buckets,
    parse_buckets_string,
)
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

gc.freeze()  # nor will it be searched for, each time that a model has gone, among the million objects that they made
gc.enable()
log = get_logger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".avif"}
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
ENCODED = ".encoded"  # folder in output_dir while a run lasts
FEW = 200  # images, which are encoded once without being asked for if nothing is drawn in their crops


def derive_seed(*parts):
    """One seed from the run's seed and what a draw belongs to, so that no draw depends on those made before it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def list_images(folder):
    """Image files of a folder in sorted order, and the names of everything else in it."""
    images, others = [], []
    for path in sorted(Path(folder).iterdir()):
        image = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        (images if image else others).append(path)
    return images, [path.name for path in others]


def to_rgb(image):
    """Any PIL image as an upright RGB one: EXIF rotation applied, 16 bits scaled to 8, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no range that is known")
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(source):
    """RGB image of a path, of a file's bytes or of a dataset's {"bytes", "path"}.

    Errors: ValueError that names what cannot be read.
    """
    name = source.get("path") if isinstance(source, dict) else "of bytes" if isinstance(source, bytes) else source
    try:
        if isinstance(source, dict):
            source = source["bytes"] or source["path"]
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            upright = to_rgb(image)
            upright.info["animated"] = getattr(image, "is_animated", False)
            return upright
    except Exception as error:  # PIL's readers raise whatever a damaged file leads them into
        raise ValueError(
            f"the image {str(name)[:200]!r} cannot be read ({error}): repair it or take it away"
        ) from error


def crop_image(image, size, generator, center, flip):
    """A crop of `size`, (height, width) in pixels, from an RGB image, in [-1, 1].

    The image is scaled until it just covers `size`, bilinear with antialiasing; the place of the crop and the mirror
    are drawn from `generator`. Only the pixels of the crop are computed, so a panorama costs no more than a square.
    Returns a float32 tensor (3, height, width).
    """
    height, width = size
    if image.height * width < image.width * height:
        tall, wide = height, image.width * height // image.height
    else:
        tall, wide = image.height * width // image.width, width
    down, right, mirror = torch.rand(3, generator=generator).tolist()
    top = round((tall - height) / 2) if center else int(down * (tall - height + 1))
    left = round((wide - width) / 2) if center else int(right * (wide - width + 1))
    across, along = image.width / wide, image.height / tall
    box = (left * across, top * along, (left + width) * across, (top + height) * along)
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    if flip and mirror < 0.5:
        image = ImageOps.mirror(image)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def choose_size(args, width, height):
    """Height and width that an image of these pixels is trained at: the square, or the bucket nearest in shape.

    Without a list of buckets they are those of diffusers for --resolution, or for the largest smaller resolution at
    which the image need not be scaled up.
    """
    if not args.use_aspect_ratio_buckets:
        return args.resolution, args.resolution
    if args.aspect_ratio_buckets:
        buckets = parse_buckets_string(args.aspect_ratio_buckets)
        return buckets[find_nearest_bucket(height, width, buckets)]
    for resolution in range(args.resolution, 0, -16):
        buckets = generate_aspect_ratio_buckets(resolution, divisibility=16)
        bucket = buckets[find_nearest_bucket(height, width, buckets)]
        if bucket[0] <= height and bucket[1] <= width:
            break
    return bucket


class DreamBoothDataset:
    """Instance images with their prompts, each together with a class image where there are any.

    An item's place is (epoch, index, weight): all that is drawn for it comes from the run's seed, epoch and index.
    `sizes` are the (height, width) that the instance images are cropped to; a class image takes its partner's.
    `moments`, once filled by `cache_moments`, stands in for the pixels.
    """

    def __init__(self, args, images, prompts, sizes, class_images=()):
        self.args, self.sizes, self.moments = args, sizes, None
        self.images = {"instance": images, "class": class_images}
        self.prompts = {"instance": prompts, "class": [args.class_prompt] * len(class_images)}
        self.kinds = ["instance", "class"] if class_images else ["instance"]

    def __len__(self):
        return max(len(self.images["instance"]) * self.args.repeats, len(self.images["class"]))

    def all_prompts(self):
        """Every prompt that an item may have."""
        dropped = [""] if self.args.caption_dropout else []
        return {*dropped, *self.prompts["instance"], *self.prompts["class"]}

    def size(self, index):
        """Height and width in pixels of the item at an index."""
        return self.sizes[index % len(self.sizes)]

    def __getitem__(self, place):
        """The examples of an item: instance, then class."""
        epoch, index, weight = place
        examples = []
        for kind in self.kinds:
            number = index % len(self.images[kind])
            seed = derive_seed(self.args.seed, kind, epoch, index)
            key = kind, number, self.size(index)
            prompt = self.prompts[kind][number]
            if kind == "instance" and random.Random(derive_seed(seed, "caption")).random() < self.args.caption_dropout:
                prompt = ""
            data = self.pixels(*key, seed) if self.moments is None else self.moments[key][0]
            examples.append({"data": data, "prompt": prompt, "seed": seed, "weight": weight})
        return examples

    def pixels(self, kind, number, size, seed):
        """Pixels (3, height, width) in [-1, 1] of one image, in the crop that `seed` draws."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "crop"))
        image = open_image(self.images[kind][number])
        return crop_image(image, size, generator, self.args.center_crop, self.args.random_flip)


class EpochSampler:
    """Batches of places (epoch, index, weight): every index once an epoch, in an order drawn from seed and epoch.

    Batches hold images of one size and come in groups of one a process. Where a group is not full, places of weight 0
    make its batches equally long and the others weigh more, so that the mean over the processes is the mean over the
    images. Set `epoch`, and `start` to the batches that a process has done of it, before each pass.
    """

    batch_size = None  # tells accelerate that batches differ in length

    def __init__(self, dataset, batch_size, processes, seed):
        self.sizes = [dataset.size(index) for index in range(len(dataset))]
        self.group, self.processes, self.seed = batch_size * processes, processes, seed
        self.epoch = self.start = 0

    def __len__(self):
        return sum(math.ceil(count / self.group) for count in Counter(self.sizes).values()) * self.processes

    def groups(self):
        """Indices of the epoch, in lists of one size that are a batch of each process; those not full come last."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        full, filling = [], {}
        for index in torch.randperm(len(self.sizes), generator=generator).tolist():
            group = filling.setdefault(self.sizes[index], [])
            group.append(index)
            if len(group) == self.group:
                full.append(filling.pop(self.sizes[index]))
        return full + list(filling.values())

    def __iter__(self):
        for group in self.groups()[self.start :]:
            each = math.ceil(len(group) / self.processes)
            spare = each * self.processes - len(group)
            places = [(self.epoch, index, each * self.processes / len(group)) for index in group]
            places += [(self.epoch, group[0], 0.0)] * spare
            yield from (places[rank * each : (rank + 1) * each] for rank in range(self.processes))


def collate(items):
    """A batch of B examples, instance images first, then class images."""
    examples = [example for kind in zip(*items, strict=True) for example in kind]
    return {
        "data": torch.stack([example["data"] for example in examples]),  # (B, 3, H, W), or moments (B, 2C, h, w)
        "weights": torch.tensor([example["weight"] for example in examples]),
        "prompts": [example["prompt"] for example in examples],
        "seeds": [example["seed"] for example in examples],
    }


class TensorFile:
    """Tuples of tensors by key on the disk, so that memory does not grow with their number; None may stand for one.

    Ten thousand captions are up to 50 GB for the transformer. Each process writes a file of its own in output_dir,
    where those of other machines find it too, and reads what it needs when it needs it.
    """

    def __init__(self, args):
        self.places = {}
        folder = Path(args.output_dir, ENCODED)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, self.path = tempfile.mkstemp(dir=folder)
        os.close(descriptor)

    def __setitem__(self, key, tensors):
        try:
            with Path(self.path).open("ab") as file:
                places = []
                for tensor in tensors:
                    places.append(tensor if tensor is None else (file.tell(), tensor.dtype, tensor.shape))
                    file.write(b"" if tensor is None else tensor.cpu().contiguous().view(torch.uint8).numpy())
        except OSError as error:
            sys.exit(f"{self.path} cannot be written ({error}): make room, or take an --output_dir that has it")
        self.places[key] = self.path, places

    def __getitem__(self, key):
        path, places = self.places[key]
        tensors = []
        with Path(path).open("rb") as file:
            for place in places:
                if place is not None:
                    offset, dtype, shape = place
                    file.seek(offset)
                    place = torch.frombuffer(bytearray(file.read(shape.numel() * dtype.itemsize)), dtype=dtype)
                    place = place.view(shape)
                tensors.append(place)
        return tuple(tensors)

    def gather(self, accelerator):
        """Makes what each process has written known to all."""
        self.places = gather_items(accelerator, self.places)


def inspect_images(flag, images):
    """Width and height of every image, each of which is read once.

    Refuses one that cannot be; says which are animated and how many are copies of others.
    """

    def inspect(number):
        image = open_image(images[number])
        return image.size, hashlib.sha256(image.tobytes()).digest(), image.info["animated"]

    with ThreadPoolExecutor() as pool:
        try:
            found = list(pool.map(inspect, range(len(images))))  # the pool takes in all that it is given at once
        except ValueError as error:
            refuse(f"{flag}: {error}")
    animated = [str(images[number])[:200] for number, (_, _, moves) in enumerate(found) if moves]
    if animated:
        log.warning(f"{flag}: of several frames the first is used, in {', '.join(animated[:10])}")
    repeated = len(found) - len({digest for _, digest, _ in found})
    if repeated:
        log.warning(f"{flag}: {repeated} of the {len(found)} images are copies of others")
    return [size for size, _, _ in found]


def read_folder(flag, folder):
    """Paths of a folder's images; what else lies there, captions apart, is named."""
    images, others = list_images(folder)
    if not images:
        refuse(f"{flag} {str(folder)!r} holds no image: give a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    stems = {path.stem for path in images}
    others = [
        n for n in others if n not in METADATA_FILES and not (Path(n).stem in stems and n.endswith(CAPTION_SUFFIXES))
    ]
    if others:
        log.warning(f"{flag} {folder}: passed over {', '.join(others[:10])}{' ...' if len(others) > 10 else ''}")
    return images


def read_metadata(path, column):
    """{file name: caption} of a metadata.jsonl or metadata.csv, as the datasets library's imagefolder has it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = (
                [json.loads(line) for line in file if line.strip()]
                if path.suffix == ".jsonl"
                else [*csv.DictReader(file)]
            )
    except (OSError, ValueError, csv.Error) as error:
        refuse(f"{path} cannot be read: {error}")
    for row in rows:
        if not isinstance(row, dict) or "file_name" not in row or column not in row:
            has = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
            refuse(f"{path}: a row has the columns {has}; it needs file_name and {column}")
        if not isinstance(row["file_name"], str) or not isinstance(row[column], str | None):
            refuse(f"{path}: {row['file_name']!r} has the caption {row[column]!r:.60}: both are strings")
    return {row["file_name"]: row[column] for row in rows}


def read_captions(folder, images, column):
    """A caption, or None, for each image: from the folder's metadata file, else from a .txt or .caption beside it."""
    table = {}
    for path in (Path(folder, name) for name in METADATA_FILES):
        if path.is_file():
            table |= read_metadata(path, column or "text")
    unknown = sorted(table.keys() - {path.name for path in images})
    if unknown:
        log.warning(f"{folder}: the metadata has captions for images that are not there: {', '.join(unknown[:10])}")
    captions = []
    for image in images:
        beside = [path for path in map(image.with_suffix, CAPTION_SUFFIXES) if path.is_file()]
        try:
            captions.append(table.get(image.name) or (beside[0].read_text(encoding="utf-8-sig") if beside else None))
        except (OSError, ValueError) as error:
            refuse(f"{beside[0]} is not UTF-8 text: {error}")
    return captions


def load_rows(args):
    """Rows of --dataset_name: a folder that a dataset was saved to, a file, a folder of files, or a Hub id."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(args.dataset_name)
    if Path(path, "state.json").is_file() or Path(path, "dataset_dict.json").is_file():
        rows = load_from_disk(path)
        return rows[args.dataset_split] if isinstance(rows, DatasetDict) else rows
    shared = {"cache_dir": args.cache_dir, "split": args.dataset_split}
    if path.is_file():
        kind = {".jsonl": "json"}.get(path.suffix, path.suffix[1:])
        return load_dataset(kind, data_files=str(path), **shared)
    return load_dataset(args.dataset_name, args.dataset_config_name, **shared)


def read_hub_dataset(args):
    """Images and captions of --dataset_name: a sequence whose images are decoded when used, and strings or None."""
    from datasets import Image as ImageFeature

    try:
        rows = load_rows(args)
    except (OSError, ValueError, KeyError) as error:
        refuse(f"--dataset_name {args.dataset_name!r} cannot be read: {error}")
    for flag in ("image_column", "caption_column"):
        column = getattr(args, flag)
        if column and column not in rows.column_names:
            refuse(f"--{flag} {column!r} is not in the dataset: its columns are {', '.join(rows.column_names)}")
    if not len(rows):
        refuse(f"--dataset_name {args.dataset_name!r} has no rows in split {args.dataset_split!r}")
    captions = rows[args.caption_column][:] if args.caption_column else [None] * len(rows)
    odd = next((caption for caption in captions if not isinstance(caption, str | None)), None)
    if odd is not None:
        refuse(f"--caption_column {args.caption_column!r} holds {str(odd)[:60]!r}: a caption is a string")
    if isinstance(rows.features[args.image_column], ImageFeature):
        rows = rows.cast_column(args.image_column, ImageFeature(decode=False))
    return rows[args.image_column], captions


def read_instances(args):
    """The instance images, a prompt for each and the sizes they are cropped to, with what was found said once."""
    if args.dataset_name:
        flag, (images, captions) = "--dataset_name", read_hub_dataset(args)
    else:
        flag = "--instance_data_dir"
        images = read_folder(flag, args.instance_data_dir)
        captions = read_captions(args.instance_data_dir, images, args.caption_column)
    captions = [" ".join((caption or "").split()) for caption in captions]
    bare = captions.count("")
    if bare and not args.instance_prompt:
        refuse(f"{flag}: {bare} of {len(images)} images have no caption: give --instance_prompt for them")
    log.info(f"{flag}: {len(images)} images, {len(images) - bare} with a caption, {bare} with --instance_prompt")
    pixels = inspect_images(flag, images)
    sizes = [choose_size(args, *size) for size in pixels]
    small = sum(width < size[1] or height < size[0] for (width, height), size in zip(pixels, sizes, strict=True))
    if small:
        log.warning(f"{flag}: {small} images are smaller than what they are trained at and are scaled up")
    if args.use_aspect_ratio_buckets:
        found = ", ".join(f"{count} at {size[0]}x{size[1]}" for size, count in sorted(Counter(sizes).items()))
        log.info(f"images by bucket, height x width: {found}")
    whole = all(width * size[0] == height * size[1] for (width, height), size in zip(pixels, sizes, strict=True))
    if not args.random_flip and (args.center_crop or whole and not args.with_prior_preservation):
        args.cache_latents |= len(images) + args.num_class_images * args.with_prior_preservation <= FEW
    check_sizes(args, {*sizes, (args.resolution, args.resolution)})
    return images, [caption or args.instance_prompt for caption in captions], sizes


def check_sizes(args, sizes):
    """Refuses images that are larger than the transformer's table of positions."""
    config = read_transformer_config(args)
    limit = config["pos_embed_max_size"] * config["patch_size"] * 8
    for size in sizes:
        if max(size) > limit:
            flag = "--aspect_ratio_buckets" if args.use_aspect_ratio_buckets else "--resolution"
            refuse(
                f"{flag}: {size[0]}x{size[1]} is too large: the transformer has positions for {limit} pixels a side"
            )


def read_dataset(args, parts, accelerator):
    """The dataset of the run, its class images drawn where they lack, the held-out images, and the Hub's repository.

    The repository comes once the data are found to be good, and before the hours that drawing may take. A dry run has
    None for each class image that lacks.
    """
    (images, prompts, sizes), held_out = read_instances(args), read_held_out(args)
    repository = open_repository(args, accelerator)
    class_images, flag = [], "--class_data_dir"
    if args.with_prior_preservation and args.dry_run:
        folder = Path(args.class_data_dir)
        class_images = list_images(folder)[0][: args.num_class_images] if folder.is_dir() else []
    elif args.with_prior_preservation:
        generate_class_images(args, parts, accelerator)
        class_images = read_folder(flag, args.class_data_dir)[: args.num_class_images]
    inspect_images(flag, class_images)
    if args.with_prior_preservation:
        class_images += [None] * (args.num_class_images - len(class_images))
    return DreamBoothDataset(args, images, prompts, sizes, class_images), held_out, repository


def read_held_out(args):
    """The images of --validation_data_dir with their prompts, cropped in the middle; none without the flag."""
    if not args.validation_data_dir:
        return DreamBoothDataset(args, [], [], [])
    flag, folder = "--validation_data_dir", args.validation_data_dir
    images = read_folder(flag, folder)
    captions = read_captions(folder, images, args.caption_column)
    prompts = [" ".join((caption or "").split()) or args.instance_prompt or "" for caption in captions]
    plain = argparse.Namespace(**{**vars(args), "center_crop": True, "random_flip": False, "repeats": 1, "seed": 0})
    return DreamBoothDataset(
        plain, images, prompts, [choose_size(args, *size) for size in inspect_images(flag, images)]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # CLIP-L, OpenCLIP bigG, T5: the pipeline's order
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def read_pipeline(args):
    """Parts of the base pipeline, {name: (library, class)}, from its model_index.json."""
    model, local = args.pretrained_model_name_or_path, Path(args.pretrained_model_name_or_path).is_dir()
    try:
        index = StableDiffusion3Pipeline.load_config(model, cache_dir=args.cache_dir, revision=args.revision)
    except (OSError, ValueError) as error:
        cause = str(error.__context__ or error).strip().splitlines()[0]  # diffusers says the same of all causes
        remedy = (
            f"give a folder in diffusers layout or the id of a Hub model that exists; for a gated one accept its"
            f" licence at https://huggingface.co/{model} and run `hf auth login`"
        )
        refuse(
            f"--pretrained_model_name_or_path {model!r} has no model_index.json that can be read ({cause}):"
            f" {'give the folder of a pipeline in diffusers layout' if local else remedy}"
        )
    left_out = {"text_encoder_3", "tokenizer_3"} if args.no_t5 else set()
    parts = {name: tuple(e) for name, e in index.items() if isinstance(e, list) and e[0] and name not in left_out}
    needed = {"transformer", "vae", "scheduler", *TEXT_ENCODERS[:2], "tokenizer", "tokenizer_2"}
    absent = [name for name in {*needed, *parts} if name not in parts or local and lacks_files(args, name)]
    if absent:
        refuse(f"--pretrained_model_name_or_path {model!r} is no whole SD3 pipeline: no {', '.join(sorted(absent))}")
    if parts["transformer"][1] != "SD3Transformer2DModel":
        refuse(f"--pretrained_model_name_or_path {model!r} is no SD3 pipeline: it has a {parts['transformer'][1]}")
    return parts


def lacks_files(args, name):
    """Whether a part of a local pipeline lacks its configuration, or its weights in the variant asked for."""
    folder = Path(args.pretrained_model_name_or_path, name)
    if not any(folder.glob("*config.json")):
        return True
    ending = f".{args.variant}*" if args.variant else ""
    weights = [folder.glob(f"*{ending}.{suffix}") for suffix in ("safetensors", "bin")]
    return not name.startswith(("tokenizer", "scheduler")) and not any(map(any, weights))


def load_part(args, parts, name, **kwargs):
    """One part of the base pipeline, by its name there. A `dtype` is that of the weights from disk on."""
    library, class_name = parts[name]
    part_class = getattr(importlib.import_module(library), class_name)
    if hasattr(part_class, "parameters"):
        kwargs["variant"] = args.variant
    return part_class.from_pretrained(
        args.pretrained_model_name_or_path, subfolder=name, revision=args.revision, cache_dir=args.cache_dir, **kwargs
    )


def sketch_part(args, parts, name):
    """A model of the pipeline by its config alone, frozen, on the meta device: sizes without values."""
    library, class_name = parts[name]
    part_class, model = getattr(importlib.import_module(library), class_name), args.pretrained_model_name_or_path
    where = {"subfolder": name, "revision": args.revision, "cache_dir": args.cache_dir}
    with torch.device("meta"):
        if hasattr(part_class, "load_config"):
            part = part_class.from_config(part_class.load_config(model, **where))
        else:
            part = part_class(part_class.config_class.from_pretrained(model, **where))
    return part.requires_grad_(False).eval()


def load_frozen(args, parts, name, device, dtype, **kwargs):
    """A part that is not trained, ready to be called."""
    return load_part(args, parts, name, dtype=dtype, **kwargs).requires_grad_(False).eval().to(device)


def frozen_dtype(accelerator):
    """Precision of what is not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def read_transformer_config(args):
    return SD3Transformer2DModel.load_config(
        args.pretrained_model_name_or_path, subfolder="transformer", revision=args.revision, cache_dir=args.cache_dir
    )


def name_linear_layers(args, parts):
    """Names of the transformer's linear layers, and its number of blocks, from its config alone."""
    transformer = sketch_part(args, parts, "transformer")
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    return linear, len(transformer.transformer_blocks)


def read_quantization(args, device="cpu", dtype=torch.float32):
    """What from_pretrained needs to load the transformer as --bnb_quantization_config_path says; {} without the flag.

    A file that does not fit is refused, and a machine that does not: diffusers quantises on a GPU alone.
    """
    if not args.bnb_quantization_config_path:
        return {}
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers import DiffusersAutoQuantizer

    try:
        fields = json.loads(Path(args.bnb_quantization_config_path).read_text())
        if unknown := set(fields) - set(BitsAndBytesConfig().to_dict()):
            raise ValueError(f"unknown: {', '.join(sorted(map(str, unknown)))}")
        config = BitsAndBytesConfig(**{**fields, "bnb_4bit_compute_dtype": dtype})
        if config.quantization_method() is None:
            raise ValueError("neither load_in_8bit nor load_in_4bit, to fp4 or nf4, is true")
        DiffusersAutoQuantizer.from_config(config).validate_environment()
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        remedy = 'give a JSON file with fields of a BitsAndBytesConfig, such as {"load_in_4bit": true}, on a GPU'
        refuse(f"--bnb_quantization_config_path {args.bnb_quantization_config_path!r}: {error}: {remedy}")
    return {"quantization_config": config, "device_map": {"": device}}


def choose_targets(args, parts):
    """Layers that get an adapter, by model. A name or a block that none of them has is refused."""
    read_quantization(args)  # a wrong one is refused now, not once the text has been encoded
    linear, count = name_linear_layers(args, parts)
    numbers = [number.strip() for number in args.lora_blocks.split(",")] if args.lora_blocks else []
    for number in numbers:
        if number not in map(str, range(count)):
            refuse(f"--lora_blocks: {number!r} is no block; the transformer has blocks 0 to {count - 1}")
    blocks = tuple(f"transformer_blocks.{number}." for number in numbers)
    inside = [name for name in linear if name.startswith(blocks or "")]
    chosen = set()
    for layer in [name.strip() for name in args.lora_layers.split(",")] if args.lora_layers else LORA_LAYERS:
        pattern = "transformer_blocks.*" if layer == "all-linear" else f"*.{layer}"
        found = fnmatch.filter(inside, pattern)
        if args.lora_layers and not found:
            known = sorted({name.split(".", 2)[2] for name in inside if name.startswith("transformer_blocks.")})
            refuse(f"--lora_layers: no layer is named {layer!r}; there are {', '.join(known)}, and all-linear")
        chosen.update(found)
    for block in blocks:
        if not any(name.startswith(block) for name in chosen):
            refuse(f"--lora_blocks: block {block.split('.')[1]} has none of --lora_layers {args.lora_layers}")
    targets = {"transformer": [name for name in linear if name in chosen]}
    if args.train_text_encoder:
        targets |= dict.fromkeys(TRAINED_ENCODERS, ["q_proj", "k_proj", "v_proj", "out_proj"])
    return targets


def make_trainable(args, model, layers):
    """Gives a frozen model adapters on its layers, in float32."""
    from peft import LoraConfig

    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha or args.rank,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        init_lora_weights="gaussian",
        target_modules=layers,
    )
    model.add_adapter(config)
    cast_training_params(model, torch.float32)


def trained_dtype(accelerator):
    """Precision of the models that get adapters."""
    return frozen_dtype(accelerator)


def load_trained(args, parts, accelerator, targets):
    """The models of `targets` with adapters on their layers: the base in the frozen dtype, the adapters in float32."""
    torch.manual_seed(args.seed)
    trained = {}
    for name, layers in targets.items():
        device, dtype = accelerator.device, frozen_dtype(accelerator)
        # PEFT's prepare_model_for_kbit_training would make the parameters left float32, which autocast undoes,
        # and have inputs require gradients, which checkpointing here does not need.
        quantized = read_quantization(args, device, dtype) if name == "transformer" else {}
        model = load_frozen(args, parts, name, device, dtype, **quantized)
        make_trainable(args, model, layers)
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing() if name == "transformer" else model.activation_checkpointing_enable()
        trained[name] = model.train()
    log.info(f"adapters:\n{describe_adapters(trained)}")
    return trained


def describe_adapters(trained):
    """A table of what has adapters: kind of layer, its blocks, parameters."""
    kinds = {}
    for model_name, model in trained.items():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                layer = name.split(".lora_")[0]
                block = re.search(r"\.(\d+)\.", layer)
                kind = f"{model_name} {layer[block.end() :] if block else layer}"
                blocks, count = kinds.get(kind, ({}, 0))
                kinds[kind] = blocks | ({int(block[1]): None} if block else {}), count + parameter.numel()
    rows = [("layer", "blocks", "parameters")]
    for kind, (blocks, count) in kinds.items():
        first = [n for n in blocks if n - 1 not in blocks]
        last = [n for n in blocks if n + 1 not in blocks]
        spans = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(sorted(first), sorted(last), strict=True)]
        rows.append((kind, ",".join(spans), f"{count:,}"))
    rows.append(("all", "", f"{sum(count for _, count in kinds.values()):,}"))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"  {a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}" for a, b, c in rows)


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def tokenize(name, tokenizer, clip_tokens, prompts, max_sequence_length):
    """Token ids (B, tokens) of an encoder's prompts, and the part of each that did not fit in."""
    length = max_sequence_length if name == "text_encoder_3" else clip_tokens
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    whole = tokenizer(prompts, verbose=False).input_ids
    return ids, [tokenizer.decode(prompt[length - 1 : -1]) if len(prompt) > length else "" for prompt in whole]


def encode_text(name, encoder, ids):
    """One encoder's part of the text: states (B, tokens, width) and, of a CLIP, the pooled output (B, width)."""
    if name == "text_encoder_3":
        return encoder(ids)[0], None
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


def join_embeds(parts, joint_width):
    """Text as the transformer takes it, from what `encode_text` gave for the encoders in the pipeline's order.

    The CLIPs' states side by side, zero-padded to the joint width D, then T5's states along the token axis; the pooled
    outputs side by side. As in StableDiffusion3Pipeline.encode_prompt. Returns (B, S, D) and (B, P).
    """
    (clip_l, pooled_l), (clip_g, pooled_g), (t5, _) = parts
    clips = torch.cat([clip_l, clip_g], dim=-1)
    clips = torch.nn.functional.pad(clips, (0, joint_width - clips.shape[-1]))
    return torch.cat([clips, t5.to(clips.dtype)], dim=-2), torch.cat([pooled_l, pooled_g], dim=-1)


class PromptTable:
    """Look-up from prompts to their embeds: frozen encoders have spoken once and are gone, trained ones are called.

    `lost` has the prompts that were cut, and which words of them.
    """

    def __init__(self, args, parts, accelerator, dtype, targets=()):
        self.args, self.accelerator, self.dtype, self.trained = args, accelerator, dtype, {}
        self.width = read_transformer_config(args)["joint_attention_dim"]
        self.tokenizers = [load_part(args, parts, name) if name in parts else None for name in TOKENIZERS]
        self.frozen = {name: TensorFile(args) for name in TEXT_ENCODERS if name not in targets}
        self.lost = {}

    def fill(self, parts, prompts):
        """Encodes each prompt once with each frozen encoder, the processes sharing the work, one encoder at a time."""
        accelerator, prompts = self.accelerator, sorted(set(prompts))
        self.report_lost(prompts)
        for name, table in self.frozen.items():
            if name not in parts:
                continue
            encoder = load_frozen(self.args, parts, name, accelerator.device, self.dtype)
            mine = prompts[accelerator.process_index :: accelerator.num_processes]
            with torch.no_grad():
                for prompt in tqdm(mine, desc=f"Encoding with {name}", disable=not accelerator.is_main_process):
                    table[prompt] = encode_text(name, encoder, self.ids(name, [prompt]))
            del encoder
            free_memory()
            table.gather(accelerator)

    def report_lost(self, prompts):
        """Names every prompt that CLIP or T5 reads only in part, once, with the words that are lost."""
        for name, reader in (("text_encoder", "CLIP"), ("text_encoder_3", "T5")):
            if self.tokenizers[TEXT_ENCODERS.index(name)] is None:
                continue
            for prompt, words in zip(prompts, self.tokenize(name, prompts)[1], strict=True):
                if words:
                    self.lost.setdefault(prompt, []).append(f"{reader} loses {words!r}")
        for prompt, words in self.lost.items():
            log.warning(f"the prompt {prompt[:60]!r} is too long: {', '.join(words)}")
        log.info(f"{len(prompts)} different prompts, {len(self.lost)} of them cut")

    def tokenize(self, name, prompts):
        clip_tokens = self.tokenizers[0].model_max_length
        tokenizer = self.tokenizers[TEXT_ENCODERS.index(name)]
        return tokenize(name, tokenizer, clip_tokens, prompts, self.args.max_sequence_length)

    def ids(self, name, prompts):
        return self.tokenize(name, prompts)[0].to(self.accelerator.device)

    @functools.lru_cache(maxsize=64)  # noqa: B019  the table lives as long as the run; saves copies to the device
    def look_up(self, name, prompt):
        """A frozen encoder's (1, tokens, width) and (1, width) of one prompt, on the device."""
        if name == "text_encoder_3" and not self.frozen[name].places:
            shape = (1, self.args.max_sequence_length, self.width)
            return torch.zeros(shape, dtype=self.dtype, device=self.accelerator.device), None
        return tuple(None if s is None else s.to(self.accelerator.device) for s in self.frozen[name][prompt])

    def __call__(self, prompts):
        """Embeds (B, S, D) and pooled embeds (B, P) of a batch's prompts."""
        parts = []
        for name in TEXT_ENCODERS:
            if name in self.trained:
                parts.append(encode_text(name, self.trained[name], self.ids(name, prompts)))
            else:
                states = zip(*(self.look_up(name, prompt) for prompt in prompts), strict=True)
                parts.append(tuple(None if state[0] is None else torch.cat(state) for state in states))
        return join_embeds(parts, self.width)


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching
# ---------------------------------------------------------------------------------------------------------------------


def encode_moments(vae, pixels):
    """The VAE's posterior of pixels (B, 3, H, W): mean and deviation stacked along the channels, (B, 2C, h, w)."""
    rest = vae.device
    with torch.no_grad():
        posterior = vae.to(pixels.device).encode(pixels).latent_dist
    vae.to(rest)
    return torch.cat([posterior.mean, posterior.std], dim=1)


def cache_moments(dataset, vae, accelerator):
    """Encodes every image of the dataset once, in one crop each, the processes sharing the work."""
    keys = {
        (kind, index % len(dataset.images[kind]), dataset.size(index)): None
        for kind in dataset.kinds
        for index in range(len(dataset))
    }
    mine, moments = list(keys)[accelerator.process_index :: accelerator.num_processes], TensorFile(dataset.args)
    for key in tqdm(mine, desc="Caching latents", disable=not (mine and accelerator.is_main_process)):
        pixels = dataset.pixels(*key, derive_seed(dataset.args.seed, "cache", *key))
        moments[key] = [encode_moments(vae, pixels[None].to(accelerator.device))[0]]
    moments.gather(accelerator)
    dataset.moments = moments


def resting_device(args, accelerator):
    """Where the VAE is between its uses: on the device, waiting on the CPU, or nowhere once nothing needs it."""
    if not args.cache_latents and not args.offload:
        return accelerator.device
    return "meta" if args.cache_latents and not args.validation_prompt else "cpu"


def draw_latents(args, vae_config, moments, seeds):
    """Latents and noise (B, C, h, w) and densities u (B,) of a batch, each image's from its own seed.

    A latent is a sample of the posterior, shifted and scaled by the VAE's config (SD3 shifts as well as scales).
    """
    mean, deviation = moments.float().chunk(2, dim=1)
    sample, noise, u = [], [], []
    for seed in seeds:
        generator = torch.Generator(moments.device).manual_seed(seed)
        sample.append(torch.randn(mean.shape[1:], generator=generator, device=moments.device))
        noise.append(torch.randn(mean.shape[1:], generator=generator, device=moments.device))
        u.append(draw_density(args, 1, generator))
    latents = mean + deviation * torch.stack(sample)
    return (latents - vae_config.shift_factor) * vae_config.scaling_factor, torch.stack(noise), torch.cat(u)


def draw_density(args, count, generator):
    """u (count,) in [0, 1], from the density of --weighting_scheme (SD3 paper, section 3.1)."""
    return compute_density_for_timestep_sampling(
        args.weighting_scheme,
        batch_size=count,
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        mode_scale=args.mode_scale,
        device=generator.device,
        generator=generator,
    )


def noise_levels(scheduler, device):
    """The scheduler's tables of timesteps and sigmas, (1000,) each, from noisy to clean."""
    return scheduler.timesteps.to(device), scheduler.sigmas.to(device)


def flow_losses(args, transformer, levels, latents, noise, u, embeds, pooled):
    """Rectified-flow loss of each image, (B,) in float32 (SD3 paper, section 2 and 3.1).

    latents, noise (B, C, h, w) in float32; u (B,) in [0, 1]; `levels` as `noise_levels` gives them; embeds (B, S, D);
    pooled (B, P).
    """
    timesteps, sigmas = levels
    index = (u * len(timesteps)).long().clamp(0, len(timesteps) - 1)  # the mode density reaches u = 1
    sigma = sigmas[index].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    velocity = transformer(
        hidden_states=noisy,
        timestep=timesteps[index],
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0].float()
    if args.precondition_outputs:
        prediction, target = noisy - sigma * velocity, latents
    else:
        prediction, target = velocity, noise - latents
    weight = compute_loss_weighting_for_sd3(args.weighting_scheme, sigma)
    return (weight * (prediction - target) ** 2).flatten(1).mean(dim=1)


def split_losses(args, losses, weights):
    """Mean loss of the instance images and of the class images, (2,): zero for the latter where there are none."""
    kinds = (losses * weights).chunk(2) if args.with_prior_preservation else [losses * weights]
    means = [kind.mean() for kind in kinds]
    return torch.stack(means if len(means) == 2 else [*means, torch.zeros_like(means[0])])


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(args, accelerator, trained):
    """AdamW, its 8-bit form or Prodigy, with a parameter group a model."""
    rate = args.learning_rate
    if args.scale_lr:
        rate *= accelerator.num_processes * args.gradient_accumulation_steps * args.train_batch_size
    groups = []
    for name, model in trained.items():
        text = name in TEXT_ENCODERS
        groups.append(
            {
                "params": trained_parameters(model),
                "lr": args.text_encoder_lr if text and args.optimizer == "AdamW" else rate,
                "weight_decay": args.adam_weight_decay_text_encoder if text else args.adam_weight_decay,
                "name": name,
            }
        )
    shared = {"lr": rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        if rate <= 0.1:
            log.warning(f"--learning_rate {rate} is low for prodigy, which scales it by an estimate: 1.0 is usual")
        return Prodigy(
            groups,
            **shared,
            beta3=args.prodigy_beta3,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **shared)
    return torch.optim.AdamW(groups, **shared, fused=accelerator.device.type in {"cpu", "cuda"})


def follow_average(args, accelerator, parameters, optimizer):
    """A moving average of the parameters that each step of the optimizer updates and checkpoints hold.

    None without --use_ema.
    """
    if not args.use_ema:
        return None
    average = EMAModel(parameters, decay=args.ema_decay)

    def update(*step):
        average.to(accelerator.device)  # a resumed average comes back on the CPU
        average.step(parameters)

    optimizer.optimizer.register_step_post_hook(update)
    accelerator.register_for_checkpointing(average)
    return average


@contextlib.contextmanager
def averaged(average, parameters):
    """The average in place of the parameters, for the length of a with block; nothing where there is none."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

MANIFEST = "dreambooth.json"  # written last: what the checkpoint holds and which flags it was trained with
WEIGHTS = "pytorch_lora_weights.safetensors"
COMFYUI_WEIGHTS = "comfyui_lora.safetensors"
MUST_MATCH = (
    "pretrained_model_name_or_path revision variant train_text_encoder optimizer use_8bit_adam rank lora_alpha"
    " use_rslora use_dora lora_layers lora_blocks bnb_quantization_config_path use_ema ema_decay processes"
).split()
MAY_DIFFER = (
    "output_dir logging_dir cache_dir report_to hub_model_id push_to_hub local_rank resume_from_checkpoint"
    " tracker_project_name tracker_run_name checkpointing_steps checkpoints_total_limit dataloader_num_workers"
    " max_train_steps num_train_epochs validation_prompt num_validation_images validation_epochs hub_private_repo"
    " dry_run"
).split()


def whole_state(accelerator, model):
    """A model's weights by name, whole on the main process. Called on each process, for each may have a part."""
    state = accelerator.get_state_dict(model) or {}  # ZeRO-3 hands the others None
    return {name.replace("_orig_mod.", ""): weight for name, weight in state.items()}


def save_weights(accelerator, trained, folder, dtype=torch.float32, header=None):
    """Writes the adapters as a file that StableDiffusion3Pipeline.load_lora_weights reads.

    Its header has what LoraConfig needs to rebuild them, in fields that any version of PEFT knows, and `header`.
    """
    from peft import get_peft_model_state_dict

    layers, fields = {}, {}
    for name, model in trained.items():
        state = whole_state(accelerator, model)
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
        state = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
        layers[f"{name}_lora_layers"] = {key: value.to(dtype) for key, value in state.items()}
        config = model.peft_config["default"]
        fields |= {f"{name}.r": config.r, f"{name}.lora_alpha": config.lora_alpha}
        fields |= {f"{name}.{field}": True for field in ("use_dora", "use_rslora") if getattr(config, field)}
        fields[f"{name}.target_modules"] = sorted(config.target_modules)
    if not accelerator.is_main_process:
        return
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(fields), **(header or {})}
    save = functools.partial(write_safetensors, header=header)
    StableDiffusion3Pipeline.save_lora_weights(folder, **layers, save_function=save)


def write_safetensors(weights, path, header):
    """Writes a safetensors file whose bytes depend on its contents alone: the library shuffles its header."""
    from safetensors.torch import save

    data = save(weights, header)
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def load_weights(accelerator, trained, folder):
    """Reads a checkpoint's adapters back. Errors: ValueError for a key too many or too few."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(Path(folder, WEIGHTS))
    for name, model in trained.items():
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if own.keys() != get_peft_model_state_dict(model, save_embedding_layers=False).keys():
            raise ValueError(f"the adapters of {name} in {folder} are not those of this run")
        set_peft_model_state_dict(model, own)
        cast_training_params(model, torch.float32)


def hook_weights(accelerator, trained):
    """Lets accelerate's save_state and load_state write and read the trained weights in the form users load."""

    def save(models, weights, folder):
        save_weights(accelerator, trained, folder)
        weights.clear()

    def load(models, folder):
        if models:  # FSDP2 and DeepSpeed hand over none: they read the parts that they have written themselves
            load_weights(accelerator, trained, folder)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def public_flags(args):
    """The run's flags without its secrets."""
    return {name: value for name, value in vars(args).items() if name != "hub_token"}


def sync_to_disk(path):
    """Has the operating system write a file or a folder's entries through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path):
    """CRC-32 of a file: it sees every flipped bit, at 3.7 GiB/s and core where SHA-256 does 1.4."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            total = zlib.crc32(block, total)
    return total


def lacks_room(error):
    """Whether an error is that of a full disk, quota or file: the libraries raise types of their own."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
    code = int(told[1]) if told else getattr(error, "errno", None)
    torch_says = any(words in str(error) for words in ("inline_container", "iostream error"))  # it keeps no code
    return code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or torch_says


@contextlib.contextmanager
def room_for(args, path, partial=""):
    """Ends the run in one line if a disk, a quota or a file is full when a with block writes `path`.

    Whatever the error is, no `partial` stays.
    """
    try:
        yield
    except Exception as error:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        if not lacks_room(error):
            raise
        kept = next(whole_checkpoints(args.output_dir), ["none"])[0]
        reason = " ".join(str(error).split())
        sys.exit(f"{path} could not be written ({reason}): make room and resume from the last checkpoint, {kept}")


def save_checkpoint(args, accelerator, step):
    """Writes checkpoint-{step}, which appears under that name only once it is whole, and then removes the oldest."""
    folder = Path(args.output_dir, f"checkpoint-{step}")
    partial = folder.with_name(f".{folder.name}.partial")
    accelerator.wait_for_everyone()
    with room_for(args, folder, partial):
        if accelerator.is_main_process:
            for left in folder.parent.glob(".checkpoint-*.partial"):  # by a run that was killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = [path for path in partial.rglob("*") if path.is_file()]
            manifest = {
                "step": step,
                "seed": args.seed,
                "flags": {**public_flags(args), "processes": accelerator.num_processes},
                "files": {str(path.relative_to(partial)): path.stat().st_size for path in files},
                "checksums": {str(path.relative_to(partial)): checksum(path) for path in files},
            }
            Path(partial, MANIFEST).write_text(json.dumps(manifest, indent=2))
            for path in partial.rglob("*"):
                sync_to_disk(path)
            sync_to_disk(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            sync_to_disk(folder.parent)
            remove_old_checkpoints(args, folder)
    accelerator.wait_for_everyone()
    log.info(f"Saved {folder}")


def checkpoint_step(folder):
    return int(Path(folder).name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir):
    """Folders named checkpoint-N, in no order; other names are left alone."""
    return [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def remove_old_checkpoints(args, newest):
    if args.checkpoints_total_limit is None:
        return
    older = [path for path in list_checkpoints(args.output_dir) if path != newest]
    older.sort(key=checkpoint_step, reverse=True)
    for path in older[args.checkpoints_total_limit - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def read_manifest(folder):
    """What a checkpoint holds. Errors: ValueError that says what is damaged."""
    try:
        manifest = json.loads(Path(folder, MANIFEST).read_text())
        manifest["step"], manifest["seed"], manifest["flags"]["processes"]
        for name, size in manifest["files"].items():
            if not Path(folder, name).is_file():
                raise ValueError(f"{name} is missing")
            if Path(folder, name).stat().st_size != size:
                raise ValueError(f"{name} has {Path(folder, name).stat().st_size} bytes, not {size}")
            known = manifest.get("checksums", {}).get(name)  # older checkpoints have none
            if known is not None and checksum(Path(folder, name)) != known:
                raise ValueError(f"{name} is not what was written: its checksum differs")
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is not a whole checkpoint: {error}") from error
    return manifest


def whole_checkpoints(output_dir):
    """Folder and manifest of each checkpoint, from the newest on; one that is damaged is named and passed over."""
    for folder in sorted(list_checkpoints(output_dir), key=checkpoint_step, reverse=True):
        try:
            yield folder, read_manifest(folder)
        except ValueError as error:
            log.warning(f"passed over: {error}")


def find_checkpoint(args, accelerator):
    """Folder and manifest of --resume_from_checkpoint, or (None, {}) where training starts anew. Settles the seed."""
    folder, manifest = choose_checkpoint(args, accelerator.num_processes)
    if args.seed is None:
        seed = manifest.get("seed", random.SystemRandom().randrange(2**32))
        args.seed = broadcast_object_list([seed])[0] if accelerator.num_processes > 1 else seed
    flags = {**public_flags(args), "processes": accelerator.num_processes}
    differ = {name: old for name, old in manifest.get("flags", {}).items() if name in flags and flags[name] != old}
    for name in MUST_MATCH:
        if name in differ:
            flag = "the number of processes" if name == "processes" else f"--{name}"
            refuse(f"{folder} was trained with {flag} {differ[name]!r}, this run has {flags[name]!r}: give the same")
    changed = [f"--{name} {flags[name]!r} was {old!r}" for name, old in differ.items() if name not in MAY_DIFFER]
    if changed:
        log.warning(f"the run goes on from {folder}, but not as it was: {', '.join(changed)}")
    return folder, manifest


def choose_checkpoint(args, processes):
    """Folder and manifest of --resume_from_checkpoint; of `latest` the newest whole one of as many processes."""
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None, {}
    if wanted != "latest":
        folder = next((path for path in (Path(wanted), Path(args.output_dir, wanted)) if path.is_dir()), None)
        if folder is None:
            refuse(f"--resume_from_checkpoint {wanted!r} is no folder, neither here nor in {args.output_dir!r}")
        try:
            return folder, read_manifest(folder)
        except ValueError as error:
            refuse(f"--resume_from_checkpoint: {error}")
    newest = None
    for folder, manifest in whole_checkpoints(args.output_dir):
        if manifest["flags"]["processes"] == processes:
            return folder, manifest
        log.warning(f"passed over: {folder} is of {manifest['flags']['processes']} processes, not of {processes}")
        newest = newest or (folder, manifest)
    if newest:
        return newest  # to be refused: starting anew would lose the work
    log.warning(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}, training starts anew")
    return None, {}


def resume(args, accelerator, trained, checkpoint, manifest):
    """Loads the checkpoint if there is one. Returns the update that training goes on from."""
    hook_weights(accelerator, trained)
    if checkpoint is None:
        return 0
    try:
        accelerator.load_state(checkpoint)
    except Exception as error:  # a damaged file of the right size leads its reader into any
        refuse(f"{checkpoint} cannot be loaded ({error}): take it away and resume from an older one")
    log.info(f"Resumed from {checkpoint}")
    return manifest["step"]


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


def share(accelerator, items):
    """This process's part of the items, as many as any other's has: the last one is repeated where they do not divide.

    Where weights are split over the processes (FSDP2, ZeRO-3), all of them take part in each forward pass.
    """
    with accelerator.split_between_processes(list(items), apply_padding=True) as mine:
        return mine


def gather_items(accelerator, items):
    """The dicts of all processes as one."""
    return dict(gather_object(list(items.items()))) if accelerator.num_processes > 1 else items


@contextlib.contextmanager
def evaluation(models):
    """Models in eval mode and without gradients, for the length of a with block."""
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model in models:
            model.train()


def draw_images(args, transformer, vae, scheduler, prompt, empty, seeds):
    """Images of one prompt, one a seed, by the base pipeline with its own number of steps and guidance.

    `prompt` and `empty` are embeds (1, S, D) and pooled embeds (1, P) of the prompt and of "". The VAE decodes in
    float32. Returns PIL images.
    """
    absent = dict.fromkeys(("vae", *TEXT_ENCODERS, *TOKENIZERS))
    scheduler = type(scheduler).from_config(scheduler.config)
    pipeline = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **absent)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt_embeds=prompt[0].expand(len(seeds), -1, -1),
        pooled_prompt_embeds=prompt[1].expand(len(seeds), -1),
        negative_prompt_embeds=empty[0].expand(len(seeds), -1, -1),
        negative_pooled_prompt_embeds=empty[1].expand(len(seeds), -1),
        height=args.resolution,
        width=args.resolution,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    latents = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    with torch.autocast(latents.device.type, enabled=False):
        pixels = vae.decode(latents).sample
    return VaeImageProcessor().postprocess(pixels, output_type="pil")


def generate_class_images(args, parts, accelerator):
    """Draws the class images that --class_data_dir still lacks with the base model, the processes sharing the work."""
    folder = Path(args.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    present = list_images(folder)[0]
    taken = {path.name.split("-")[0] for path in present}  # an interrupted run, or a user, may have left gaps
    free = [number for number in range(args.num_class_images) if str(number) not in taken]
    numbers = free[: max(args.num_class_images - len(present), 0)]
    accelerator.wait_for_everyone()  # nobody counts what another has already drawn
    if not numbers:
        return
    precision = args.prior_generation_precision or ("fp32" if accelerator.device.type == "cpu" else "fp16")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    table = PromptTable(args, parts, accelerator, dtype)
    table.fill(parts, [args.class_prompt, ""])
    transformer = load_frozen(args, parts, "transformer", accelerator.device, dtype)
    vae = load_frozen(args, parts, "vae", accelerator.device, torch.float32)
    scheduler = load_part(args, parts, "scheduler")
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(total=len(mine), desc="Drawing class images", disable=not accelerator.is_main_process)
    for first in range(0, len(mine), args.sample_batch_size):
        batch = mine[first : first + args.sample_batch_size]
        seeds = [derive_seed(args.seed, "class drawing", number) for number in batch]
        with evaluation([]):
            images = draw_images(args, transformer, vae, scheduler, table([args.class_prompt]), table([""]), seeds)
        for number, image in zip(batch, images, strict=True):
            save_image(image, folder / f"{number}-{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png")
        bar.update(len(batch))
    bar.close()
    del transformer, vae, table
    free_memory()
    accelerator.wait_for_everyone()


def save_image(image, path):
    """Writes a PNG that is either whole or not there."""
    partial = path.with_name(f".{path.name}")
    image.save(partial, format="PNG")
    partial.replace(path)


def measure_held_out(args, accelerator, transformer, vae_config, scheduler, embed, held_out):
    """Mean loss of the held-out images at eight noise levels each, whose noise is the same at every call and run."""
    levels, losses = noise_levels(scheduler, accelerator.device), {}
    for index in share(accelerator, range(len(held_out))):
        data = held_out[0, index, 1.0][0]
        moments = data["data"][None].to(accelerator.device)
        for level in range(8):
            latents, noise, _ = draw_latents(args, vae_config, moments, [derive_seed("held out", index, level)])
            u = torch.full((1,), (level + 0.5) / 8, device=accelerator.device)
            loss = flow_losses(args, transformer, levels, latents, noise, u, *embed([data["prompt"]]))
            losses[index, level] = loss.item()
    losses = gather_items(accelerator, losses)
    return math.fsum(losses.values()) / len(losses)


def validate(args, accelerator, trained, vae, scheduler, embed, held_out, step, final=False):
    """Logs the held-out loss, and draws --num_validation_images, as far as the flags ask for them.

    Image i is drawn from seed + i, kept as a file and sent to the trackers. Returns the paths on the main process.
    """
    if held_out:
        transformer = accelerator.unwrap_model(trained["transformer"], keep_torch_compile=False)
        with evaluation(trained.values()), accelerator.autocast():
            loss = measure_held_out(args, accelerator, transformer, vae.config, scheduler, embed, held_out)
        log_scalars(args, accelerator, {"validation_loss": loss}, step)
    return draw_validation(args, accelerator, trained, vae, scheduler, embed, step, final)


def draw_validation(args, accelerator, trained, vae, scheduler, embed, step, final):
    """The images of `validate`."""
    if not args.validation_prompt:
        return []
    transformer = accelerator.unwrap_model(trained["transformer"], keep_torch_compile=False)
    rest, images = vae.device, {}
    vae.to(accelerator.device)
    with evaluation(trained.values()), accelerator.autocast():
        prompt, empty = embed([args.validation_prompt]), embed([""])
        for number in share(accelerator, range(args.num_validation_images)):
            seed = [args.seed + number]
            try:
                images[number] = draw_images(args, transformer, vae, scheduler, prompt, empty, seed)[0]
            except Exception as error:  # raised below by all the processes, which else wait for this one
                images[number] = RuntimeError(f"{type(error).__name__}: {error}")
    vae.to(rest)
    free_memory()
    images = gather_items(accelerator, images)
    for image in images.values():
        if isinstance(image, Exception):
            raise image
    if not accelerator.is_main_process:
        return []
    images = [images[number] for number in sorted(images)]
    pattern = "image_{}.png" if final else f"validation/step-{step:06d}-{{}}.png"
    paths = [Path(args.output_dir, pattern.format(number)) for number in range(len(images))]
    paths[0].parent.mkdir(exist_ok=True)
    for path, image in zip(paths, images, strict=True):
        save_image(image, path)
    grid = tile_images(images, [""] * len(images), f"{args.validation_prompt}\nupdate {step}")
    save_image(grid, paths[0].with_name(paths[0].name.replace("0.png", "grid.png")))
    append_row(args, {"step": step, "drawn": str(paths[0].relative_to(args.output_dir))})
    if final:
        draw_strip(args, step)
    log_images(args, accelerator, "test" if final else "validation", images, step)
    return paths


STRIP, CURVES = "validation.png", "loss.png"


def tile_images(images, labels, text, columns=None):
    """Images of one size in rows, a label under each and lines of text under all, on white."""
    width, height = images[0].size
    columns = columns or math.ceil(len(images) ** 0.5)
    size = max(12, width // 24)
    font = ImageFont.load_default(size)
    below = 2 * size if any(labels) else 0
    wide, tall = max(columns * width, 16 * size), math.ceil(len(images) / columns) * (height + below)
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, int(wide / size / 0.6)) or [""]]
    canvas = Image.new("RGB", (wide, tall + size + len(lines) * size * 3 // 2), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = number % columns * width, number // columns * (height + below)
        canvas.paste(image, (left, top))
        draw.text((left + size // 2, top + height + size // 4), label, "black", font)
    for number, line in enumerate(lines):
        draw.text((size // 2, tall + size // 2 + number * size * 3 // 2), line, "black", font)
    return canvas


def draw_strip(args, step):
    """Writes STRIP: the first image of up to twelve validations of the run, from first to last."""
    drawn = {row["step"]: Path(args.output_dir, row["drawn"]) for row in read_rows(args) if "drawn" in row}
    drawn = sorted((number, path) for number, path in drawn.items() if path.is_file())
    count = min(len(drawn), 12)
    drawn = [drawn[round(n * (len(drawn) - 1) / max(count - 1, 1))] for n in range(count)]
    images = [Image.open(path).convert("RGB").resize((256, 256)) for _, path in drawn]
    strip = tile_images(images, [f"update {number}" for number, _ in drawn], args.validation_prompt, columns=count)
    save_image(strip, Path(args.output_dir, STRIP))


def scalars_file(args):
    return Path(args.output_dir, args.logging_dir, "scalars.jsonl")


def append_row(args, row):
    with scalars_file(args).open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(args):
    """What the run has logged, a dict a line; a line that a crash cut off is passed over."""
    path, rows = scalars_file(args), []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def track(accelerator, send):
    """Does something with each tracker; one that fails is named and left out from then on, for the run goes on."""
    for tracker in list(accelerator.trackers):
        try:
            send(tracker)
        except Exception as error:  # whatever its client raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.warning(f"the tracker {tracker.name} failed and gets nothing more ({reason})")
            accelerator.trackers.remove(tracker)


def log_scalars(args, accelerator, figures, step):
    """Sends figures of an update to the trackers and to logs/scalars.jsonl, which the curves are drawn from."""
    track(accelerator, lambda tracker: tracker.log(figures, step=step))
    if accelerator.is_main_process:
        append_row(args, {"step": step, **figures})


def draw_curves(args):
    """Writes CURVES: the loss of each update, its running mean, and the held-out loss, over the updates."""
    rows = read_rows(args)
    raw = [(row["step"], row["loss"]) for row in rows if math.isfinite(row.get("loss", math.nan))]
    held_out = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if not raw:
        return
    mean, smooth = raw[0][1], []
    for step, loss in raw:
        mean += (loss - mean) * max(1 / (1 + len(smooth)), 0.05)
        smooth.append((step, mean))
    points = raw + held_out
    low, high = min(y for _, y in points), max(y for _, y in points)
    last, high = max(x for x, _ in points), high if high > low else low + 1
    image = Image.new("RGB", (1600, 900), "white")  # halved in the end, which smooths the lines
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(28)
    place = lambda x, y: (140 + 1400 * x / last, 800 - 720 * (y - low) / (high - low))  # noqa: E731
    for n in range(5):
        x, y = last * n / 4, low + (high - low) * n / 4
        draw.line([place(0, y), place(last, y)], "#dddddd", 2)
        draw.text((place(0, y)[0] - 16, place(0, y)[1]), f"{y:.3g}", "black", font, anchor="rm")
        draw.text((place(x, low)[0], 816), f"{x:.0f}", "black", font, anchor="mt")
    curves = [(raw, "#bcd2ea", 3), (smooth, "#1f5fa8", 5), (held_out, "#d1495b", 5)]
    for curve, color, width in curves:
        draw.line([place(*point) for point in curve], color, width)
        for point in curve if len(curve) < 30 else []:
            draw.circle(place(*point), 6, color)
    names = ["loss", "running mean", "held-out loss"]
    for n, (name, (curve, color, _)) in enumerate(zip(names, curves, strict=True)):
        if curve:
            draw.text((160 + 320 * n, 20), name, color, font)
    draw.text((1540, 856), "update", "black", font, anchor="rt")
    save_image(image.resize((800, 450)), Path(args.output_dir, CURVES))


def log_images(args, accelerator, name, images, step):
    """Sends images to the trackers, with their captions where a tracker has a place for them."""
    captions = [f"{number}: {args.validation_prompt}" for number in range(len(images))]
    pairs = list(enumerate(zip(images, captions, strict=True)))
    track(accelerator, functools.partial(send_images, name=name, pairs=pairs, step=step))


def send_images(tracker, name, pairs, step):
    """One tracker's part of `log_images`; `pairs` are (number, (image, caption)) each."""
    match tracker.name:
        case "wandb" | "swanlab":
            picture = importlib.import_module(tracker.name).Image
            tracker.log({name: [picture(image, caption=caption) for _, (image, caption) in pairs]}, step=step)
        case "trackio":
            picture = importlib.import_module("trackio").Image
            tracker.log({f"{name}_{number}": picture(*pair) for number, pair in pairs}, step=step)
        case "aim":
            tracker.log_images({f"{name}_{number}": pair for number, pair in pairs}, step=step)
        case "comet_ml":
            for number, (image, caption) in pairs:
                metadata = {"caption": caption}
                tracker.tracker.log_image(image, name=f"{name}_{number}", step=step, metadata=metadata)
        case "mlflow":
            for number, (image, _) in pairs:
                importlib.import_module("mlflow").log_image(image, key=f"{name}_{number}", step=step)
        case "dvclive":
            for number, (image, _) in pairs:
                tracker.tracker.log_image(f"{name}_{number}_{step:06d}.png", image)
        case "clearml":
            for number, (image, _) in pairs:
                tracker.tracker.get_logger().report_image(name, str(number), iteration=step, image=image)
        case "tensorboard":
            pixels = np.stack([np.asarray(image) for _, (image, _) in pairs])
            tracker.log_images({name: pixels}, step=step, dataformats="NHWC")


# ---------------------------------------------------------------------------------------------------------------------
# The result and the Hub
# ---------------------------------------------------------------------------------------------------------------------


def save_result(args, accelerator, parts, trained, step):
    """Writes what was trained to output_dir, in the precision of training unless --upcast_before_saving."""
    dtype = torch.float32 if args.upcast_before_saving else frozen_dtype(accelerator)
    save_weights(accelerator, trained, args.output_dir, dtype, describe_file(args, step))
    save_for_comfyui(accelerator, trained, args.output_dir, dtype)
    accelerator.wait_for_everyone()


def describe_file(args, step):
    """Entries for the header of the adapters' file: those of the ModelSpec standard that interfaces show.

    For what it has no name for, those of kohya's sd-scripts, which the same interfaces read.
    """
    family, base = name_base_model(args)[0], str(args.pretrained_model_name_or_path)
    script = f"train_dreambooth_lora_sd3.py {VERSION}"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.lower().replace(' ', '-')}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"LoRA: {args.instance_prompt or base}",
        "modelspec.description": f"LoRA of {base}, {step} updates by {script}",
        "modelspec.resolution": f"{args.resolution}x{args.resolution}",
        "modelspec.trigger_phrase": args.instance_prompt or "",
        "ss_sd_model_name": base,
        "ss_steps": str(step),
        "ss_training_script": script,
    }


def save_for_comfyui(accelerator, trained, folder, dtype):
    """Writes the adapters again for ComfyUI where it would apply pytorch_lora_weights.safetensors wrongly.

    ComfyUI reads the same names, but takes the scale from a tensor `alpha` beside each pair, 1 without it, and DoRA's
    magnitude as a factor of the base weight's norm, where PEFT's is of the adapted weight's. diffusers refuses such
    tensors, hence two files.
    """
    path, weights = Path(folder, COMFYUI_WEIGHTS), {}
    for name, model in trained.items():
        state = whole_state(accelerator, model)
        for layer_name, layer in accelerator.unwrap_model(model, keep_torch_compile=False).named_modules():
            if not hasattr(layer, "lora_A") or not accelerator.is_main_process:
                continue
            down, up = (state[f"{layer_name}.lora_{half}.default.weight"] for half in "AB")
            scale = layer.scaling["default"]
            key = f"{name}.{layer_name}"
            weights |= {f"{key}.lora_A.weight": down.to(dtype), f"{key}.lora_B.weight": up.to(dtype)}
            weights[f"{key}.alpha"] = torch.tensor(scale * len(down), dtype=torch.float64)
            if layer.use_dora["default"]:
                base = state[f"{layer_name}.base_layer.weight"].float()
                norms = [weight.norm(dim=1) for weight in (base, base + scale * (up @ down))]
                magnitude = state[f"{layer_name}.lora_magnitude_vector.default.weight"]
                weights[f"{key}.dora_scale"] = (magnitude * norms[0] / norms[1])[:, None]
    if not accelerator.is_main_process:
        return
    path.unlink(missing_ok=True)
    config = accelerator.unwrap_model(trained["transformer"], keep_torch_compile=False).peft_config["default"]
    if config.use_dora or scale != 1:
        weights = {key: weight.detach().cpu().contiguous() for key, weight in weights.items()}
        write_safetensors(weights, path, {"format": "pt"})


UPLOADED = [WEIGHTS, COMFYUI_WEIGHTS]


def absent_parts(args):
    """Parts that diffusers has to be told not to expect, {name: None}: T5 and its tokenizer where there are none."""
    return {name: None for name in ("text_encoder_3", "tokenizer_3") if name not in read_pipeline(args)}


def describe_method(args, repository):
    """Title and tags of the model card, and the lines of its program that load the pipeline."""
    title = f"SD3 DreamBooth LoRA - {repository}"
    tags = ["lora", "template:sd-lora"]
    options = {name: getattr(args, name) for name in ("revision", "variant") if getattr(args, name)}
    options |= absent_parts(args)
    base = ", ".join([repr(args.pretrained_model_name_or_path), *(f"{key}={options[key]!r}" for key in options)])
    usage = f"pipeline = StableDiffusion3Pipeline.from_pretrained({base}, dtype=dtype)\n"
    usage += f"pipeline.load_lora_weights({repository!r})\n"
    return title, tags, usage


def name_base_model(args):
    """Family of the base model by its transformer's config and its name, with the name and page of its licence."""
    config = read_transformer_config(args)
    turbo = " Turbo" if "turbo" in str(args.pretrained_model_name_or_path).lower() else ""
    if config.get("dual_attention_layers"):
        family, page = "Stable Diffusion 3.5 Medium", "stable-diffusion-3.5-medium"
    elif config.get("qk_norm"):
        family = f"Stable Diffusion 3.5 Large{turbo}"
        page = family.lower().replace(" ", "-")
    else:
        family, page = "Stable Diffusion 3 Medium", "stable-diffusion-3-medium"
    return family, "stabilityai-ai-community", f"https://huggingface.co/stabilityai/{page}/blob/main/LICENSE.md"


CARD_LINE = "<!-- The next run writes anew what is above this line ({}), and keeps what is below. -->"


def read_card(path):
    """Front matter of an earlier card, and the text in it that the run would lose.

    That is what stands below the line, and all of the text if a person has changed it above the line or wrote it all.
    """
    if not path.is_file():
        return {}, "\n"
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    above, line, below = card.text.partition(CARD_LINE.split("(")[0])
    digest, _, below = below.partition("-->")
    if digest[1:].startswith(hash_text(above)):
        return card.data.to_dict(), below
    return card.data.to_dict(), f"\n\n{above.strip()}\n{below}"


def hash_text(text):
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def describe_run(args, accelerator, step):
    """How the weights were trained: updates, time, hardware, versions, and the flags that differ from the defaults."""
    hidden = "hub_token hub_model_id hub_private_repo push_to_hub local_rank output_dir resume_from_checkpoint".split()
    parser, flags = build_parser(), []
    for name, value in public_flags(args).items():
        if name in hidden or value == parser.get_default(name):
            continue
        if isinstance(value, str) and Path(value).is_dir():
            value = Path(value).name  # a card is public, the folders above are not
        flags.append(f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}")
    minutes, device = (time.monotonic() - STARTED) / 60, accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if device.type == "cuda":
        name += f" ({torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB used)"
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"""Update {step}, after {minutes:.0f} minutes on {accelerator.num_processes} x {name}, by
{Path(__file__).name} {VERSION} with {versions} and these flags:

```sh
{" ".join(flags)}
```"""


def write_card(args, accelerator, repository, step, image_paths):
    """Writes the model card, README.md, with the final images as its gallery; what a person added to it stays."""
    (family, license_name, license_link), (title, tags, usage) = (
        name_base_model(args),
        describe_method(args, repository),
    )
    prompt = args.validation_prompt or args.instance_prompt or ""
    base = str(args.pretrained_model_name_or_path)
    version = "sd3.5" if "3.5" in family else "sd3"
    path = Path(args.output_dir, "README.md")
    added, kept = read_card(path)
    data = {
        "license": "other",
        "license_name": license_name,
        "license_link": license_link,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers-training", "diffusers", version, f"{version}-diffusers", *tags],
        "instance_prompt": args.instance_prompt,
        "widget": [{"text": prompt, "output": {"url": path.name}} for path in image_paths] or None,
    }
    if not Path(base).is_dir():  # the Hub refuses a card whose base model is no id
        data |= {"base_model": base, "base_model_relation": "adapter" if "lora" in tags else "finetune"}
    encoders = f", with {' and '.join(TRAINED_ENCODERS)}" if args.train_text_encoder else ""
    trigger = f"Write `{args.instance_prompt}` in a prompt to see the subject." if args.instance_prompt else ""
    data = {**added, **data, "tags": list(dict.fromkeys(data["tags"] + added.get("tags", [])))}
    strip = f"![First image of each validation]({STRIP})\n" if image_paths else ""
    curves = f"![Loss of the updates]({CURVES})\n" if Path(args.output_dir, CURVES).is_file() else ""
    text = f"""# {title}

{"<Gallery />" if image_paths else ""}

DreamBooth weights for {base} ({family}){encoders}. {trigger}

```py
import torch
from diffusers import StableDiffusion3Pipeline

device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
{usage}pipeline.to(device)
image = pipeline(
    {prompt!r},
    height={args.resolution},
    width={args.resolution},
    max_sequence_length={args.max_sequence_length},
).images[0]
image.save("image.png")
```

## Training

{strip}{curves}
{describe_run(args, accelerator, step)}

The base model's [licence]({license_link}) holds for these weights.

"""
    front = ModelCardData(**data).to_yaml()
    path.write_text(f"---\n{front}\n---\n\n{text}{CARD_LINE.format(hash_text(text))}{kept}", encoding="utf-8")


def open_repository(args, accelerator):
    """Creates the Hub repository, or refuses: better at the start than after hours. A dry run creates none.

    Returns its id; without --push_to_hub the output folder, from where the card's program loads then.
    """
    if not args.push_to_hub or not accelerator.is_main_process:
        return args.output_dir
    from huggingface_hub import auth_check, create_repo, repo_exists, whoami

    repository = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        shared = {"token": args.hub_token}
        if args.dry_run:
            user = whoami(**shared)
            owner = repository.partition("/")[0] if "/" in repository else user["name"]
            if owner not in (user["name"], *(group["name"] for group in user["orgs"])):
                raise PermissionError(f"{owner} is neither {user['name']} nor a group with {user['name']} in it")
            repository = f"{owner}/{repository.rpartition('/')[2]}"
            if not repo_exists(repository, **shared):
                return repository
        else:
            private = args.hub_private_repo or None
            repository = create_repo(repository, private=private, exist_ok=True, **shared).repo_id
        auth_check(repository, write=True, **shared)  # create_repo passes over one that is there and not ours
        return repository
    except Exception as error:  # also those of whichever HTTP client the Hub's library uses
        refuse(
            f"--push_to_hub: the repository {repository!r} cannot be created or written: give --hub_model_id USER/NAME"
            f" and a token that may write, by `hf auth login` or in HF_TOKEN ({error})"
        )


PUSHED = ["README.md", *UPLOADED, "image_[0-9]*.png", "image_grid.png", STRIP, CURVES]


def push(args, repository):
    """Uploads weights, card and images, and nothing else of the folder: no checkpoint, no log, no file of yours."""
    from huggingface_hub import upload_folder

    upload_folder(
        repo_id=repository,
        folder_path=args.output_dir,
        commit_message="End of training",
        allow_patterns=PUSHED,
        token=args.hub_token,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def start_accelerator(args):
    """The accelerator with its trackers not yet started, and output_dir."""
    folder = Path(args.output_dir, args.logging_dir)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to.split(","),
            project_config=ProjectConfiguration(args.output_dir, str(Path(folder, args.tracker_run_name or ""))),
            dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
            # The launcher ends the others when a process dies; they may wait for long while one saves to a slow disk.
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
                # The one buffer is the table of positions, 226 MB in SD3 Medium; it never changes.
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    except ValueError as error:
        refuse(f"--mixed_precision {args.mixed_precision}: {error}")
    if accelerator.state.deepspeed_plugin is not None:
        from transformers.integrations import unset_hf_deepspeed_config

        # DeepSpeed wants a number, and batches here differ in length.
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        unset_hf_deepspeed_config()  # else ZeRO-3 would split the frozen encoders, whatever zero3_init_flag says
    engine = accelerator.distributed_type.value
    if args.use_ema and engine in ("FSDP", "DEEPSPEED"):
        refuse(f"--use_ema needs the whole weights on each process, {engine} splits them")
    if args.train_text_encoder and engine in ("FSDP", "DEEPSPEED"):
        refuse(f"--train_text_encoder: with {engine} accelerate trains one model alone: leave it out, or use DDP")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    if accelerator.num_processes > 1:
        number_warnings(accelerator.process_index)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_encoded(args)  # of a run that was killed
        atexit.register(remove_encoded, args)
    accelerator.wait_for_everyone()
    return accelerator


def number_warnings(rank):
    """Puts the number of the process before the warnings of Python and the libraries; `log` does it by itself."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(levelname)s: [RANK {rank}] %(message)s"))
    logging.captureWarnings(True)
    for name in "py.warnings accelerate datasets diffusers huggingface_hub peft transformers".split():
        library = logging.getLogger(name)
        library.handlers, library.propagate = [handler], False


def remove_encoded(args):
    shutil.rmtree(Path(args.output_dir, ENCODED), ignore_errors=True)


def start_trackers(args, accelerator, step):
    """Starts the trackers, with the flags less the secrets as the run's configuration, and the file of scalars."""
    plain = (bool, int, float, str)
    config = {name: value if isinstance(value, plain) else str(value) for name, value in public_flags(args).items()}
    folder, run = str(Path(args.output_dir, args.logging_dir)), args.tracker_run_name
    options = {"wandb": {"dir": folder, "name": run}, "dvclive": {"dir": folder}, "swanlab": {"logdir": folder}}
    if run:
        names = {"trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name", "clearml": "task_name"}
        for tracker, name in names.items():
            options[tracker] = options.get(tracker, {}) | {name: run}
    if accelerator.is_main_process:
        rows = [row for row in read_rows(args) if row["step"] <= step]  # a resumed run writes the later ones anew
        scalars_file(args).parent.mkdir(parents=True, exist_ok=True)
        scalars_file(args).write_text("")
        for row in rows if step else []:
            append_row(args, row)
    try:
        accelerator.init_trackers(args.tracker_project_name, config=config, init_kwargs=options)
    except Exception as error:  # whatever its client raises
        refuse(f"--report_to {args.report_to}: a tracker does not start ({error}): mend it or leave it out")
    for tracker in accelerator.trackers:
        if tracker.name == "comet_ml" and run and accelerator.is_main_process:
            tracker.tracker.set_name(run)


def prepare_models(args, parts, accelerator, targets, total):
    """The models to train as accelerate runs them, with the optimizer and its schedule over `total` updates."""
    trained = load_trained(args, parts, accelerator, targets)
    optimizer = make_optimizer(args, accelerator, trained)
    schedule = make_schedule(args, accelerator, optimizer, total)
    *models, optimizer, schedule = accelerator.prepare(*trained.values(), optimizer, schedule)
    return dict(zip(trained, models, strict=True)), optimizer, schedule


def catch_signals():
    """A list that SIGTERM, SIGINT and SIGUSR1 put their number into; a second one ends the process at once.

    `accelerate launch` passes no signal on: send it to the training process, or start that by python or torchrun.
    """
    caught = []

    def catch(number, frame):
        if caught:
            os._exit(128 + number)
        caught.append(number)

    for number in stop_signals():
        signal.signal(number, catch)
    return caught


def stop_signals():
    """SIGUSR1 is SLURM's warning; Windows has none."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


def outlive_signals(worker):
    """Has a loader process leave signals to the training process, which needs its batches to finish the update."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C and a launcher signal the whole group
    for number in stop_signals():  # torch itself ends the process by SIGTERM
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def all_prompts(args, dataset, held_out):
    """Every prompt that the run encodes."""
    validation = {args.validation_prompt, ""} if args.validation_prompt else set()
    return dataset.all_prompts() | held_out.all_prompts() | validation


def encode_once(args, parts, accelerator, targets, dataset, held_out):
    """The prompts' table and the VAE, after all that is encoded before training.

    Each text encoder that is frozen speaks and leaves, then the VAE comes, and the transformer after this: the memory
    of a run is that of the largest, not of all.
    """
    embed = PromptTable(args, parts, accelerator, frozen_dtype(accelerator), targets)
    embed.fill(parts, all_prompts(args, dataset, held_out))
    vae = load_frozen(args, parts, "vae", accelerator.device, torch.float32)
    if args.cache_latents:
        cache_moments(dataset, vae, accelerator)
    cache_moments(held_out, vae, accelerator)
    return embed, vae.to(resting_device(args, accelerator))


def make_loader(args, accelerator, dataset):
    """Batches on the device, this process's share of them, and the sampler that orders them."""
    sampler = EpochSampler(dataset, args.train_batch_size, accelerator.num_processes, args.seed)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        worker_init_fn=outlive_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    return accelerator.prepare(loader), sampler


def make_schedule(args, accelerator, optimizer, total):
    """The learning rate over `total` updates; accelerate steps it once a process, hence the products."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=total * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def first_epoch(step, updates, total):
    """The epoch that training goes on in: that of the last update done, so that its validation is not missed.

    A finished run has none left.
    """
    return max(step - 1, 0) // updates if step < total else total


def read_update(args, accelerator, seen, norm, caught):
    """Figures of an update, averaged over its batches and the processes, and the signal that any process caught.

    `seen` has a tensor (2,) of instance and prior loss a batch. This is where the host waits for the device, once an
    update. Returns {name: float} and the signal's number or 0.
    """
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2: each process has a part of it
    others = [torch.as_tensor(value).to(seen[0]).view(1) for value in (norm, *(caught[:1] or [0]))]
    row = torch.cat([torch.stack(seen).mean(dim=0), *others])
    if accelerator.num_processes > 1:
        rows = accelerator.gather(row[None])
        row = torch.cat([rows[:, :3].mean(dim=0), rows[:, 3].amax(dim=0, keepdim=True)])
    instance, prior, norm, number = row.tolist()
    seen.clear()
    figures = {"loss": instance + args.prior_loss_weight * prior, "grad_norm": norm}
    if args.with_prior_preservation:
        figures |= {"instance_loss": instance, "prior_loss": prior}
    return figures, int(number)


def is_sound(args, accelerator, figures, step, skipped):
    """Whether an update may reach the weights. `skipped` collects those that may not; ten in a row end the run."""
    if all(math.isfinite(value) for value in figures.values()):
        return True
    scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 0
    if scale > 1 and math.isfinite(figures["loss"]):  # at 1 it is no longer the scale that overflows
        log.info(f"update {step}: float16 gradients overflowed, the scaler skips it and lowers its scale")
        return True
    skipped.append(step)
    log.warning(f"update {step} is skipped, {len(skipped)} so far: {figures}")
    figures["skipped_updates"] = len(skipped)
    if skipped[-10:] == list(range(step - 9, step + 1)):
        kept = next(whole_checkpoints(args.output_dir), ["none"])[0]
        sys.exit(f"ten updates in a row were not finite: lower the rate, resume from the last checkpoint ({kept})")
    return False


def log_update(args, accelerator, bar, optimizer, schedule, figures, step):
    """One log point of an update, and the bar's figures."""
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        figures["lr" if group["name"] == "transformer" else f"lr_{group['name']}"] = rate
    bar.update()
    bar.set_postfix(loss=f"{figures['loss']:.4f}", lr=f"{figures['lr']:.2e}")
    log_scalars(args, accelerator, figures, step)


def close_trackers(accelerator):
    """Closes the trackers. Returns the names of those that failed, now or before."""
    track(accelerator, lambda tracker: tracker.finish())
    closed = [tracker.name for tracker in accelerator.trackers]
    accelerator.trackers.clear()
    return [str(name) for name in accelerator.log_with if str(name) not in closed]


def stop_cleanly(args, accelerator, step, number):
    """Ends the run after a signal, with the way to go on."""
    close_trackers(accelerator)
    accelerator.end_training()
    if accelerator.is_main_process:
        name, folder = signal.Signals(number).name, Path(args.output_dir, f"checkpoint-{step}")
        tqdm.write(f"{name}: saved {folder}; add --resume_from_checkpoint latest to go on", file=sys.stderr)
    sys.exit(128 + number)


@contextlib.contextmanager
def going_on(failed, what, again):
    """Says what went wrong in a with block, and adds it to `failed` with how to repeat it; the run goes on."""
    try:
        yield
    except Exception as error:  # the weights are on disk: nothing that drawing or a tracker raises is worth them
        failed.append((what, again))
        log.error(f"{what} failed ({type(error).__name__}: {' '.join(str(error).split())})", main_process_only=False)


AGAIN = "the same command with --resume_from_checkpoint latest repeats that alone"


def finish(args, accelerator, parts, trained, step, check, repository):
    """Weights first, then the final images, the card and the upload: if one of these fails, the others are done.

    Returns what failed and how to repeat it.
    """
    with room_for(args, args.output_dir):
        save_result(args, accelerator, parts, trained, step)
    paths, failed = [], []
    with going_on(failed, "drawing the final images", AGAIN):
        paths = check(step, final=True)
    if accelerator.is_main_process:
        with going_on(failed, "drawing the loss curves", AGAIN):
            draw_curves(args)
        with going_on(failed, "writing the model card", AGAIN):
            write_card(args, accelerator, repository, step, paths)
        failed += [(f"the tracker {name}", f"see {scalars_file(args)}") for name in close_trackers(accelerator)]
    if accelerator.is_main_process and args.push_to_hub:
        include = " ".join(f"--include '{name}'" for name in PUSHED)
        with going_on(failed, "the upload", f"hf upload {repository} {args.output_dir} . {include}"):
            push(args, repository)
    return failed


def end(args, accelerator, step, failed):
    """Ends the run: if a step after the weights failed, with a checkpoint from which it alone can be repeated."""
    saved = step % args.checkpointing_steps == 0 and Path(args.output_dir, f"checkpoint-{step}").is_dir()
    missing = AGAIN in dict(failed).values() and not saved
    if accelerator.num_processes > 1:
        failed, missing = broadcast_object_list([failed, missing])
    if missing:
        save_checkpoint(args, accelerator, step)
    accelerator.end_training()
    if accelerator.is_main_process:
        remove_encoded(args)
    if failed:
        remedies = dict.fromkeys(again for _, again in failed)
        steps = [f"{', '.join(w for w, again in failed if again == r)} failed: {r}" for r in remedies]
        message = f"the weights are whole in {args.output_dir}, but {'; '.join(steps)}"
        sys.exit(message if accelerator.is_main_process else 1)
    log.info(f"The result is in {args.output_dir}")


def count_result(args, accelerator, trained, stored):
    """Bytes of the final result, the adapters."""
    half = frozen_dtype(accelerator) != torch.float32 and not args.upcast_before_saving
    return sum(p.numel() for model in trained.values() for p in trained_parameters(model)) * (2 if half else 4)


SHEET, MOST = "dry_run.png", 200  # pictures on the sheet


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that come and go within a with block: `live`, and at most `peak`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]:
            self.seen[tensor.untyped_storage()] = True  # a view of a weight is no new memory
        result = function(*args, **(kwargs or {}))
        for tensor in [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]:
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen[storage] = True
                self.change(storage.nbytes())
                weakref.finalize(storage, self.change, -storage.nbytes())
        return result

    def change(self, count):
        self.live += count
        self.peak = max(self.peak, self.live)


def count_peak(function, *inputs):
    """What a function returns, and how many bytes it takes at most besides what was there before."""
    with PeakBytes() as counted:
        return function(*inputs), counted.peak


def weigh(*models):
    """Bytes of the models' weights."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def draw_sheet(args, dataset):
    """Writes SHEET: the pictures of the first epoch as the model would get them, each above its prompt."""
    kinds = ["instance", "class"] if None not in dataset.images["class"] else ["instance"]
    places = [(kind, number) for kind in kinds for number in range(len(dataset.images[kind]))]
    tiles = []
    for kind, number in places[:MOST]:
        key = kind, number, dataset.size(number)
        seed = derive_seed(args.seed, "cache", *key) if args.cache_latents else derive_seed(args.seed, kind, 0, number)
        pixels = (dataset.pixels(*key, seed) + 1) * 127.5
        picture = Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
        picture.thumbnail((192, 192))
        tile = Image.new("RGB", (208, 256), "white")
        tile.paste(picture, ((208 - picture.width) // 2, 200 - picture.height))
        lines = textwrap.wrap(dataset.prompts[kind][number], 32, max_lines=3, placeholder=" ...")
        ImageDraw.Draw(tile).text((8, 204), "\n".join(lines), "black", ImageFont.load_default(12))
        tiles.append(tile)
    said = f"{len(tiles)} of {len(places)} pictures, cropped as in the first epoch"
    save_image(tile_images(tiles, [""] * len(tiles), said), Path(args.output_dir, SHEET))
    return said


def list_weights(args, parts):
    """Bytes of the weight files of each model, in the folder or on the Hub. A model that has none is refused."""
    model = args.pretrained_model_name_or_path
    if Path(model).is_dir():
        sizes = {str(path.relative_to(model)): path.stat().st_size for path in Path(model).rglob("*.*")}
    else:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(model, revision=args.revision, files_metadata=True)
        except Exception as error:  # also those of whichever HTTP client the Hub's library uses
            refuse(f"--pretrained_model_name_or_path {model!r}: the Hub does not list its files ({error})")
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    stored, ending = {}, rf"\.{re.escape(args.variant)}" if args.variant else ""
    for name in [name for name in parts if not name.startswith(("tokenizer", "scheduler"))]:
        for suffix in ("safetensors", "bin"):
            pattern = rf"{name}/[\w-]+{ending}(-\d+-of-\d+)?\.{suffix}"
            stored[name] = stored.get(name) or sum(sizes[file] for file in sizes if re.fullmatch(pattern, file))
        if not stored[name]:
            refuse(
                f"--pretrained_model_name_or_path {model!r} has no weights of {name} in the variant that is asked for"
            )
    return stored


def optimizer_bytes(args):
    """Bytes of the optimizer's state for each parameter."""
    return 2 if args.use_8bit_adam else {"AdamW": 8, "prodigy": 16}[args.optimizer]


def count_drawing(args, accelerator, transformer, vae, embeds, pooled, count):
    """Bytes that it takes to draw images with guidance, `count` at a time, besides the models."""
    side = args.resolution // 8
    latents = torch.empty(count, vae.config.latent_channels, side, side)
    with torch.no_grad(), accelerator.autocast():
        two = [tensor[:1].expand(2 * count, *tensor.shape[1:]) for tensor in (embeds, pooled)]
        inputs = torch.cat([latents, latents]), two[0], two[1], torch.empty(2 * count)
        work = count_peak(transformer, *inputs)[1]
        return max(work, count_peak(vae.decode, latents)[1])


def make_fake(model, device):
    """Moves a model from the meta device to fake tensors, which know the device that they stand for."""
    made = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in made:  # T5 has one table of words under two names
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    made[id(old)] = (
                        torch.nn.Parameter(new, old.requires_grad) if tensors is module._parameters else new
                    )
                tensors[name] = made.get(id(old))


def sketch_models(args, accelerator, parts, targets):
    """Every model of the run on the meta device, in its precision and with what is trained in it."""
    models = {}
    for name in [name for name in parts if name in (*TEXT_ENCODERS, "vae", "transformer")]:
        dtype = trained_dtype(accelerator) if name in targets else frozen_dtype(accelerator)
        models[name] = model = sketch_part(args, parts, name)
        torch.nn.Module.to(model, torch.float32 if name == "vae" else dtype)  # diffusers would warn
        if name in targets:
            make_trainable(args, model.train(), targets[name])
            if args.gradient_checkpointing and name == "transformer":
                model.enable_gradient_checkpointing()
            elif args.gradient_checkpointing:
                model.activation_checkpointing_enable()
    return models


def count_update(args, accelerator, targets, models, texts, moments):
    """Bytes that forward and backward pass take, gradients with them, and the text of a batch."""
    batch, width = len(moments), models["transformer"].config.joint_attention_dim

    def text(name):
        if name in targets:
            return encode_text(name, models[name], torch.zeros(batch, texts[name][0][0].shape[1], dtype=torch.long))
        if name not in texts:
            return torch.zeros(batch, args.max_sequence_length, width, dtype=frozen_dtype(accelerator)), None
        return [None if state is None else state.expand(batch, *state.shape[1:]) for state in texts[name][0]]

    def update():
        with accelerator.autocast():
            embeds, pooled = join_embeds([text(name) for name in TEXT_ENCODERS], width)
        levels, u = (torch.zeros(1000), torch.zeros(1001)), torch.zeros(batch)
        latents = moments.chunk(2, dim=1)[0]
        with accelerator.autocast():
            losses = flow_losses(args, models["transformer"], levels, latents, latents, u, embeds, pooled)
        losses.mean().backward()
        return embeds.detach(), pooled.detach()

    return count_peak(update)


def estimate_stages(args, accelerator, models, targets, size, tokens, lacking):
    """Bytes that each stage of the run takes on the device, and those of one text and one latent on the disk.

    The run's own functions do the work of each stage on fake tensors, which have a size and no values, and what they
    make is counted. `size` is that of the largest image, `lacking` whether class images are to be drawn.
    """
    texts = {}
    for name, model in models.items():
        make_fake(model, accelerator.device)
        if name in TEXT_ENCODERS:
            length = args.max_sequence_length if name == "text_encoder_3" else tokens
            with torch.no_grad():
                texts[name] = count_peak(encode_text, name, model, torch.zeros(1, length, dtype=torch.long))
    vae, transformer = models["vae"], models["transformer"]
    stages = {n: weigh(models[n]) + texts[n][1] for n in texts if n not in targets}
    batch = args.train_batch_size * (1 + args.with_prior_preservation)
    with torch.no_grad():
        _, encoding = count_peak(vae.encode, torch.empty(1 if args.cache_latents else batch, 3, *size))
    stages["vae"] = weigh(vae) + encoding
    moments = torch.empty(batch, 2 * vae.config.latent_channels, size[0] // 8, size[1] // 8)
    (embeds, pooled), work = count_update(args, accelerator, targets, models, texts, moments)
    parameters = [parameter for name in targets for parameter in trained_parameters(models[name])]
    held = weigh(*(models[name] for name in targets))
    held += sum(parameter.numel() for parameter in parameters) * (optimizer_bytes(args) + 4 * args.use_ema)
    rest = torch.device(resting_device(args, accelerator)).type == accelerator.device.type
    beside = weigh(vae) if rest or not args.cache_latents else 0
    stages["updates"] = held + beside + max(work, 0 if args.cache_latents else encoding)
    drawing = [args.validation_prompt and 1, lacking and args.sample_batch_size]
    for name, count in zip(("validation", "class images"), drawing, strict=True):
        if count:
            work = count_drawing(args, accelerator, transformer, vae, embeds, pooled, count)
            stages[name] = work + weigh(vae) + (held if name == "validation" else weigh(transformer))
    text = sum(s.nbytes for name in texts if name not in targets for s in texts[name][0] if s is not None)
    return stages, (text, moments[0].nbytes * args.cache_latents)


def in_bytes(number):
    """A number of bytes with its unit, such as 1.826 GB."""
    scale, unit = next(((scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB")) if number >= scale), (1e3, "kB"))
    return f"{number / scale:.4g} {unit}"


def rehearse(args, accelerator, parts, targets, dataset, held_out, updates, total):
    """Reads what is left to read, and says what the run would do and take; no weights are loaded."""
    base = psutil.Process().memory_info().rss
    table = PromptTable(args, parts, accelerator, frozen_dtype(accelerator), targets)
    prompts = sorted(all_prompts(args, dataset, held_out))
    table.report_lost(prompts)
    load_part(args, parts, "scheduler")
    if not accelerator.is_main_process:
        return
    stored, sheet = list_weights(args, parts), draw_sheet(args, dataset)
    size, lacking = max(dataset.sizes, key=math.prod), None in dataset.images["class"]
    models, tokens = sketch_models(args, accelerator, parts, targets), table.tokenizers[0].model_max_length
    with FakeTensorMode(), torch.device(accelerator.device):
        stages, (text, latent) = estimate_stages(args, accelerator, models, targets, size, tokens, lacking)
    cached = text * len(prompts) + latent * len(dataset)
    result = count_result(args, accelerator, {name: models[name] for name in targets}, stored)
    parameters = [parameter for name in targets for parameter in trained_parameters(models[name])]
    count = sum(parameter.numel() for parameter in parameters)
    checkpoint, saved = count * (4 + optimizer_bytes(args) + 4 * args.use_ema), total // args.checkpointing_steps
    if accelerator.device.type == "cpu":  # its memory holds the libraries too
        stages = {name: size + base for name, size in stages.items()}
    largest, free = max(stages, key=stages.get), shutil.disk_usage(args.output_dir).free
    print(f"""updates: {total}, which is {total / updates:.1f} epochs of {updates}
trained: {count:,} parameters of {", ".join(targets)}
written: {in_bytes(result)} at the end, {in_bytes(checkpoint)} a checkpoint ({saved} of them)
         and {in_bytes(cached)} for as long as the run lasts; {in_bytes(free)} are free
memory:  about {in_bytes(stages[largest])} at most, on {accelerator.device.type}, a process, in the stage {largest}
         {", ".join(f"{name} {in_bytes(number)}" for name, number in stages.items())}
drawn:   {Path(args.output_dir, SHEET)}, {sheet}""")


def main(args):
    """Trains, and leaves in output_dir what the module's docstring lists."""
    accelerator, parts = start_accelerator(args), read_pipeline(args)
    targets = choose_targets(args, parts)
    checkpoint, manifest = find_checkpoint(args, accelerator)
    dataset, held_out, repository = read_dataset(args, parts, accelerator)
    loader, sampler = make_loader(args, accelerator, dataset)
    updates = math.ceil(len(loader) / args.gradient_accumulation_steps)  # an epoch
    total = args.max_train_steps or args.num_train_epochs * updates
    if args.dry_run:
        rehearse(args, accelerator, parts, targets, dataset, held_out, updates, total)
        return
    embed, vae = encode_once(args, parts, accelerator, targets, dataset, held_out)
    trained, optimizer, schedule = prepare_models(args, parts, accelerator, targets, total)
    embed.trained, models = trained, list(trained.values())
    parameters = [parameter for model in models for parameter in trained_parameters(model)]
    average = follow_average(args, accelerator, parameters, optimizer)
    step = resume(args, accelerator, trained, checkpoint, manifest)
    start_trackers(args, accelerator, step)
    scheduler = load_part(args, parts, "scheduler")
    levels = noise_levels(scheduler, accelerator.device)
    check = functools.partial(validate, args, accelerator, trained, vae, scheduler, embed, held_out)
    caught, seen, skipped, sound = catch_signals(), [], [], True
    bar = tqdm(total=total, initial=step, desc="Training", disable=not accelerator.is_main_process)
    for epoch in range(first_epoch(step, updates, total), math.ceil(total / updates)):
        sampler.epoch, sampler.start = epoch, max(step - epoch * updates, 0) * args.gradient_accumulation_steps
        for batch in loader:
            with accelerator.accumulate(*models):
                torch.manual_seed(derive_seed(args.seed, "dropout", *batch["seeds"]))
                moments = batch["data"] if args.cache_latents else encode_moments(vae, batch["data"])
                latents, noise, u = draw_latents(args, vae.config, moments, batch["seeds"])
                embeds, pooled = embed(batch["prompts"])
                losses = flow_losses(args, trained["transformer"], levels, latents, noise, u, embeds, pooled)
                means = split_losses(args, losses, batch["weights"])
                accelerator.backward(means[0] + args.prior_loss_weight * means[1])
                seen.append(means.detach())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                    figures, stop = read_update(args, accelerator, seen, norm, caught)
                    sound = is_sound(args, accelerator, figures, step + 1, skipped)
                if sound or accelerator.scaler is not None:  # the scaler skips by itself
                    optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            if accelerator.sync_gradients:
                step += 1
                log_update(args, accelerator, bar, optimizer, schedule, figures, step)
                if stop or step % args.checkpointing_steps == 0:
                    save_checkpoint(args, accelerator, step)
                if stop:
                    stop_cleanly(args, accelerator, step, stop)
                if step >= total:
                    break
        if epoch % args.validation_epochs == 0:
            with averaged(average, parameters), going_on([], f"validation at update {step}", None):
                check(step)
    bar.close()
    with averaged(average, parameters):
        failed = finish(args, accelerator, parts, trained, step, check, repository)
    end(args, accelerator, step, failed)


if __name__ == "__main__":
    main(ARGS)
