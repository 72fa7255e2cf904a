#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.3", "bitsandbytes>=0.50", "datasets>=3.6", "diffusers>=0.36", "filelock", "huggingface_hub>=0.34",
#     "numpy>=2.0", "peft>=0.17.1", "pillow>=10.4", "prodigyopt>=1.1.2", "protobuf", "safetensors>=0.4.5",
#     "sentencepiece", "tensorboard", "torch>=2.6", "tqdm", "transformers>=4.56,<5.24", "wandb",
# ]
# ///
"""DreamBooth training of LoRA adapters on Stable Diffusion 3 and 3.5, with the rectified-flow loss of the SD3 paper.

On one GPU; add `--multi_gpu` after `launch` to use all of them:

    accelerate launch train_dreambooth_lora_sd3.py --mixed_precision bf16 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir dog-lora

A run writes into output_dir: pytorch_lora_weights.safetensors, the model card README.md with its images, checkpoint-N/
(resume with --resume_from_checkpoint latest), validation/ and the trackers' logs/.

Shapes in the comments: B images of a batch (instance images first, then class images), C latent channels, h and w the
latent's height and width (pixels / 8), S text tokens, D joint width, P pooled width. sigma is the noise level in
[0, 1], a step is one update of the optimizer.

The twin, train_dreambooth_sd3.py, trains the whole transformer; `diff` of the two files shows what LoRA is.
"""

import argparse
import contextlib
import dataclasses
import errno
import fnmatch
import functools
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
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

# ---- Arguments ------------------------------------------------------------------------------------------------------

LR_SCHEDULERS = "linear cosine cosine_with_restarts polynomial constant constant_with_warmup".split()
TRACKERS = "tensorboard wandb comet_ml aim mlflow clearml dvclive swanlab trackio".split()
METHOD = "dreambooth-sd3-lora"
PRECISIONS = ("no", "fp32", "fp16", "bf16")
WEIGHTINGS = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")


class Stderr(io.FileIO):
    """Standard error that may go away, like a closed terminal, without ending the run. A file gets lines for bars."""

    def write(self, data):
        with contextlib.suppress(OSError):
            super().write(data if self.isatty() else data.replace(b"\r", b"\n"))
        return len(data)


def refuse(message):
    """Prints one line and exits with code 2; if all processes fail alike, only local rank 0 prints."""
    if int(os.environ.get("LOCAL_RANK") or 0):
        time.sleep(2)  # the launcher should have killed this process by then
    line = " ".join(str(message).split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def or_refuse(what):
    """Turns any exception into a one-line error: damaged files and unreachable servers can raise anything.

    With SHOW_TRACEBACKS in the environment it stays as it is, for whoever changes the code.
    """
    try:
        yield
    except Exception as error:
        if "SHOW_TRACEBACKS" in os.environ:
            raise
        refuse(f"{what} ({type(error).__name__}: {error.__cause__ or ''} {error})")


def utf8(text):
    """Value of a flag that is a text. Errors: ValueError for bytes that are none."""
    text.encode()
    return text


def boolean(text):
    """Value of a true/false flag; with type=bool argparse would read 'False' as true. Errors: ValueError."""
    return ("false", "0", "no", "true", "1", "yes").index(text.lower()) >= 3


def in_range(kind, low, below=1e30):
    """Type of a flag: an int or a float of at least `low` and less than `below`. Infinity only as the bound itself."""

    def parse(text):
        value = kind(text)
        if low <= value < below or value == below == math.inf:
            return value
        raise argparse.ArgumentTypeError(f"{text} is out of range: give {low} or more, less than {below}")

    parse.__name__ = kind.__name__  # argparse shows this name when the text is no number
    return parse


STEPS = in_range(int, 1)
COUNT = in_range(int, 1, 10_001)
AMOUNT = in_range(float, 0.0)
POSITIVE = in_range(float, 1e-30)
NORM = in_range(float, 1e-30, math.inf)
FRACTION = in_range(float, 0.0, 1.0)


def split_names(text):
    """Names in a comma-separated list, without spaces and empty ones."""
    return text.replace(" ", "").strip(",").split(",")


def add_group(parser, title):
    """A function that adds a flag to a new group: its name, its help, its type (bool: a switch) and its default."""
    group = parser.add_argument_group(title)

    def add(name, text, kind=utf8, default=None, **options):
        if kind is bool:
            group.add_argument(name, help=text, action="store_true")
            return
        if kind is boolean:
            options = {"nargs": "?", "const": True}
        group.add_argument(name, help=text, type=kind, default=default, **options)

    return add


def add_input_flags(parser):
    add = add_group(parser, "model")
    add("--pretrained_model_name_or_path", "Hub id or folder of an SD3 model.", required=True)
    own = "Folder of a pipeline, or a .safetensors file, that the transformer is taken from."
    add("--pretrained_transformer_model_name_or_path", own, os.path.abspath)
    add("--revision", "Hub revision of every part of the model.")
    add("--variant", "Variant of the model's weight files, such as fp16.")
    add("--cache_dir", "Where downloaded models and datasets are kept.")
    add("--no_t5", "Leave out T5, the largest text encoder: less memory, weaker text.", bool)

    add = add_group(parser, "data")
    add("--dataset_name", "Hub id or folder of an image dataset, read by the datasets library.")
    add("--dataset_config_name", "Configuration of that dataset.")
    add("--instance_data_dir", "Folder with the subject's images, in place of --dataset_name.")
    add("--dataset_split", "Split of that dataset.", utf8, "train")
    add("--image_column", "Dataset column with the images.", utf8, "image")
    add("--caption_column", "Dataset column with one caption per image; empty ones use --instance_prompt.")
    add("--repeats", "How often each instance image occurs in an epoch.", COUNT, 1)
    add("--instance_prompt", "Prompt of images without a caption: 'a photo of sks dog'.")
    add("--caption_dropout", "Probability of training with the empty prompt.", FRACTION, 0.0)
    add("--max_sequence_length", "T5 tokens per prompt; CLIP has 77.", in_range(int, 1, 513), 77)
    add("--resolution", "Side of the crop in pixels, a multiple of 16.", in_range(int, 16), 512)
    add("--use_aspect_ratio_buckets", "Crop each image to the nearest of several shapes.", bool)
    add("--aspect_ratio_buckets", "These shapes; unset: diffusers' for --resolution.", metavar="H,W;H,W")
    add("--center_crop", "Crop the middle instead of a random place.", bool)
    add("--random_flip", "Mirror half of the images.", bool)
    add("--alpha_mask", "Weigh the loss by the alpha channel: skip transparent parts.", bool)
    add("--dataloader_num_workers", "0 loads in the main process.", in_range(int, 0, 1025), 0)

    add = add_group(parser, "prior preservation")
    add("--with_prior_preservation", "Also train on class images, against drift.", bool)
    add("--class_data_dir", "Folder of class images; missing ones are drawn into it.")
    add("--class_prompt", "Prompt of the class images, such as 'a photo of a dog'.")
    add("--num_class_images", "Number of class images.", COUNT, 100)
    add("--prior_loss_weight", "Weight of the class images' loss.", AMOUNT, 1.0)
    add("--sample_batch_size", "Class images drawn at once, on each process.", COUNT, 4)
    add("--prior_generation_precision", "For class images; unset: --mixed_precision.", choices=PRECISIONS)


def add_method_flags(parser):
    add = add_group(parser, "lora")
    add("--train_text_encoder", "Also train adapters on both CLIP encoders, never on T5.", bool)
    add("--rank", "Rank of the adapters.", COUNT, 4)
    add("--lora_alpha", "Adapters are scaled by alpha / rank; unset: the rank.", POSITIVE)
    add("--lora_dropout", "Dropout on the adapters' input.", FRACTION, 0.0)
    add("--use_rslora", "Scale by alpha / sqrt(rank): rank-stabilised LoRA.", bool)
    add("--use_dora", "Also train the magnitude of each weight row: DoRA.", bool)
    add("--lora_layers", "Such as attn.to_q,ff.* or all-linear; unset: joint attention.")
    add("--lora_blocks", "Blocks that get adapters, such as 0,3 or 12-24; unset: all.")
    add("--upcast_before_saving", "Save the final adapters in float32.", bool)
    add("--bnb_quantization_config_path", "JSON of a BitsAndBytesConfig: 8- or 4-bit base, GPU.")
    add("--blocks_to_swap", "Blocks whose weights wait in RAM; needs --gradient_checkpointing.", in_range(int, 0), 0)
    add("--init_lora", "Adapters to start from, file or folder, of the same layers and rank.")
    preservation = "Weight of a loss that keeps predictions for --class_prompt close to the base model's."
    add("--output_preservation_weight", preservation, AMOUNT, 0.0)
    parser.set_defaults(tracker_project_name=METHOD)


def add_training_flags(parser):
    add = add_group(parser, "training")
    add("--train_batch_size", "Instance images per batch, on each process.", COUNT, 4)
    add("--num_train_epochs", "Epochs; --max_train_steps wins.", STEPS, 1)
    add("--max_train_steps", "Total updates of the optimizer.", STEPS)
    add("--gradient_accumulation_steps", "Batches per update.", COUNT, 1)
    add("--gradient_checkpointing", "Recompute activations in the backward pass.", bool)
    add("--cache_latents", "Encode each image once, in one crop, and free the VAE.", bool)
    add("--offload", "Keep the VAE and the text encoders on the CPU between uses.", bool)
    add("--use_ema", "Average the weights over the updates; validate and save the average.", bool)
    add("--ema_decay", "Its decay, at most (1 + n) / (10 + n) at step n.", FRACTION, 0.9999)
    add("--max_grad_norm", "Clip the global gradient norm to this; inf: never.", NORM, 1.0)
    add("--mixed_precision", "Unset: accelerate's configuration.", choices=("no", "fp16", "bf16"))
    add("--allow_tf32", "TF32 matrix products on Ampere GPUs and later.", bool)
    add("--seed", "Unset: a random one, which checkpoints keep.", in_range(int, 0, 2**32))
    add("--full_determinism", "Equal runs give equal bits on a GPU too; slower.", bool)
    add("--local_rank", "Accepted from old launchers; LOCAL_RANK is what counts.", int, -1)

    add = add_group(parser, "loss")
    add("--weighting_scheme", "SD3 paper, 3.1; none: uniform.", utf8, "logit_normal", choices=WEIGHTINGS)
    add("--training_shift", "Shift of the noise levels; unset: the scheduler's, 3 in SD3.", POSITIVE)
    add("--logit_mean", "Mean of the logit-normal density.", in_range(float, -1e30), 0.0)
    add("--logit_std", "Standard deviation of the logit-normal density.", POSITIVE, 1.0)
    add("--mode_scale", "Scale of the mode density.", in_range(float, -1.0, 1.752), 1.29)
    add("--precondition_outputs", "1 compares clean latents, 0 velocities.", int, 1, choices=(0, 1))

    add = add_group(parser, "optimizer")
    add("--optimizer", "Case does not matter.", str.lower, "adamw", choices=("adamw", "prodigy"))
    add("--learning_rate", "Learning rate after warm-up.", AMOUNT, 1e-4)
    add("--text_encoder_lr", "Text encoders' rate; prodigy takes --learning_rate.", AMOUNT, 5e-6)
    add("--scale_lr", "Multiply --learning_rate by processes, accumulation and batch size.", bool)
    add("--lr_scheduler", "Shape of the learning rate over the run.", utf8, "constant", choices=LR_SCHEDULERS)
    add("--lr_warmup_steps", "Updates of warm-up.", in_range(int, 0), 500)
    add("--lr_num_cycles", "Restarts of cosine_with_restarts.", COUNT, 1)
    add("--lr_power", "Power of polynomial.", AMOUNT, 1.0)
    add("--use_8bit_adam", "AdamW with 8-bit state, from bitsandbytes.", bool)
    add("--adam_beta1", "First beta, also Prodigy's.", FRACTION, 0.9)
    add("--adam_beta2", "Second beta, also Prodigy's.", FRACTION, 0.999)
    add("--adam_weight_decay", "Weight decay of the transformer.", AMOUNT, 1e-4)
    add("--adam_weight_decay_text_encoder", "Weight decay of the text encoders.", AMOUNT, 1e-3)
    add("--adam_epsilon", "Epsilon, also Prodigy's.", POSITIVE, 1e-8)
    add("--prodigy_beta3", "Unset: the square root of the second beta.", FRACTION)
    add("--prodigy_decouple", "Decoupled weight decay.", boolean, True)
    add("--prodigy_use_bias_correction", "Adam's bias correction.", boolean, True)
    add("--prodigy_safeguard_warmup", "Keep the rate out of D's denominator in warm-up.", boolean, True)


def add_output_flags(parser):
    add = add_group(parser, "validation")
    add("--validation_prompt", "Prompts of the images drawn during training and at the end.", nargs="+")
    add("--validation_data_dir", "Held-out images: their loss at fixed noise is logged.")
    add("--num_validation_images", "Number of images of each prompt, each time.", COUNT, 4)
    add("--validation_epochs", "Draw after the first epoch and then every so many.", STEPS, 50)
    add("--validation_num_inference_steps", "Denoising steps.", COUNT, 28)
    add("--validation_guidance_scale", "Guidance; Turbo needs 0.", AMOUNT, 7.0)
    add("--skip_final_inference", "Draw no images at the end.", bool)

    add = add_group(parser, "output")
    add("--output_dir", "Where everything is written.", utf8, "sd3-dreambooth")
    add("--logging_dir", "The trackers' folder inside output_dir.", utf8, "logs")
    add("--report_to", f"Some of {','.join(TRACKERS)}; or all, none.", utf8, "tensorboard")
    add("--tracker_project_name", "The trackers' project.")
    add("--tracker_run_name", "The run's name in wandb and in logging_dir.")
    add("--checkpointing_steps", "Updates between checkpoints.", STEPS, 500)
    add("--checkpoints_total_limit", "How many of the newest checkpoints to keep; unset: all.", COUNT)
    add("--resume_from_checkpoint", "A checkpoint's path or name, or latest.")
    add("--dry_run", "Check the input, draw it as the model would see it, train nothing.", bool)
    add("--push_to_hub", "Upload the result when training ends.", bool)
    add("--hub_token", "Token for the upload; it is written nowhere.")
    add("--hub_model_id", "Repository of the upload; unset: the name of output_dir.")
    add("--hub_private_repo", "Make the repository private when it is created.", bool)


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag in one line, where argparse would print its usage first."""

    def error(self, message):
        refuse(message)


def build_parser():
    parser = Parser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt TEXT ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_input_flags(parser)
    add_training_flags(parser)
    add_output_flags(parser)
    add_method_flags(parser)
    return parser


def check_data_flags(args):
    """Refuses data flags that contradict each other and folders that are not there."""
    if bool(args.dataset_name) == bool(args.instance_data_dir):
        refuse("--dataset_name, --instance_data_dir: give exactly one of the two")
    output = Path(args.output_dir).resolve()
    drawn = Path(args.class_data_dir or os.devnull).resolve()
    if drawn == output:
        refuse(f"--class_data_dir is --output_dir {args.output_dir!r}: give class images a folder of their own")
    for name in ("instance_data_dir", "dataset_name", "validation_data_dir"):
        folder = getattr(args, name)
        if not folder:
            continue
        path = Path(folder).resolve()
        if path == output:
            refuse(f"--{name} is --output_dir {args.output_dir!r}: the next run would train on what this one draws")
        if path.is_relative_to(drawn) or drawn.is_relative_to(path):
            refuse(f"--class_data_dir overlaps --{name} {folder!r}: give class images a folder of their own")
        if name != "dataset_name" and not os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises on a long name
            refuse(f"--{name} {folder!r} is not a folder: give the folder with the images")
    if args.resolution % 16:
        near = round(args.resolution / 16) * 16
        refuse(f"--resolution {args.resolution} is not a multiple of 16 (VAE 8, patch 2): {near} is the nearest")


def check_class_flags(args):
    """Refuses prior and output preservation that lack a flag, and says which flags have no effect."""
    preserve_outputs = args.output_preservation_weight
    if preserve_outputs and (args.with_prior_preservation or not args.class_prompt):
        refuse("--output_preservation_weight needs --class_prompt, and excludes --with_prior_preservation")
    for name in ("class_data_dir", "class_prompt"):
        given = getattr(args, name)
        if args.with_prior_preservation and not given:
            refuse(f"--with_prior_preservation needs --{name}")
        if given and not args.with_prior_preservation and not preserve_outputs:
            print(f"--{name} has no effect without --with_prior_preservation", file=sys.stderr)


def check_packages(args):
    """Refuses trackers that are unknown, and what needs a package that is not installed."""
    trackers = split_names(args.report_to)
    if args.hub_token and set(trackers) - {"tensorboard", "none"}:  # most record the command line
        refuse(f"--hub_token would be readable in {args.report_to}: leave it out and run `hf auth login` instead")
    packages = [] if trackers in (["none"], ["all"]) else trackers
    for name in packages:
        if name not in TRACKERS:
            refuse(f"--report_to {name!r} is unknown: choose from {', '.join(TRACKERS)}, or all or none alone")
    needed = {
        "datasets": args.dataset_name,
        "prodigyopt": args.optimizer == "prodigy",
        "bitsandbytes": args.use_8bit_adam,
    }
    packages += [package for package, wanted in needed.items() if wanted]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            refuse(f"these flags need the {package} package: pip install {package}")


def parse_args(argv=None):
    """The flags of a run. Wrong or contradictory ones exit with code 2 and one line."""
    if not __doc__:
        refuse("transformers needs the docstrings that `python -OO` leaves out: take -O or neither")
    args = build_parser().parse_args(argv)
    if not args.output_dir:
        refuse("--output_dir is empty: give the folder to write to")
    check_data_flags(args)
    check_class_flags(args)
    check_packages(args)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        refuse("DeepSpeed is not supported: choose FSDP2 in `accelerate config`, which splits a model as well")
    return args


if __name__ == "__main__":  # before the imports below, which take seconds: --help and a wrong flag answer at once
    sys.stderr = io.TextIOWrapper(Stderr(2, "w"), write_through=True)
    ARGS = parse_args()
    if not sys.stderr.isatty():  # the seconds between two lines of a bar
        os.environ.update(TQDM_MININTERVAL="30", TQDM_MAXINTERVAL="60")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns about a missing torchvision, which is not needed
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # the libraries' progress bars: one process is enough
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about a CPU kernel that is not needed

import huggingface_hub
import numpy as np
import torch
from accelerate import Accelerator, cpu_offload, utils
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, training_utils
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from filelock import FileLock, Timeout
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from safetensors.torch import load_file, save, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm

with contextlib.suppress(ImportError):  # if it is there, Pillow reads the photos of iPhones
    from pillow_heif import register_heif_opener

    register_heif_opener()

log = get_logger(__name__)

# ---- Data -----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = ".jpg .jpeg .jfif .png .webp .avif .heic .heif .bmp .gif .tif .tiff".split()
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as in an imagefolder of the datasets library
ENCODED = ".encoded"  # folder in output_dir for what is encoded once, while a run lasts
KEPT_PIXELS = 2**28  # of images that stay in memory, 1 GiB: decoding a photo can take longer than an update


def derive_seed(*parts):
    """One seed from the run's seed and what a draw belongs to, so that no draw depends on those made before it."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def list_images(folder):
    """Image files of a folder in sorted order, without hidden ones."""
    files = [path for path in sorted(Path(folder).glob("[!.]*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    return list(filter(Path.is_file, files))


def open_image(source, reach, number, alpha_mask=False):
    """RGB image of a path or of a dataset's {"bytes", "path"}; `number` names one that has no path.

    EXIF rotation is applied, 16 bits are scaled to 8, transparent parts become white; `alpha_mask` keeps the alpha as
    a fourth band. JPEGs are decoded no larger than needed to cover `reach` pixels. Errors: ValueError with its name.
    """
    if not isinstance(source, dict):
        source = {"path": source, "bytes": None}
    path = source["path"]
    file = io.BytesIO(source["bytes"]) if source["bytes"] else path
    try:
        with Image.open(file) as image:
            image.draft(None, (reach, reach))
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range: save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        alpha = 255
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
        if alpha_mask:
            image.putalpha(alpha)
        return image
    except Exception as error:  # PIL's readers raise anything on a damaged file
        name = repr(str(path)[:200]) if path else f"of row {number}"
        raise ValueError(f"the image {name} cannot be read ({error})") from error


def crop_image(image, size, generator, center, flip):
    """A crop of `size`, (height, width): uint8 (bands, height, width), its place and mirror drawn.

    The image is scaled until it just covers `size`, but only inside the crop: all of 1 x 5000 pixels would take 4 GB.
    """
    height, width = size
    rows = max(height, image.height * width // image.width)
    columns = max(width, image.width * height // image.height)
    down, right, mirror = torch.rand(3, generator=generator).tolist()
    if center:
        top = round((rows - height) / 2)
        left = round((columns - width) / 2)
    else:
        top = int(down * (rows - height + 1))
        left = int(right * (columns - width + 1))
    x = image.width / columns
    y = image.height / rows
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    bands = [image.convert("RGB"), *image.split()[3:]]  # apart: PIL would multiply the colours by the alpha
    crop = np.dstack([band.resize((width, height), Image.Resampling.BILINEAR, box) for band in bands])  # antialiased
    if flip and mirror < 0.5:
        crop = crop[:, ::-1]
    return torch.from_numpy(crop.copy()).permute(2, 0, 1)


def list_buckets(args):
    """The sizes (height, width) that images are cropped to. Refuses what the transformer has no positions for."""
    buckets = [(args.resolution, args.resolution)]
    if args.aspect_ratio_buckets:
        with or_refuse(
            f"--aspect_ratio_buckets {args.aspect_ratio_buckets!r}: give height,width pairs: 512,768;768,512"
        ):
            buckets = training_utils.parse_buckets_string(args.aspect_ratio_buckets)
    elif args.use_aspect_ratio_buckets:
        buckets = training_utils.generate_aspect_ratio_buckets(args.resolution, divisibility=16)
    config = read_transformer_config(args)
    limit = config["pos_embed_max_size"] * config["patch_size"] * 8
    for side in sum(buckets, ()):
        if side % 16 or not 16 <= side <= limit:
            refuse(f"{side} pixels are no side of a crop: give multiples of 16, at most this transformer's {limit}")
    return buckets


def read_caption(number, caption):
    """Captions of an image to choose from, (text, ...): one, those of a list, or none. Refuses what is not text."""
    texts = caption if isinstance(caption, list) else [caption]
    words = [" ".join(text.split()) for text in texts if isinstance(text, str)]
    if caption is not None and len(words) < len(texts):
        refuse(f"the caption of row {number} is {caption!r}: give a text or a list of texts")
    return tuple(filter(None, words))


class DreamBoothDataset:
    """Instance images with their prompts, each together with a class image where there are any.

    An item's place is (epoch, index, copy): all that is drawn for it comes from these and the run's seed. A class
    image is cropped to its partner's size. `moments`, once filled by `cache_moments`, stands in for the pixels.
    """

    def __init__(self, args, flag, images, captions):
        self.args = args
        self.buckets = list_buckets(args)
        self.images = {}  # by kind, "instance" or "class"
        self.prompts = {}
        self.moments = None
        self.kept = {}
        self.room = KEPT_PIXELS
        prompts = [read_caption(number, caption) for number, caption in enumerate(captions)]
        lacking = prompts.count(())
        if lacking and args.instance_prompt is None:
            refuse(f"{flag}: {lacking} of {len(prompts)} images have no caption: give --instance_prompt")
        prompts = [words or (args.instance_prompt,) for words in prompts]
        self.sizes, checksums, alphas = self.add_images("instance", flag, images, prompts)
        self.digest = derive_seed(prompts, checksums)
        sizes = dict(Counter(self.sizes))
        log.info(f"{flag}: {len(images)} images, {lacking} without a caption; (height, width): {sizes}")
        if args.alpha_mask and {(0, 0), (255, 255)}.issuperset(alphas):
            log.warning(
                f"{flag}: --alpha_mask: no image is transparent in part; one that is as a whole teaches nothing"
            )

    def add_images(self, kind, flag, images, prompts):
        """Adds the images of a kind and reads each once. Returns their crops' sizes, checksums and ranges of alpha.

        `prompts` are tuples: of each, one is drawn an epoch.
        """
        if not len(images):
            refuse(f"{flag}: there is no image: give a folder that directly holds {', '.join(IMAGE_SUFFIXES)} files")
        self.images[kind] = images
        self.prompts[kind] = prompts

        def inspect(number):
            image = self.load(kind, number)
            bucket = training_utils.find_nearest_bucket(image.height, image.width, self.buckets)
            checksum = hashlib.sha256(image.tobytes()).hexdigest()
            return self.buckets[bucket], checksum, image.split()[-1].getextrema()

        with ThreadPoolExecutor() as pool:
            found = [pool.submit(inspect, number) for number in range(len(images))]
        broken = [str(each.exception()) for each in found if each.exception()]
        if broken:
            remedy = "repair or remove them; for HEIC: pip install pillow-heif"
            refuse(f"{flag}: {len(broken)} of {len(images)} images are broken: {'; '.join(broken[:10])}: {remedy}")
        return zip(*[each.result() for each in found], strict=True)

    def load(self, kind, number):
        """An image, which stays in memory while there is room."""
        image = self.kept.get((kind, number))
        if image is None:
            reach = max(map(max, self.buckets))
            image = open_image(self.images[kind][number], reach, number, self.args.alpha_mask)
            self.room -= image.width * image.height
            if self.room > 0:
                self.kept[kind, number] = image
        return image

    def __len__(self):
        instances = len(self.images["instance"]) * self.args.repeats
        return max(instances, len(self.images.get("class", ())))

    def has_fixed_crops(self):
        """Whether each image is always seen in the same crop, and there are few enough to stay in memory."""
        if self.args.random_flip or len(self.kept) < sum(map(len, self.images.values())):
            return False
        height, width = self.buckets[0]
        whole = all(image.width * height == image.height * width for image in self.kept.values())
        return self.args.center_crop or (whole and len(self.buckets) == 1)

    def __getitem__(self, place):
        """The examples of an item: instance, then class."""
        epoch, index, copy = place
        size = self.size(index)
        examples = []
        for kind, images in self.images.items():
            number = index % len(images)
            seed = derive_seed(self.args.seed, kind, epoch, index + copy * len(self))
            draw = random.Random(derive_seed(seed, "caption"))
            dropped = draw.random() < self.args.caption_dropout
            prompt = draw.choice(self.prompts[kind][number])
            if dropped and kind == "instance":
                prompt = ""
            if self.moments:
                data = self.moments[kind, number, size]["moments"]
            else:
                data = self.pixels(kind, number, size, seed)
            examples.append({"data": data, "prompt": prompt, "seed": seed})
        return examples

    def size(self, index):
        """Height and width in pixels of the item at an index."""
        return self.sizes[index % len(self.sizes)]

    def pixels(self, kind, number, size, seed):
        """Pixels (bands, height, width) of one image from 0 to 255, in the crop that `seed` draws."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "crop"))
        image = self.load(kind, number)
        return crop_image(image, size, generator, self.args.center_crop, self.args.random_flip)


class Batches(list):
    """What a loader reads in an epoch: lists of places, see order_epoch."""

    batch_size = None  # tells accelerate that it cannot split them itself


def order_epoch(args, dataset, processes, epoch, done=0):
    """Batches of places (epoch, index, copy): every index once, in an order drawn from seed and epoch.

    An update, which is processes x batch x accumulation images, is full and of one size: copies, drawn anew, fill up
    the last one of each size. So it has the same images however they are shared out. Leaves out the `done` updates.
    """
    generator = torch.Generator().manual_seed(derive_seed(args.seed, "order", epoch))
    batch = args.train_batch_size
    update = processes * batch * args.gradient_accumulation_steps
    places = []
    by_size = {}  # less than an update each
    for index in torch.randperm(len(dataset), generator=generator).tolist():
        size = dataset.size(index)
        by_size.setdefault(size, []).append((epoch, index, 0))
        if len(by_size[size]) == update:
            places += by_size.pop(size)
    for rest in by_size.values():
        for number in range(update - len(rest)):
            _, index, copy = rest[number]
            rest.append((epoch, index, copy + 1))
        places += rest
    return [places[first : first + batch] for first in range(done * update, len(places), batch)]


def collate(items):
    """A batch of B examples, instance images first, then class images."""
    examples = sum(zip(*items, strict=True), ())
    data = [example["data"] for example in examples]
    return {
        "data": torch.stack(data),  # (B, bands, H, W), or moments (B, 2C, h, w)
        "prompts": [example["prompt"] for example in examples],
        "seeds": [example["seed"] for example in examples],
    }


class TensorFolder:
    """Dicts of tensors by key, one safetensors file each, for all processes: 10,000 captions can take 50 GB."""

    def __init__(self, args, name):
        self.folder = Path(args.output_dir, ENCODED, name)

    def path(self, key):
        return self.folder / f"{derive_seed(key)}.safetensors"

    def __getitem__(self, key):
        return load_file(self.path(key))

    def fill(self, accelerator, keys, make, title, batch=1):
        """Stores what `make` gives for each key, asked for `batch` keys at once; the processes share the work."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = keys[accelerator.process_index :: accelerator.num_processes]
        for first in tqdm(range(0, len(mine), batch), desc=title, disable=not accelerator.is_main_process):
            some = mine[first : first + batch]
            made = make(some)
            for number, key in enumerate(some):
                tensors = {name: tensor[number].cpu().contiguous() for name, tensor in made.items()}
                with or_refuse(f"{self.folder} cannot be written"):
                    save_file(tensors, self.path(key))
        accelerator.wait_for_everyone()


def read_folder(args, flag, folder):
    """Images of a folder and a caption or None for each, from the files beside them or from its metadata file."""
    if any(Path(folder, name).is_file() for name in METADATA):
        return read_dataset(args, flag, folder, "image", args.caption_column or "text")
    unused = (args.dataset_split, args.image_column, args.caption_column)
    if args.instance_data_dir and unused != ("train", "image", None):
        log.warning(f"{flag} {folder!r} has no metadata file: split and columns of a dataset have no effect")
    images = list_images(folder)
    captions = []
    for image in images:
        beside = next(filter(Path.is_file, map(image.with_suffix, CAPTION_SUFFIXES)), None)
        with or_refuse(f"{beside} is not UTF-8 text: save it as such"):
            captions.append(beside and beside.read_text(encoding="utf-8-sig"))
    return images, captions


def read_dataset(args, flag, name, image_column, caption_column):
    """Images of a dataset, decoded when they are used, and captions or None for each.

    `name` is a Hub id, a folder of save_to_disk, or a folder of images with a metadata file.
    """
    remedy = "give a Hub id or a folder without brackets in its name; datasets writes to --cache_dir"
    with or_refuse(f"{flag} {name!r} cannot be read: {remedy}"):
        import datasets

        if Path(name, "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(Path(name, args.dataset_split))
        elif Path(name, "state.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            split = args.dataset_split
            rows = datasets.load_dataset(name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
        missing = {image_column, caption_column} - {None, *rows.column_names}
        if missing:
            refuse(f"{flag} {name!r} has no column {' or '.join(missing)}, but {', '.join(rows.column_names)}")
        if not isinstance(rows.features[image_column], datasets.Image | datasets.Value | dict):
            raise TypeError("it has arrays for images: cast them to datasets.Image")
        images = rows.cast_column(image_column, datasets.Image(decode=False))[image_column]
        captions = rows[caption_column][:] if caption_column else [None] * len(rows)
        label = rows.features.get(caption_column)
        if isinstance(label, datasets.ClassLabel):
            captions = label.int2str(captions)
    return images, captions


def read_instances(args):
    """The images to train on, with their prompts."""
    if args.dataset_name:
        flag = "--dataset_name"
        found = read_dataset(args, flag, args.dataset_name, args.image_column, args.caption_column)
    else:
        flag = "--instance_data_dir"
        found = read_folder(args, flag, args.instance_data_dir)
    return DreamBoothDataset(args, flag, *found)


def read_held_out(args):
    """The images of --validation_data_dir, cropped in the middle; None without the flag."""
    if not args.validation_data_dir:
        return None
    prompt = args.instance_prompt or ""
    fixed = {"center_crop": True, "random_flip": False, "repeats": 1, "seed": 0, "caption_dropout": 0}
    plain = argparse.Namespace(**vars(args) | fixed | {"instance_prompt": prompt})
    flag = "--validation_data_dir"
    return DreamBoothDataset(plain, flag, *read_folder(args, flag, args.validation_data_dir))


# ---- Models ---------------------------------------------------------------------------------------------------------

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # CLIP-L, OpenCLIP bigG, T5: the pipeline's order
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_pipeline(args):
    """Parts of the base pipeline, {name: (library, class)}, from model_index.json. Refuses anything but an SD3."""
    model = args.pretrained_model_name_or_path
    remedy = "give a diffusers folder or a Hub id; for a gated model accept its licence and run `hf auth login`"
    with or_refuse(f"--pretrained_model_name_or_path {model!r}: no model_index.json can be read: {remedy}"):
        index = StableDiffusion3Pipeline.load_config(model, cache_dir=args.cache_dir, revision=args.revision)
        parts = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple) and entry[0]}
    if args.no_t5:
        parts.pop("text_encoder_3", None)
        parts.pop("tokenizer_3", None)
    needed = dict.fromkeys(("vae", *TEXT_ENCODERS[:2], *TOKENIZERS[:2]), "")
    needed |= {"transformer": "SD3Transformer2DModel", "scheduler": "FlowMatch"}
    for name in needed | parts:
        library, class_name = parts.get(name, ("nothing", ""))
        if library not in ("diffusers", "transformers") or needed.get(name, "") not in class_name:
            found = f"its {name} is {library} {class_name}"
            refuse(f"--pretrained_model_name_or_path {model!r} is not an SD3 pipeline: {found}")
    for name, field in (("vae", "scaling_factor"), ("vae", "shift_factor"), ("scheduler", "shift")):
        with or_refuse(f"{name} of {model!r} cannot be used"):
            number = sketch_part(args, parts, name).config[field]
            if number is None or (number <= 0 and field != "shift_factor"):  # the mean of the latents
                raise ValueError(f"its {field} is {number}")
    return parts


def has_room(device, size):
    """Whether a CUDA device has `size` bytes left; other devices always do."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] >= size


def source_of(args, name):
    """from_pretrained arguments that find a part of the base model."""
    return {"subfolder": name, "revision": args.revision, "cache_dir": args.cache_dir}


def device_of(accelerator):
    """The process's device; "cpu" where several processes have "cpu:0", which libraries take for a GPU."""
    if accelerator.device.type == "cpu":
        return torch.device("cpu")
    return accelerator.device


def is_split(accelerator):
    """Whether FSDP2 splits what is trained over the processes."""
    return accelerator.distributed_type.value == "FSDP"


def on_device(accelerator, dtype):
    """from_pretrained arguments that load weights straight onto the device."""
    return {"torch_dtype": dtype, "device_map": {"": str(device_of(accelerator))}}


def frozen_dtype(accelerator):
    """Precision of what is not trained."""
    return DTYPES.get(accelerator.mixed_precision, torch.float32)


def class_of(parts, name):
    """The class of a part, in diffusers or transformers."""
    library, class_name = parts[name]
    return getattr(importlib.import_module(library), class_name)


def load_part(args, parts, name, checkpoint=None, **options):
    """A part of the base pipeline or of a checkpoint, a model frozen. Refuses damaged ones."""
    if name == "transformer":
        checkpoint = checkpoint or args.pretrained_transformer_model_name_or_path
    model = str(checkpoint or args.pretrained_model_name_or_path)
    what = f"{name} of {model!r} cannot be loaded"
    if args.variant and not checkpoint:
        what += f" in the variant {args.variant!r}"
        options["variant"] = args.variant
    with or_refuse(what):
        part_class = class_of(parts, name)
        if not hasattr(part_class, "parameters"):
            return load_tokenizer_or_scheduler(part_class, model, source_of(args, name))
        if model.endswith(".safetensors"):  # with the names of diffusers or of ComfyUI
            part = part_class.from_single_file(
                model,
                config=args.pretrained_model_name_or_path,
                config_revision=args.revision,
                subfolder=name,
                device=options.get("device_map", {"": "cpu"})[""],
                **options,
            )
            return part.requires_grad_(False)
        # Elsewhere the transformer would compute its table of positions: 16 s and 3.4 GB of RAM for SD3.5 Medium.
        modern = utils.compare_versions("diffusers", ">=", "0.40.0")
        on_meta = name == "transformer" and modern and not options.get("quantization_config")
        options |= source_of(args, name) | {"output_loading_info": True}
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            part, info = part_class.from_pretrained(model, **options)
        wrong = sum(map(list, info.values()), [])  # keys that are missing, unexpected, of another shape
        if wrong and getattr(part, "hf_quantizer", None) is None:
            raise ValueError(f"its weights do not fit its config: {wrong[0]}, {len(wrong)} in all")
    return part.requires_grad_(False).eval()


def load_tokenizer_or_scheduler(part_class, model, source):
    """A part without weights. Errors: ValueError for a tokenizer without words or length."""
    part = part_class.from_pretrained(model, **source)
    if hasattr(part, "unk_token_id"):
        unknown = part.unk_token_id in part("photo", add_special_tokens=False).input_ids
        if unknown or part.model_max_length > 2**20:
            raise ValueError("it has no vocabulary or no length: a tokenizer file is missing")
    return part


def load_scheduler(args, parts, accelerator):
    """The base's scheduler, with the tables of timesteps and sigmas for training, (1000,) each, on the device."""
    scheduler = load_part(args, parts, "scheduler")
    shifted = type(scheduler).from_config(scheduler.config, shift=args.training_shift or scheduler.config.shift)
    scheduler.timesteps = shifted.timesteps.to(accelerator.device)
    scheduler.sigmas = shifted.sigmas.to(accelerator.device)
    return scheduler


def read_transformer_config(args):
    return SD3Transformer2DModel.load_config(args.pretrained_model_name_or_path, **source_of(args, "transformer"))


def sketch_part(args, parts, name):
    """A part of the pipeline that is no tokenizer, without weights: its config, names and sizes of its layers."""
    model = args.pretrained_model_name_or_path
    if name == "transformer":
        model = args.pretrained_transformer_model_name_or_path or model
    if model.endswith(".safetensors"):
        return load_part(args, parts, name, device_map={"": "meta"})
    with or_refuse(f"{name} of {model!r} has a config that cannot be used"), torch.device("meta"):
        kind = class_of(parts, name)
        if name in TEXT_ENCODERS:
            part = kind(kind.config_class.from_pretrained(model, **source_of(args, name)))
        else:
            part = kind.from_config(kind.load_config(model, **source_of(args, name)))
    return part


def load_to_train(args, parts, accelerator, name, dtype, checkpoint=None, **options):
    """A model to be trained, on the device.

    Under FSDP2 it is on the CPU, and only the main process reads the weights: hand_out sends them to the others.
    """
    if not is_split(accelerator):
        return load_part(args, parts, name, checkpoint, **on_device(accelerator, dtype) | options)
    if accelerator.is_main_process:
        return load_part(args, parts, name, checkpoint, torch_dtype=dtype)
    return sketch_part(args, parts, name).to(dtype).to_empty(device="cpu")


def load_frozen(args, parts, accelerator, name, dtype):
    """A text encoder or transformer on the device, or on the CPU: its layers then pass through the device as they run.

    On the CPU are text encoders with --offload, and what does not fit with a fifth to spare for the activations.
    """
    size = utils.compute_module_sizes(sketch_part(args, parts, name), dtype=dtype)[""]
    device = device_of(accelerator)
    if args.offload and name in TEXT_ENCODERS or not has_room(device, 1.2 * size):
        return cpu_offload(load_part(args, parts, name, torch_dtype=dtype), device)
    return load_part(args, parts, name, **on_device(accelerator, dtype))


# ---- Text -----------------------------------------------------------------------------------------------------------

TEXT_BATCH = 16  # prompts at once: where T5 waits on the CPU, 9.5 GB cross the bus for each batch


class PromptTable:
    """Prompt embeddings: read from disk for frozen encoders (freed after encoding), computed for trained ones."""

    def __init__(self, args, parts, accelerator, dtype, targets=()):
        self.args = args
        self.accelerator = accelerator
        self.dtype = dtype
        self.width = read_transformer_config(args)["joint_attention_dim"]
        self.tokenizers = {}
        self.tables = {}  # of the frozen encoders
        self.trained = {}  # the models that are trained, by name, once they are loaded
        for encoder, tokenizer in zip(TEXT_ENCODERS, TOKENIZERS, strict=True):
            if encoder in parts:
                self.tokenizers[encoder] = load_part(args, parts, tokenizer)
                if encoder not in targets:
                    self.tables[encoder] = TensorFolder(args, f"{encoder} {dtype}")
        if "text_encoder_3" in self.tokenizers:
            self.tokenizers["text_encoder_3"].model_max_length = args.max_sequence_length
        # What was read last stays on the device. Captures `tables`, not self: no reference cycle.
        tables = self.tables
        send = functools.partial(utils.send_to_device, device=accelerator.device)
        self.look_up = functools.lru_cache(64)(lambda name, prompt: send(tables[name][prompt]))

    def fill(self, parts, prompts):
        """Encodes each prompt once with each frozen encoder, one encoder at a time; the processes share the work."""
        for name, table in self.tables.items():
            encoder = load_frozen(self.args, parts, self.accelerator, name, self.dtype)
            encode = functools.partial(self.encode, encoder=encoder, name=name)
            with torch.no_grad():
                table.fill(self.accelerator, prompts, encode, f"Encoding with {name}", TEXT_BATCH)
            del encoder, encode
            training_utils.free_memory()

    def report_cut(self, prompts):
        """Warns of prompts that an encoder cannot read to the end, ten at most, with the words that are lost."""
        cut = {}
        for name, tokenizer in self.tokenizers.items():  # T5 comes last: what it loses, CLIP loses too
            for prompt in prompts:
                lost = tokenizer(prompt, verbose=False).input_ids[tokenizer.model_max_length - 1 : -1]
                if lost:
                    cut[prompt] = f"{name} loses {tokenizer.decode(lost)!r}"
        for prompt in list(cut)[:10]:
            log.warning(f"the prompt {prompt[:60]!r} is too long: {cut[prompt]}")
        log.info(f"{len(prompts)} different prompts, {len(cut)} of them cut")

    def encode(self, prompts, encoder, name):
        """One encoder's part of the text: states (B, tokens, width) and, of a CLIP, the pooled output (B, width)."""
        tokens = self.tokenizers[name](prompts, padding="max_length", truncation=True, return_tensors="pt")
        output = encoder(tokens.input_ids.to(self.accelerator.device), output_hidden_states=True)
        if name == "text_encoder_3":
            return {"states": output[0]}
        return {"states": output.hidden_states[-2], "pooled": output.text_embeds}

    def embed_with(self, name, prompts):
        """One encoder's part of the text, computed if the encoder is trained, else looked up."""
        if name in self.trained:
            return self.encode(prompts, self.trained[name], name)
        return torch.utils.data.default_collate([self.look_up(name, prompt) for prompt in prompts])

    def __call__(self, prompts):
        """Text as the transformer takes it: embeds (B, S, D) and pooled embeds (B, P) of a batch's prompts.

        The CLIPs' states side by side, zero-padded to the joint width D, then T5's states along the token axis; the
        pooled outputs side by side. As in StableDiffusion3Pipeline.encode_prompt. Without T5 its part is zeros.
        """
        clip_l = self.embed_with("text_encoder", prompts)
        clip_g = self.embed_with("text_encoder_2", prompts)
        pooled = torch.cat([clip_l["pooled"], clip_g["pooled"]], dim=-1)
        clips = torch.cat([clip_l["states"], clip_g["states"]], dim=-1)
        clips = torch.nn.functional.pad(clips, (0, self.width - clips.shape[-1]))
        if "text_encoder_3" in self.tokenizers:
            t5 = self.embed_with("text_encoder_3", prompts)["states"].to(clips.dtype)
        else:
            t5 = clips.new_zeros(len(prompts), self.args.max_sequence_length, self.width)
        return torch.cat([clips, t5], dim=-2), pooled


# ---- Flow matching --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_loan(vae, device):
    """Moves the VAE to `device` for the with block, keeping its CPU weights: none is copied back."""
    waiting = [(parameter, parameter.data) for parameter in vae.parameters()]
    vae.to(device)
    try:
        yield
    finally:
        for parameter, weight in waiting:
            parameter.data = weight


def encode_moments(vae, pixels):
    """Posterior of uint8 pixels (B, 3 or 4, H, W): mean, deviation, mask of a fourth band: (B, 2C or 2C + 1, h, w)."""
    pixels = pixels.float().div_(127.5).sub_(1)
    with torch.no_grad(), on_loan(vae, pixels.device):
        posterior = vae.encode(pixels[:, :3]).latent_dist
    moments = [posterior.mean, posterior.std]
    if pixels.shape[1] > 3:
        mask = (pixels[:, 3:] + 1) / 2
        moments.append(torch.nn.functional.interpolate(mask, posterior.mean.shape[2:], mode="area"))
    return torch.cat(moments, dim=1)


def cache_moments(dataset, vae, accelerator, name):
    """Encodes every image of the dataset once, in one crop each."""

    def encode(keys):
        (key,) = keys
        pixels = dataset.pixels(*key, derive_seed(dataset.args.seed, "cache", *key))
        return {"moments": encode_moments(vae, pixels[None].to(accelerator.device))}

    keys = {}  # a dict keeps their order
    for kind, images in dataset.images.items():
        for index in range(len(dataset)):
            keys[kind, index % len(images), dataset.size(index)] = None
    moments = TensorFolder(dataset.args, name)
    moments.fill(accelerator, list(keys), encode, "Caching latents")
    dataset.moments = moments
    dataset.kept.clear()


def draw_latents(args, vae_config, moments, seeds, device):
    """Latents and noise (B, C, h, w), densities u (B,) and mask (B, 1, h, w) or None, each image's from its own seed.

    A latent is a sample of the posterior, shifted and scaled by the VAE's config (SD3 shifts as well as scales); u in
    [0, 1] is of the density of --weighting_scheme (SD3 paper, section 3.1). `device` is where they are drawn.
    """
    mean, deviation, *mask = moments.float().split(vae_config.latent_channels, dim=1)
    normal = []
    densities = []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(seed)
        normal.append(torch.randn((2, *mean.shape[1:]), generator=generator, device=device))
        density = training_utils.compute_density_for_timestep_sampling(
            weighting_scheme=args.weighting_scheme,
            batch_size=1,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
            device=device,
            generator=generator,
        )
        densities.append(density)
    sample, noise = torch.stack(normal, dim=1).to(moments.device)
    latents = (mean + deviation * sample - vae_config.shift_factor) * vae_config.scaling_factor
    return latents, noise, torch.cat(densities).to(moments.device), mask[0] if mask else None


def flow_losses(args, transformer, scheduler, drawn, text, target=None):
    """Rectified-flow loss of each image, (B,) in float32, and the prediction (SD3 paper, sections 2 and 3.1).

    `drawn` is what draw_latents gives, `text` embeds (B, S, D) and pooled embeds (B, P). The scheduler's tables of
    timesteps and sigmas run from noisy to clean; the shift (section 5.3.2) is already in them. `target` replaces the
    data by another prediction, (B, C, h, w).
    """
    latents, noise, u, mask = drawn
    embeds, pooled = text
    levels = len(scheduler.timesteps)
    index = (u * levels).long().clamp(0, levels - 1)  # mode reaches u = 1
    sigma = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    # Under autocast: half precision inside, float32 in and out.
    velocity = transformer(
        hidden_states=noisy,
        timestep=scheduler.timesteps[index],
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0].float()
    if args.precondition_outputs:
        prediction = noisy - sigma * velocity
        truth = latents
    else:
        prediction = velocity
        truth = noise - latents
    error = prediction - (truth if target is None else target)
    weight = training_utils.compute_loss_weighting_for_sd3(args.weighting_scheme, sigma)
    if mask is not None:  # the mean over what the mask leaves
        weight = weight * mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    losses = (weight * error**2).flatten(1).mean(dim=1)
    return losses, prediction


def loss_weights(args):
    """Weight of each kind of loss by name, in the order in which batch_losses gives them."""
    weights = {"instance_loss": 1}
    if args.with_prior_preservation:
        weights["prior_loss"] = args.prior_loss_weight
    if args.output_preservation_weight:
        weights["preservation_loss"] = args.output_preservation_weight
    return weights


def mean_loss(args, losses):
    """The loss that is minimised: the weighted sum of each kind's mean."""
    weights = loss_weights(args).values()
    kinds = losses.chunk(len(weights))
    return sum(weight * kind.mean() for weight, kind in zip(weights, kinds, strict=True))


@dataclasses.dataclass
class Frozen:
    """What is not trained and always travels together."""

    embed: PromptTable
    vae: torch.nn.Module
    scheduler: object
    held_out: DreamBoothDataset | None = None


# ---- What is trained ------------------------------------------------------------------------------------------------

LORA_LAYERS = (
    "attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out,attn.to_k,attn.to_out.0,attn.to_q,attn.to_v"
)
WEIGHTS = "pytorch_lora_weights.safetensors"
RESULT = {  # what the model card says of it and what is uploaded
    "title": "SD3 DreamBooth LoRA",
    "tags": ["lora", "template:sd-lora"],
    "pipeline": "{base!r}{options}",
    "usage": "pipeline.load_lora_weights({!r})",
    "files": [WEIGHTS],
}


def choose_blocks(args, count):
    """Numbers of the blocks, below `count`, that --lora_blocks names, such as 0,3 or 12-24; all without the flag."""
    blocks = range(count)
    numbers = []
    for name in split_names(args.lora_blocks or f"0-{count - 1}"):
        first, _, last = name.partition("-")
        with or_refuse(f"--lora_blocks: {name!r} is not a block; the transformer has blocks 0 to {count - 1}"):
            found = blocks[blocks.index(int(first)) : blocks.index(int(last or first)) + 1]
            if not found:
                raise ValueError("it counts down")
        numbers += found
    return numbers


def choose_layers(args, transformer):
    """Names of the linear layers that get an adapter. Refuses a layer or a block that is not there."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    numbers = choose_blocks(args, len(transformer.transformer_blocks))
    inside = []
    for number in numbers:
        inside += fnmatch.filter(linear, f"transformer_blocks.{number}.*")
    if args.lora_layers == "all-linear":
        return inside
    chosen = []
    for layer in split_names(args.lora_layers or LORA_LAYERS):
        found = fnmatch.filter(inside, f"*.{layer}")
        if args.lora_layers and not found:
            known = sorted({name.split(".", 2)[2] for name in inside})
            refuse(f"--lora_layers: no layer is named {layer!r}; there are {', '.join(known)}, or all-linear alone")
        chosen += found
    for number in numbers:
        if args.lora_blocks and not fnmatch.filter(chosen, f"transformer_blocks.{number}.*"):
            refuse(f"--lora_blocks: block {number} has none of --lora_layers {args.lora_layers}")
    counts = Counter(name.split(".", 2)[2] for name in sorted(chosen))
    log.info(f"adapters: {dict(counts)}")
    return chosen


def choose_targets(args, parts, accelerator, checkpoint):
    """Layers that get an adapter, by model. All flags about adapters are checked here, before text is encoded."""
    quantized = read_quantization(args)
    if args.blocks_to_swap:
        whole = not quantized and accelerator.distributed_type.value != "FSDP"
        if not (whole and args.gradient_checkpointing and accelerator.device.type == "cuda"):
            refuse("--blocks_to_swap needs an NVIDIA GPU, --gradient_checkpointing, no quantised base and no FSDP2")
    targets = {"transformer": choose_layers(args, sketch_part(args, parts, "transformer"))}
    if args.train_text_encoder:
        for name in TEXT_ENCODERS[:2]:
            targets[name] = ["q_proj", "k_proj", "v_proj", "out_proj"]
    for name, layers in targets.items():
        if args.init_lora and not checkpoint:
            model = sketch_part(args, parts, name)
            make_trainable(args, model, layers)
            read_adapters(args, args.init_lora, name, model)
    return targets


def read_quantization(args, dtype=None):
    """BitsAndBytesConfig of --bnb_quantization_config_path, or None."""
    path = args.bnb_quantization_config_path
    if not path:
        return None
    remedy = 'give a JSON file with fields of a BitsAndBytesConfig, such as {"load_in_4bit": true}, on a GPU'
    with or_refuse(f"--bnb_quantization_config_path {path!r}: {remedy}"):
        from diffusers import BitsAndBytesConfig
        from diffusers.quantizers import DiffusersAutoQuantizer

        fields = json.loads(Path(path).read_text())
        fields["bnb_4bit_compute_dtype"] = dtype
        config = BitsAndBytesConfig(**fields)
        if not config.quantization_method():  # diffusers ignores unknown fields, so a misspelt one would be lost
            raise ValueError("neither load_in_8bit nor load_in_4bit, in fp4 or nf4")
        DiffusersAutoQuantizer.from_config(config).validate_environment()
    return config


def make_trainable(args, model, layers):
    """Freezes a model and gives it adapters on its layers, in float32."""
    model.requires_grad_(False)
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
    training_utils.cast_training_params(model, torch.float32)
    for module in adapter_layers(model):
        module.cast_input_dtype_enabled = False  # autocast would take PEFT's cast to float32 back at once


def adapter_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_scale(rank, lora_alpha=None, use_rslora=False, **others):
    """What PEFT multiplies lora_B by: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return (lora_alpha or rank) / (math.sqrt(rank) if use_rslora else rank)


def read_adapters(args, source, name, model):
    """Weights of a model's adapters from a checkpoint or --init_lora. Refuses those of other layers or ranks."""
    file = Path(source)
    if file.is_dir():
        file /= WEIGHTS
    scale = 1  # in the result it is multiplied into lora_B, see save_weights
    with or_refuse(f"the adapters in {str(source)!r} cannot be read"):
        file.stat()  # else diffusers would look for it on the Hub
        options = {"weight_name": file.name, "return_lora_metadata": True}
        weights, header = StableDiffusion3Pipeline.lora_state_dict(str(file.parent), **options)
        if header:
            scale = adapter_scale(header[f"{name}.r"], header[f"{name}.lora_alpha"], header[f"{name}.use_rslora"])
        elif file.with_name("scheduler.bin").is_file():  # a checkpoint
            scale = adapter_scale(**read_manifest(file.parent)["run"])
    scale /= adapter_scale(**vars(args))
    state = {}
    for key, weight in weights.items():
        part, _, key = key.replace("vector.weight", "vector").partition(".")  # PEFT's name for DoRA's magnitude
        if part == name:
            state[key] = weight * scale if "lora_B" in key else weight
        elif not args.train_text_encoder:
            log.warning_once(f"{file}: its adapters of the {part} are not used")
    given = {(key, tuple(weight.shape)) for key, weight in state.items()}
    adapters = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {(key, tuple(weight.shape)) for key, weight in adapters.items()}
    differ = sorted(given ^ wanted)
    if differ:
        found = f"{len(differ)} tensors of the {name} differ, such as {differ[0]}"
        refuse(f"{str(source)!r} does not match this run's adapters: {found}")
    return state


class SwappedBlocks:
    """Keeps frozen weights of blocks in pinned memory. A block that runs gets copies of them on the GPU.

    They come on a stream of their own while the block before is computed, because the host is ahead of the GPU. A
    block's copies are dropped when the next one has its own, and the gradient's graph keeps them as long as it needs.
    """

    def __init__(self, blocks, device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.before = torch.cuda.Event()  # what precedes the present block
        self.present = {}
        for block in blocks:
            weights = {}
            for module in block.modules():
                for name, weight in list(module.named_parameters(recurse=False)):
                    if not weight.requires_grad:
                        weights[module, name] = weight.data.pin_memory()
                        delattr(module, name)  # so that nothing moves, saves or sends it
            block.register_forward_pre_hook(functools.partial(self.enter, weights))

    def enter(self, weights, *inputs):
        computing = torch.cuda.current_stream()
        self.stream.wait_event(self.before)  # until then the memory that the copies get may be in use
        with torch.cuda.stream(self.stream):
            copies = utils.send_to_device(weights, self.device, non_blocking=True)
        self.before = computing.record_event()
        computing.wait_stream(self.stream)
        for module, name in self.present:
            delattr(module, name)
        for (module, name), weight in copies.items():
            setattr(module, name, weight)
        self.present = copies


def cut_positions(args, transformer):
    """Keeps of the table of positions the middle that the run's sizes use: the whole can take 0.4 GiB."""
    embed = transformer.pos_embed
    side = max(args.resolution, *map(max, list_buckets(args))) // (8 * embed.patch_size)
    side += (embed.pos_embed_max_size - side) % 2  # else the middle would move
    embed.pos_embed = embed.cropped_pos_embed(side * embed.patch_size, side * embed.patch_size)
    embed.pos_embed_max_size = side


def load_trained(args, parts, accelerator, targets, checkpoint):
    """The models of `targets` in the frozen dtype, with float32 adapters on their layers: new, or read from a file."""
    torch.manual_seed(args.seed)
    dtype = frozen_dtype(accelerator)
    source = checkpoint or args.init_lora
    trained = {}
    for name, layers in targets.items():
        options = {}
        if name == "transformer":
            # prepare_model_for_kbit_training would cast norms to float32, which autocast undoes.
            options["quantization_config"] = read_quantization(args, dtype)
            if args.blocks_to_swap:
                options["device_map"] = {"": "cpu"}
        model = load_to_train(args, parts, accelerator, name, dtype, **options)
        make_trainable(args, model, layers)
        if source:
            set_peft_model_state_dict(model, read_adapters(args, source, name, model))
            training_utils.cast_training_params(model, torch.float32)
        if name == "transformer":
            cut_positions(args, model)
            if args.blocks_to_swap:
                SwappedBlocks(model.transformer_blocks[: args.blocks_to_swap], accelerator.device)
        trained[name] = model.train()
    return trained


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_states(accelerator, models):
    """The models' weights by their own names. A collective, because under FSDP2 each process has a part of them."""
    states = {}
    for name, model in models.items():
        state = accelerator.get_state_dict(model)
        # Prefixes of torch.compile and of DDP.
        state = {key.replace("_orig_mod.", "").removeprefix("module."): weight for key, weight in state.items()}
        states[name] = state
    return states


def describe_adapters(args, config):
    """Header by which other programs know a LoRA file: Stability's ModelSpec, and the rank as sd-scripts names it.

    `config` is the transformer's.
    """
    version = "3-medium"
    if config.qk_norm:
        version = "3.5-medium" if config.dual_attention_layers else "3.5-large"
    prompt = args.instance_prompt or ""
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-v{version}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{RESULT['title']} {prompt}",
        "modelspec.trigger_phrase": prompt,
        "ss_network_dim": str(args.rank),
    }


def save_with_header(header, weights, path):
    """Writes a safetensors file: 8 bytes of length, JSON, tensors. safetensors itself orders each header at random."""
    data = save(weights)
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps({"__metadata__": header} | json.loads(data[8:end])).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def save_weights(args, accelerator, models, states, folder, parts=None):
    """Writes the adapters as a file that StableDiffusion3Pipeline.load_lora_weights reads, on the main process.

    `parts` are the base pipeline's when the result is written. In the result the scale, alpha / rank, is multiplied
    into lora_B, because many loaders ignore a header. A checkpoint has the raw weights.
    """
    if not accelerator.is_main_process:
        return
    final = parts is not None
    dtype = torch.float32
    if final and not args.upcast_before_saving:
        dtype = frozen_dtype(accelerator)
    layers = {}
    for name, model in models.items():
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
        state = get_peft_model_state_dict(model, state_dict=states[name], save_embedding_layers=False)
        if name == "transformer":
            header = describe_adapters(args, model.config)
        if final:
            scale = adapter_scale(**vars(args))
            state = {key: weight * scale if "lora_B" in key else weight for key, weight in state.items()}
        if final and name in TEXT_ENCODERS:  # transformers 5 finds their DoRA magnitudes under this name alone
            state = {re.sub("magnitude_vector$", "magnitude_vector.weight", key): v for key, v in state.items()}
        layers[f"{name}_lora_layers"] = {key: weight.to(dtype) for key, weight in state.items()}
    write = functools.partial(save_with_header, header)
    StableDiffusion3Pipeline.save_lora_weights(folder, **layers, save_function=write)


def batch_losses(args, accelerator, models, frozen, prompts, drawn):
    """Loss of each image, (B,), and after them what --output_preservation_weight adds, (B,).

    That is how far --class_prompt is from what the base model predicts. Its gradient is computed here, before the
    images' loss, so that only one graph at a time is in memory.
    """

    def losses(prompts, target=None):
        with accelerator.autocast():  # accelerate leaves it out under FSDP2
            text = frozen.embed(prompts)
            return flow_losses(args, models["transformer"], frozen.scheduler, drawn, text, target)

    if not args.output_preservation_weight:
        return losses(prompts)[0]
    adapters = sum(map(adapter_layers, models.values()), [])
    kept = [args.class_prompt] * len(prompts)
    for layer in adapters:
        layer.enable_adapters(False)
    with torch.no_grad():
        _, base_prediction = losses(kept)
    for layer in adapters:
        layer.enable_adapters(True)
    preserved, _ = losses(kept, base_prediction)
    accelerator.backward(args.output_preservation_weight * preserved.mean())
    return torch.cat([losses(prompts)[0], preserved.detach()])


def clip_gradient(args, accelerator, trained):
    """Clips the gradient to --max_grad_norm. Returns its norm before that."""
    return accelerator.clip_grad_norm_(trained.parameters, args.max_grad_norm)


# ---- Optimizer ------------------------------------------------------------------------------------------------------


def make_optimizer(args, accelerator, models):
    """AdamW, its 8-bit form or Prodigy, with a parameter group for each model."""
    rate = args.learning_rate
    if args.scale_lr:
        rate *= accelerator.num_processes * args.gradient_accumulation_steps * args.train_batch_size
    groups = []
    for name, model in models.items():
        group = {"name": name, "params": trained_parameters(model), "lr": rate, "weight_decay": args.adam_weight_decay}
        if name in TEXT_ENCODERS:
            group["weight_decay"] = args.adam_weight_decay_text_encoder
            if args.optimizer == "adamw":
                group["lr"] = args.text_encoder_lr
        groups.append(group)
    shared = {"lr": rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        names = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
        return Prodigy(groups, **shared, **{name: getattr(args, f"prodigy_{name}") for name in names})
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **shared)
    # With a GradScaler the fused kernel skips overflows itself and accelerate cannot tell.
    fused = accelerator.scaler is None and accelerator.device.type in {"cpu", "cuda"}
    return torch.optim.AdamW(groups, **shared, fused=fused)


def make_schedule(args, optimizer, total):
    """The learning rate's factor at each of `total` updates."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max(total, args.lr_warmup_steps + 1),  # polynomial divides by the difference
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def check_optimizer(args, accelerator):
    """Makes the optimizer and its schedule on a layer, because each refuses flags of its own."""
    with or_refuse("these flags of the optimizer and its schedule do not fit together"):
        optimizer = make_optimizer(args, accelerator, {"transformer": torch.nn.Linear(1, 1)})
        make_schedule(args, optimizer, 1)


@dataclasses.dataclass
class Trained:
    """What is trained and always travels together."""

    models: dict  # by name, as accelerate runs them
    parameters: list
    optimizer: object
    schedule: object
    average: training_utils.EMAModel | None


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

FORMAT = 1  # of a checkpoint; bump it when old and new scripts can no longer read each other's checkpoints
MANIFEST = "dreambooth.json"
AVERAGE = "ema.safetensors"
MUST_MATCH = (
    "method pretrained_model_name_or_path pretrained_transformer_model_name_or_path revision variant"
    " train_text_encoder optimizer use_8bit_adam use_ema full_bf16 rank lora_alpha use_rslora use_dora lora_layers"
    " lora_blocks bnb_quantization_config_path"
).split()
MAY_DIFFER = (  # without a word
    "local_rank cache_dir dataloader_num_workers output_dir logging_dir report_to"
    " tracker_project_name tracker_run_name checkpointing_steps checkpoints_total_limit resume_from_checkpoint dry_run"
    " push_to_hub hub_model_id hub_private_repo validation_prompt validation_data_dir num_validation_images"
    " validation_epochs validation_num_inference_steps validation_guidance_scale skip_final_inference"
).split()
LENGTH = ("max_train_steps", "num_train_epochs")  # changes the rate, unless that is constant
SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")  # of the optimizer's groups: on resume the flags' win
SHARES = ("processes", "train_batch_size", "gradient_accumulation_steps")  # their product is the size of an update


@dataclasses.dataclass
class Progress:
    """Where a run stands."""

    facts: dict  # what describe_run gives, for checkpoints
    caught: list  # numbers of signals
    step: int  # updates made
    total: int
    bar: tqdm | None = None
    skipped: list = dataclasses.field(default_factory=list)  # updates that were not finite
    failed: list = dataclasses.field(default_factory=list)  # what went wrong without costing the weights
    seconds: list = dataclasses.field(default_factory=list)  # of each update
    losses: list = dataclasses.field(default_factory=list)  # of each update
    clock: float = 0.0  # when the present update began
    memory_gb: float = 0.0  # the most so far
    validation_loss: float = 0.0  # of the held-out images, the last one
    finished: bool = False


def describe_run(args, accelerator, dataset):
    """The run's flags without the secret, and what else trackers keep and a resumed run compares."""
    facts = vars(args) | {"method": METHOD, "processes": accelerator.num_processes, "images": dataset.digest}
    del facts["hub_token"]
    facts["validation_prompt"] = " | ".join(args.validation_prompt or ())  # trackers take no lists
    base = Path(args.pretrained_model_name_or_path)
    if base.is_dir():
        facts["pretrained_model_name_or_path"] = str(base.resolve())
    return facts


def list_states(accelerator, trained):
    """What this process adds to a checkpoint beside the weights, by file: all of it, or its part under FSDP2."""
    part = f"_{accelerator.process_index}" if is_split(accelerator) else ""
    states = {f"optimizer{part}.bin": trained.optimizer, f"scheduler{part}.bin": trained.schedule}
    if accelerator.scaler:
        states[f"scaler{part}.pt"] = accelerator.scaler
    return states


def save_checkpoint(args, accelerator, trained, state):
    """Writes checkpoint-{step}, which appears under that name only once it is whole, and then removes the oldest."""
    folder = Path(args.output_dir, f"checkpoint-{state.step}")
    partial = folder.with_name(f".{folder.name}.partial")
    what = f"saving {folder} ({shutil.disk_usage(args.output_dir).free / 1e9:.3f} GB were free)"
    states = read_states(accelerator, trained.models)
    failed = []
    with attempt(failed, what):
        save_weights(args, accelerator, trained.models, states, partial)
        # Under FSDP2 accelerator.save_state would write the whole model as well.
        partial.mkdir(exist_ok=True)
        if accelerator.is_main_process or is_split(accelerator):
            for file, part in list_states(accelerator, trained).items():
                torch.save(part.state_dict(), partial / file)
    failed = utils.gather_object(failed)  # now all processes have written their part
    if accelerator.is_main_process:
        with attempt(failed, what):
            if not failed:
                complete_checkpoint(args, trained.average, state, partial)
                remove(folder)
                partial.rename(folder)
                tidy_checkpoints(args, state.step)
                log.info(f"Saved {folder}")
        remove(partial)  # it may have filled the disk
        state.failed += failed[:1]
    accelerator.wait_for_everyone()


def complete_checkpoint(args, average, state, folder):
    """Adds the averaged weights and the manifest to what is written."""
    if average:
        tensors = {str(number): weight.contiguous() for number, weight in enumerate(average.shadow_params)}
        tensors["step"] = torch.tensor(average.optimization_step)
        save_file(tensors, folder / AVERAGE)
    write_manifest(args, state, folder, ["**/*"])


def write_manifest(args, state, folder, patterns):
    """Writes what a checkpoint or the result consists of, gives it the umask's mode and flushes it to the disk."""
    sizes = {}
    for pattern in patterns:
        for path in Path(folder).glob(pattern):
            if path.is_file():
                sizes[str(path.relative_to(folder))] = path.stat().st_size
    manifest = {"format": FORMAT, "step": state.step, "seed": args.seed, "run": state.facts, "files": sizes}
    path = Path(folder, MANIFEST)
    path.write_text(json.dumps(manifest, indent=2))
    for name in (*sizes, MANIFEST):
        with contextlib.suppress(OSError):  # a file system without modes
            Path(folder, name).chmod(path.stat().st_mode)
        try:
            with Path(folder, name).open("rb+") as file:
                os.fsync(file.fileno())  # else a crash now could leave the name without the contents
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning_once(f"{args.output_dir} cannot be flushed to its disk, a crash may cost files: {error}")


def remove(folder):
    """Removes a folder; of one that was moved elsewhere and linked back, the link."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def tidy_checkpoints(args, step):
    """Renames checkpoints of an abandoned run, later than this one, and removes those over the limit."""
    present = list_checkpoints(args.output_dir)
    for number, path in present.items():
        if number > step:
            aside = path.rename(f"{path}.{time.time():.0f}")
            log.warning(f"{path} belongs to an abandoned run; renamed to {aside}")
    kept = [path for number, path in present.items() if number <= step]
    for old in kept[args.checkpoints_total_limit or sys.maxsize :]:
        remove(old)


def list_checkpoints(output_dir):
    """Folders named checkpoint-N by their number, the newest first; other names are left alone."""
    paths = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            paths[int(number)] = path
    return dict(sorted(paths.items(), reverse=True))


def read_manifest(folder):
    """What a checkpoint holds. Errors: ValueError that says what is wrong with it."""
    try:
        manifest = json.loads(Path(folder, MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            refuse(f"{folder}: its format is {manifest.get('format')}, not {FORMAT}: use the script that wrote it")
        for name, size in manifest["files"].items():
            found = Path(folder, name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes, not {size}")
        manifest["step"], manifest["seed"], [manifest["run"][name] for name in SHARES]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is no checkpoint to resume from: {error}") from error
    return manifest


def find_checkpoint(args):
    """Folder and manifest of --resume_from_checkpoint, or (None, {}) where training starts anew."""
    wanted = args.resume_from_checkpoint
    present = list(list_checkpoints(args.output_dir).values())
    if not wanted:
        if present and not args.dry_run:
            found = f"--output_dir {args.output_dir!r} has {present[0].name} of an earlier run"
            refuse(f"{found}: add --resume_from_checkpoint latest, give another folder, or take the checkpoints away")
        return None, {}
    if wanted != "latest":
        present = [path for path in (Path(wanted), Path(args.output_dir, wanted)) if path.is_dir()][:1]
    else:
        with contextlib.suppress(ValueError):  # no result, or not a whole one
            manifest = read_manifest(args.output_dir)
            asked = {"max_train_steps": args.max_train_steps, "num_train_epochs": args.num_train_epochs}
            if asked.items() <= manifest["run"].items():
                return Path(args.output_dir), manifest
    for folder in present:
        try:
            return folder, read_manifest(folder)
        except ValueError as error:
            log.warning(f"passed over: {error}")
    if wanted != "latest":
        refuse(f"--resume_from_checkpoint {wanted!r}: no whole checkpoint, neither here nor in {args.output_dir!r}")
    log.warning(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}, training starts anew")
    return None, {}


def compare_runs(accelerator, checkpoint, manifest, now):
    """Stops if the checkpoint's model or optimizer settings differ; warns about other changes, which take effect."""
    then = manifest.get("run", now)
    differ = [name for name in then if name in now and then[name] != now[name]]
    fixed = MUST_MATCH
    if is_split(accelerator):
        fixed = [*MUST_MATCH, "processes"]
    for name in fixed:
        if name in differ:
            refuse(f"{checkpoint} was trained with {name} {then[name]!r}, not {now[name]!r}: give the same")
    silent = [*MAY_DIFFER]
    if math.prod(then[name] for name in SHARES) == math.prod(now[name] for name in SHARES):
        silent += SHARES  # an update has the same images, however they are shared out
    if now["lr_scheduler"].startswith("constant"):
        silent += LENGTH
    changed = [f"{name} {then[name]!r} -> {now[name]!r}" for name in differ if name not in silent]
    if changed:
        log.warning(f"resuming {checkpoint} with changed flags: {', '.join(changed)}")


def resume(accelerator, checkpoint, trained, state):
    """Loads what goes with a checkpoint's weights: optimizer, schedule, scaler, average. The flags' settings win."""
    if not checkpoint or state.finished:
        return
    settings = []
    for group in trained.optimizer.param_groups:
        settings.append({name: group[name] for name in SETTINGS})
    with or_refuse(f"{checkpoint} cannot be loaded: delete it and resume from an older one"):
        device = device_of(accelerator) if is_split(accelerator) else "cpu"  # the optimizer moves a copy to the device
        for file, part in list_states(accelerator, trained).items():
            saved = torch.load(Path(checkpoint, file), map_location=device, weights_only=True)
            part.load_state_dict(saved)
        if trained.average:
            weights = load_file(Path(checkpoint, AVERAGE), device=str(device_of(accelerator)))
            trained.average.optimization_step = weights.pop("step").item()
            trained.average.shadow_params = [weights[str(number)] for number in range(len(weights))]
    schedule = trained.schedule.scheduler  # torch's LambdaLR, inside accelerate's wrapper
    schedule.base_lrs = [own["initial_lr"] for own in settings]
    groups = trained.optimizer.param_groups  # loading has made new ones
    for group, own, factor in zip(groups, settings, schedule.lr_lambdas, strict=True):
        group.update(own)
        group["lr"] = own["initial_lr"] * factor(schedule.last_epoch)
    log.info(f"Resumed from {checkpoint}")
    if state.step >= state.total:
        log.warning(f"nothing is left to train: {checkpoint} has {state.step} updates, {state.total} are asked for")


# ---- Validation -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluation(trained):
    """Models in eval mode, without gradients and with the averaged weights if there are any, for the with block."""
    models = torch.nn.ModuleList(trained.models.values())
    models.eval()
    if trained.average:
        trained.average.store(trained.parameters)
        trained.average.copy_to(trained.parameters)
    try:
        with torch.no_grad():
            yield
    finally:
        if trained.average:
            trained.average.restore(trained.parameters)
        models.train()


@contextlib.contextmanager
def rescue(args, accelerator, trained, state):
    """Saves a checkpoint if an error ends the training of one process; of several, others may be waiting elsewhere.

    An update that the error has cut short may be in it in part. An older result does not count as one from here on.
    """
    if not state.finished:
        Path(args.output_dir, MANIFEST).unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        lost = not state.finished and state.step not in {0, *list_checkpoints(args.output_dir)}
        finite = all(parameter.isfinite().all() for parameter in trained.parameters)
        if lost and finite and accelerator.num_processes == 1:
            save_checkpoint(args, accelerator, trained, state)
        raise


@contextlib.contextmanager
def attempt(failed, what, kind=Exception):
    """Logs an exception and records `what` in `failed` instead of raising. No collective may be called inside."""
    try:
        yield
    except kind as error:  # drawing, a tracker and the Hub can raise anything
        failed.append(what)
        reason = " ".join(str(error).split())
        log.error(f"{what} failed ({type(error).__name__}: {reason})", main_process_only=False)


def draw_images(args, transformer, frozen, prompt, seeds, **options):
    """PIL images of one prompt, one a seed, by the base pipeline with its own steps and guidance unless `options` say.

    Errors: ValueError for latents that are not finite.
    """
    count = len(seeds)
    embeds, pooled = frozen.embed([prompt] * count)
    empty_embeds, empty_pooled = frozen.embed([""] * count)
    absent = dict.fromkeys(("vae", *TEXT_ENCODERS, *TOKENIZERS))
    scheduler = type(frozen.scheduler).from_config(frozen.scheduler.config)
    pipeline = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **absent)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=empty_embeds,
        negative_pooled_prompt_embeds=empty_pooled,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        height=args.resolution,
        width=args.resolution,
        output_type="latent",
        **options,
    ).images
    if not latents.isfinite().all():
        raise ValueError("the latents are not finite: the precision overflows, or training has diverged")
    return decode_latents(args, transformer, frozen.vae, latents)


DECODING = 5000  # bytes a pixel that the VAE has taken on an H100


def decode_latents(args, transformer, vae, latents):
    """PIL images of latents (B, C, h, w), in float32. If memory is short, the transformer waits on the CPU."""
    device = latents.device
    latents = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    short = args.offload or not has_room(device, DECODING * args.resolution**2)
    away = training_utils.offload_models(transformer, device="cpu", offload=short and transformer.device == device)
    with away, on_loan(vae, device), torch.autocast(device.type, enabled=False):
        pixels = [vae.decode(one).sample for one in latents.split(1)]  # one by one: 3 GiB each at 1024 px
    return VaeImageProcessor().postprocess(torch.cat(pixels), output_type="pil")


def add_class_images(args, parts, accelerator, dataset):
    """Adds the class images to the dataset; those that --class_data_dir lacks are drawn into it before."""
    present = list_images(args.class_data_dir)
    taken = {path.name.split("-")[0] for path in present}  # an interrupted run or a user may have left gaps
    free = [number for number in range(args.num_class_images) if str(number) not in taken]
    lacking = max(args.num_class_images - len(present), 0)
    accelerator.wait_for_everyone()  # until all have counted: then some start to draw
    if lacking:
        draw_class_images(args, parts, accelerator, free[:lacking])
        training_utils.free_memory()
    images = list_images(args.class_data_dir)[: args.num_class_images]
    dataset.add_images("class", "--class_data_dir", images, [(args.class_prompt,)] * len(images))


def draw_class_images(args, parts, accelerator, numbers):
    """Draws the class images of these numbers with the base model; the processes share the work."""
    dtype = DTYPES.get(args.prior_generation_precision, frozen_dtype(accelerator))
    embed = PromptTable(args, parts, accelerator, dtype)
    embed.fill(parts, [args.class_prompt, ""])
    transformer = load_frozen(args, parts, accelerator, "transformer", dtype)
    vae = load_part(args, parts, "vae", **on_device(accelerator, torch.float32))
    frozen = Frozen(embed, vae, load_scheduler(args, parts, accelerator))
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    firsts = range(0, len(mine), args.sample_batch_size)
    remedy = "lower --sample_batch_size if memory ran out, or change --prior_generation_precision"
    for first in tqdm(firsts, desc="Drawing class images", disable=not accelerator.is_main_process):
        batch = mine[first : first + args.sample_batch_size]
        seeds = [derive_seed(args.seed, "class drawing", number) for number in batch]
        with or_refuse(f"class images cannot be drawn in {dtype}: {remedy}"), torch.no_grad():
            images = draw_images(args, transformer, frozen, args.class_prompt, seeds)
        for number, image in zip(batch, images, strict=True):
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            with or_refuse(f"--class_data_dir {args.class_data_dir!r} cannot be written"):
                save_image(image, Path(args.class_data_dir, f"{number}-{digest[:16]}.png"))
    accelerator.wait_for_everyone()


def save_image(image, path):
    """Writes a PNG that is either whole or not there."""
    partial = path.with_name(f".{path.name}")
    image.save(partial, format="PNG")
    partial.replace(path)


def share(accelerator, count):
    """This process's part of the numbers below `count`: as many on each process, so some numbers may come twice.

    Under FSDP2 all processes must take part in each forward pass.
    """
    padded = math.ceil(count / accelerator.num_processes) * accelerator.num_processes
    return [number % count for number in range(accelerator.process_index, padded, accelerator.num_processes)]


def gather_dict(found):
    """The entries that all processes have found, in the order of their keys."""
    return dict(sorted(utils.gather_object(list(found.items()))))


HELD_OUT_LEVELS = 8  # noise levels, spread evenly


def measure_held_out(args, transformer, frozen, index):
    """Loss of a held-out image at each noise level, from the most noise to the least; the noise is always the same."""
    example = frozen.held_out[0, index, 0][0]
    device = frozen.scheduler.sigmas.device
    moments = example["data"][None].to(device).expand(HELD_OUT_LEVELS, -1, -1, -1)
    seeds = [derive_seed("held out", index, level) for level in range(HELD_OUT_LEVELS)]
    latents, noise, _, mask = draw_latents(args, frozen.vae.config, moments, seeds, torch.device("cpu"))
    u = (torch.arange(HELD_OUT_LEVELS, device=device) + 0.5) / HELD_OUT_LEVELS
    text = frozen.embed([example["prompt"]] * HELD_OUT_LEVELS)
    losses, _ = flow_losses(args, transformer, frozen.scheduler, (latents, noise, u, mask), text)
    return losses.tolist()


def log_held_out(accelerator, losses, state):
    """Logs the held-out loss: the mean over the images at each noise level, 8 the most noise, and that of all."""
    means = np.mean(losses, axis=0)
    figures = {f"validation_loss_{len(means) - number}": mean for number, mean in enumerate(means)}
    figures["validation_loss"] = state.validation_loss = means.mean()
    log_figures(accelerator, state, figures)


def validate(args, accelerator, trained, frozen, state):
    """Logs the held-out loss and draws the validation images, as far as flags ask. Returns the images' paths.

    Each process tries its share by itself, and then all agree: one that fails alone leaves nobody waiting. What fails
    is logged; at the end it is a failure of the run. Under FSDP2 a forward pass needs all processes: one that cannot
    do its part, because memory runs out, ends, and the launcher then ends the others.
    """
    transformer = accelerator.unwrap_model(trained.models["transformer"], keep_torch_compile=False)
    what = "drawing the final images" if state.finished else f"validation at update {state.step}"
    held_out = len(frozen.held_out or ())
    wanted = args.num_validation_images * len(args.validation_prompt or ())
    if state.finished and args.skip_final_inference:
        wanted = 0
    kind = ValueError if is_split(accelerator) else Exception  # draw_images raises it after the passes
    failed = []
    losses = {}
    images = {}
    with accelerator.autocast():
        for index in share(accelerator, held_out):
            with attempt(failed, what, kind):
                losses[index] = measure_held_out(args, transformer, frozen, index)
        for number in share(accelerator, wanted):
            if read_signal(accelerator, state.caught):
                break
            with attempt(failed, what, kind):
                images[number] = draw_validation_image(args, transformer, frozen, number)
    training_utils.free_memory()
    losses = gather_dict(losses)
    images = gather_dict(images)
    failed = utils.gather_object(failed)
    paths = []
    if accelerator.is_main_process:
        with attempt(failed, what):
            if len(losses) == held_out > 0:
                log_held_out(accelerator, list(losses.values()), state)
            if len(images) == wanted > 0:
                paths = save_validation(args, accelerator, list(images.values()), state)
    if state.finished and failed:
        state.failed.append(what)
    return paths


def draw_validation_image(args, transformer, frozen, number):
    """A validation image; numbers count prompt after prompt, and image i of each prompt is drawn from seed + i."""
    row, column = divmod(number, args.num_validation_images)
    (image,) = draw_images(
        args,
        transformer,
        frozen,
        args.validation_prompt[row],
        [args.seed + column],
        num_inference_steps=args.validation_num_inference_steps,
        guidance_scale=args.validation_guidance_scale,
    )
    return image


def save_validation(args, accelerator, images, state):
    """Writes the images and their grid, a row a prompt, and sends them to the trackers. Returns their paths."""
    title = "test" if state.finished else "validation"
    pattern = "image_{}.png" if state.finished else f"validation/step-{state.step:06d}-{{}}.png"
    paths = [Path(args.output_dir, pattern.format(number)) for number in range(len(images))]
    paths[0].parent.mkdir(exist_ok=True)
    for path, image in zip(paths, images, strict=True):
        save_image(image, path)
    prompts = args.validation_prompt
    grid = make_image_grid(images, len(prompts), args.num_validation_images)
    save_image(grid, Path(args.output_dir, pattern.format("grid")))
    rows = {}
    for number, pixels in enumerate(np.split(np.stack(images), len(prompts))):
        words = re.sub(r"\W+", "_", prompts[number])[:60]  # trackers make it part of a file's name
        rows[f"{title}_{number}_{words}" if len(prompts) > 1 else title] = pixels
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images(rows, step=state.step, **options)
    return paths


# ---- The result and the Hub -----------------------------------------------------------------------------------------

LICENCE = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md"


def public_name(value):
    """A text without the folders above a file or folder that it names: a card is public."""
    if os.path.exists(value):  # noqa: PTH110  Path.exists raises on a name that is too long
        return Path(value).resolve().name
    return value


def describe_flags(args):
    """The flags that were given, as on a command line, without secrets and folders above files: a card is public."""
    parser = build_parser()
    words = []
    for name, value in vars(args).items():
        if value == parser.get_default(name) or name in ("output_dir", "local_rank", "hub_token"):
            continue
        words.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [public_name(str(each)) for each in values]
    return shlex.join(words)


def describe_cost(state):
    """What the updates took since the run was started or resumed, and the last held-out loss."""
    updates = len(state.seconds)
    if not updates:
        return "no update was left to make"
    seconds = sum(state.seconds)
    cost = f"{updates} updates in {seconds:.0f} s ({seconds / updates:.2f} s each), at most {state.memory_gb:.1f} GB"
    return f"{cost}; held-out loss {state.validation_loss:.4f}" if state.validation_loss else cost


def describe_result(args, parts, repository, state):
    """The model card's text: what was trained, the program that loads it, and the flags."""
    base = public_name(args.pretrained_model_name_or_path)
    given = {"revision": args.revision, "variant": args.variant}
    options = "".join(f", {name}={value!r}" for name, value in given.items() if value)
    own = args.pretrained_transformer_model_name_or_path
    if own:
        call = f"from_pretrained({public_name(own)!r}"
        if own.endswith(".safetensors"):
            call = f"from_single_file({public_name(own)!r}, config={base!r}"
        call += ", subfolder='transformer', torch_dtype=torch.bfloat16)"
        options += f", transformer=diffusers.SD3Transformer2DModel.{call}"
    source = RESULT["pipeline"].format(base=base, options=options, result=repository)
    if "text_encoder_3" not in parts:
        source += ", text_encoder_3=None, tokenizer_3=None"
    subject = f" Their subject is called `{args.instance_prompt}`." if args.instance_prompt else ""
    prompts = args.validation_prompt or [args.instance_prompt or ""]
    return f"""# {RESULT["title"]} - {repository}

DreamBooth weights for {base}, trained for {state.step} updates.{subject} {describe_cost(state)}.

```py
import diffusers
import torch

pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained({source}, torch_dtype=torch.bfloat16)
{RESULT["usage"].format(repository)}
pipeline.to("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
size = {{"height": {args.resolution}, "width": {args.resolution}, "max_sequence_length": {args.max_sequence_length}}}
pipeline({prompts[0]!r}, **size).images[0].save("image.png")
```

```sh
{describe_flags(args)}
```

The base model's [licence]({LICENCE}) holds for these weights.
"""


def sign_card(card):
    """A model card with a hidden last line, by which a later run sees whether a person has changed it."""
    return f"{card}\n<!-- The next run replaces this file unless it was changed: {derive_seed(card)} -->\n"


def write_card(args, parts, repository, state, image_paths):
    """Writes the model card, README.md, with the final images as its gallery.

    A card that a person wrote or changed gets another name.
    """
    base = args.pretrained_model_name_or_path
    data = huggingface_hub.ModelCardData(
        license="other",
        license_name="stabilityai-ai-community",
        license_link=LICENCE,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers-training", "diffusers", "sd3", "sd3-diffusers", *RESULT["tags"]],
        base_model=None if Path(base).is_dir() else base,  # the Hub refuses a card whose base is not an id
        instance_prompt=args.instance_prompt,
        widget=[
            {"text": args.validation_prompt[number // args.num_validation_images], "output": {"url": path.name}}
            for number, path in enumerate(image_paths)
        ]
        or None,
    )
    gallery = "<Gallery />" if image_paths else ""
    text = describe_result(args, parts, repository, state)
    path = Path(args.output_dir, "README.md")
    if path.is_file():
        present = path.read_text(encoding="utf-8", errors="replace")
        if present != sign_card(present.rpartition("\n<!--")[0]):
            kept = path.rename(path.with_suffix(f".{time.time():.0f}.md"))
            log.warning(f"{path} was written or changed by a person; it is now {kept}")
    path.write_text(sign_card(f"---\n{data.to_yaml()}\n---\n\n{gallery}\n\n{text}"), encoding="utf-8")


def open_repository(args, accelerator):
    """Id of the Hub repository, which is created: better at the start than after hours. None without --push_to_hub."""
    if not args.push_to_hub or not accelerator.is_main_process:
        return None
    repository = args.hub_model_id or Path(args.output_dir).resolve().name
    remedy = "give --hub_model_id USER/NAME, a token that may write (`hf auth login`, HF_TOKEN), huggingface_hub 1.5"
    with or_refuse(f"--push_to_hub: the repository {repository!r} cannot be created or written: {remedy}"):
        options = {"private": args.hub_private_repo or None, "exist_ok": True}
        repository = huggingface_hub.create_repo(repository, **options, token=args.hub_token).repo_id
        huggingface_hub.auth_check(repository, write=True, token=args.hub_token)  # create_repo takes any token
    return repository


def publish(args, parts, repository, state, image_paths):
    """Writes the model card and uploads the result, on the main process. Either may fail by itself."""
    with attempt(state.failed, "writing the model card"):
        write_card(args, parts, repository or public_name(args.output_dir), state, image_paths)
    if not repository:
        return
    with attempt(state.failed, "the upload"):
        huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=args.output_dir,
            allow_patterns=["README.md", *RESULT["files"], *(path.name for path in image_paths)],
            commit_message="End of training",
            token=args.hub_token,
        )


# ---- Training -------------------------------------------------------------------------------------------------------


def make_folder(flag, folder):
    """Creates a folder and refuses one that cannot be written to."""
    with or_refuse(f"{flag} {folder!r} cannot be written: give another folder"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


OUTPUT = ("README.md", "image_*.png", MANIFEST, "validation/*", "checkpoint-*[0-9]/*")  # beside the result


def check_output(args):
    """Refuses logs that leave output_dir or get into what is written there, and what is in the way of that."""
    logs = os.path.normpath(Path(args.logging_dir, args.tracker_run_name or "", args.tracker_project_name))
    for pattern in (*RESULT["files"], *OUTPUT):
        name, folder, _ = pattern.partition("/")
        if logs.startswith(("..", os.sep)) or fnmatch.fnmatch(Path(logs).parts[0], name):
            names = "--logging_dir, --tracker_run_name, --tracker_project_name"
            refuse(f"{names}: {logs!r} leads out of --output_dir or into the result: give other names")
        for path in Path(args.output_dir).glob(name):
            if path.is_dir() != bool(folder) or not os.access(path, os.W_OK):
                refuse(f"{path} is in the way of what the run writes: take it away or give another --output_dir")


def start_accelerator(args):
    """The accelerator, its trackers not yet started, after creating the folders that the run writes to."""
    make_folder("--output_dir", args.output_dir)
    check_output(args)
    if args.with_prior_preservation:
        make_folder("--class_data_dir", args.class_data_dir)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # torch 2.13 renamed this argument
    if args.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    logs = Path(args.output_dir, args.logging_dir, args.tracker_run_name or "")
    AcceleratorState._reset_state()  # in a notebook the previous run's settings would stay
    with or_refuse(f"accelerate does not start with --mixed_precision {args.mixed_precision} as it is configured"):
        accelerator = Accelerator(
            # A plugin, because the environment's number overrides a plain argument.
            gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else split_names(args.report_to),
            project_config=utils.ProjectConfiguration(args.output_dir, str(logs)),
            dataloader_config=utils.DataLoaderConfiguration(even_batches=False, non_blocking=True),
            step_scheduler_with_optimizer=False,  # else it would step once per process
            kwargs_handlers=[
                # Else the half-precision copy of every float32 weight would stay until the forward pass ends.
                utils.AutocastKwargs(cache_enabled=False),
                utils.InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # the others wait while one process encodes
                # The only buffer, a 226 MB table of positions, never changes. Views avoid a copy of the gradients.
                utils.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        refuse("--mixed_precision fp16 needs a GPU: on a CPU take bf16 or no")
    if is_split(accelerator):
        check_fsdp(args, accelerator.state.fsdp_plugin)
    return accelerator


WITHOUT_FSDP = (  # it splits one float32 model, and not the sums over all weights that Prodigy needs
    "use_ema train_text_encoder use_8bit_adam prodigy bnb_quantization_config_path full_bf16 fused_backward_pass"
).split()


def check_fsdp(args, plugin):
    """Refuses what FSDP2 cannot do, and has it leave the timesteps in float32 and the frozen encoders whole."""
    if getattr(plugin, "fsdp_version", 1) != 2:
        refuse("FSDP is supported in its second version alone: set fsdp_version to 2, with accelerate 1.6 or later")
    for name in WITHOUT_FSDP:
        if vars(args).get(name) or name == args.optimizer:
            refuse(f"{name} does not work under FSDP2: leave it out, or choose DDP in `accelerate config`")
    utils.disable_fsdp_ram_efficient_loading()  # transformers would read the encoders on one process alone
    plugin.cpu_ram_efficient_loading = False
    policy = plugin.mixed_precision_policy
    if policy:  # bfloat16 can tell only 353 of the 1000 timesteps apart
        plugin.mixed_precision_policy = dataclasses.replace(policy, cast_forward_inputs=False)


def claim_folder(args, accelerator, cleanup):
    """Locks output_dir until the run ends and removes what a killed run has left; a dry run does without."""
    if args.dry_run or not accelerator.is_main_process:
        return
    folder = Path(args.output_dir)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        refuse(f"--output_dir {args.output_dir!r} is in use by another run: give another folder")
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        log.warning(f"{folder} cannot be locked, so see to it that no other run writes to it ({error})")
    cleanup.callback(lock.release)
    for left in (folder / ENCODED, *folder.glob(".checkpoint-*.partial")):
        shutil.rmtree(left, ignore_errors=True)
    cleanup.callback(shutil.rmtree, folder / ENCODED, ignore_errors=True)


def start_trackers(args, accelerator, facts):
    """Starts the trackers, with what describes the run as its configuration."""
    config = {name: value for name, value in facts.items() if value is not None}
    options = {"wandb": {"dir": str(Path(args.output_dir, args.logging_dir)), "name": args.tracker_run_name}}
    with or_refuse(f"--report_to {args.report_to}: could not start a tracker; fix it or drop it from --report_to"):
        accelerator.init_trackers(args.tracker_project_name, config=config, init_kwargs=options)


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def catch_signals(cleanup):
    """A list that signals put their number into; a second one ends the process.

    Those that are ignored (nohup) stay so, but for SIGUSR1: a launcher that it would end is started with it ignored.
    """
    caught = []
    times = []

    def catch(number, frame):
        times.append(time.monotonic())
        if times[-1] - times[0] > 2:  # where all processes get a signal, launchers pass it on to them once more
            os._exit(128 + number)
        if not caught:
            name = signal.Signals(number).name
            print(f"\n{name}: the run saves what it has trained and ends; a second ends it at once", file=sys.stderr)
        caught.append(number)

    with contextlib.suppress(ValueError):  # outside the main thread Python cannot catch signals
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before != signal.SIG_IGN or number.name == "SIGUSR1":
                signal.signal(number, catch)
                cleanup.callback(signal.signal, number, before)
    return caught


def ignore_signals(worker):
    """Has a loader process leave signals to the training process, which needs its batches to finish the update."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C and a launcher signal the whole group
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch itself ends the process by it


def read_signal(accelerator, caught):
    """The signal that any process has caught, or 0. A collective: to be called on all of them alike."""
    number = max(caught, default=0)
    if accelerator.num_processes == 1:  # else the host would wait for the device
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def list_prompts(args, dataset, held_out):
    """All prompts that a run needs, each once; the empty one where captions are dropped or images are drawn."""
    prompts = {*(args.validation_prompt or ()), args.class_prompt} - {None}
    for images in filter(None, (dataset, held_out)):
        for choices in images.prompts.values():
            prompts.update(*choices)
    if args.caption_dropout or args.validation_prompt:
        prompts.add("")
    return sorted(prompts)


def encode_once(args, parts, accelerator, targets, dataset, held_out):
    """Encodes what training does not change; each text encoder goes before the next one comes, then the VAE."""
    embed = PromptTable(args, parts, accelerator, frozen_dtype(accelerator), targets)
    prompts = list_prompts(args, dataset, held_out)
    embed.report_cut(prompts)
    embed.fill(parts, prompts)
    vae = load_part(args, parts, "vae", **on_device(accelerator, torch.float32))
    vae.enable_slicing()  # image by image: 2.5 GiB at 1024 px, whatever the batch
    args.cache_latents |= bool(dataset) and dataset.has_fixed_crops()  # the same latents, for less
    if args.cache_latents and dataset:
        cache_moments(dataset, vae, accelerator, "latents")
    if held_out:
        cache_moments(held_out, vae, accelerator, "held out")
    if args.cache_latents or args.offload:
        vae.to("cpu")
        training_utils.free_memory()
    return Frozen(embed, vae, load_scheduler(args, parts, accelerator), held_out)


def make_loader(args, accelerator, dataset):
    """This process's batches, on the device; the list of all, to be filled each epoch; updates an epoch and in all."""
    batches = Batches(order_epoch(args, dataset, accelerator.num_processes, 0))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        worker_init_fn=ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    updates = len(batches) // (accelerator.num_processes * args.gradient_accumulation_steps)
    total = args.max_train_steps or args.num_train_epochs * updates
    if args.lr_warmup_steps > total and args.lr_scheduler != "constant":
        log.warning(f"--lr_warmup_steps {args.lr_warmup_steps}: the run ends in the warm-up, after {total} updates")
    return accelerator.prepare(loader), batches, updates, total


def checkpoint_activations(model):
    """Turns gradient checkpointing on, by the name that the library and its version give it."""
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    for name in names:
        if hasattr(model, name):
            getattr(model, name)()
            return


def hand_out(accelerator, model, weights):
    """Gives each process its part of the weights, which the main process alone has read. A collective."""
    for part, weight in zip(model.state_dict().values(), weights.values(), strict=True):
        weight = weight.to(accelerator.device)
        torch.distributed.broadcast(weight, 0)
        if isinstance(part, DTensor):  # else a buffer, which each process has as a whole
            weight = distribute_tensor(weight, part.device_mesh, part.placements)
        part.copy_(weight)


def prepare_models(args, accelerator, models, total):
    """The models as accelerate runs them, their trained parameters, the optimizer, its schedule and the average."""
    if args.gradient_checkpointing:
        for model in models.values():
            checkpoint_activations(model)
    optimizer = make_optimizer(args, accelerator, models)
    schedule = make_schedule(args, optimizer, total)
    weights = models["transformer"].state_dict()
    *wrapped, optimizer, schedule = accelerator.prepare(*models.values(), optimizer, schedule)
    if is_split(accelerator):
        hand_out(accelerator, wrapped[0], weights)
    if accelerator.num_processes > 1:  # from here on no step takes long: notice a hanging process sooner
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(minutes=20))
    parameters = sum(map(trained_parameters, wrapped), [])
    average = None
    if args.use_ema:
        copies = [parameter.float() for parameter in parameters]
        average = training_utils.EMAModel(copies, decay=args.ema_decay, foreach=True)
    return Trained(dict(zip(models, wrapped, strict=True)), parameters, optimizer, schedule, average)


def read_update(args, accelerator, seen, norm):
    """Figures of an update: gradient norm and loss, the mean over its batches, (B,) each in `seen`, and processes."""
    losses = torch.stack(seen).mean(dim=0)
    seen.clear()
    weights = loss_weights(args)
    kinds = losses.chunk(len(weights))
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # FSDP2: each process has a part of it
    row = [*(kind.mean() for kind in kinds), torch.as_tensor(norm).to(losses)]
    rows = accelerator.gather(torch.stack(row)[None])
    *losses, norm = rows.mean(dim=0).tolist()  # here the host waits for the device, once an update
    figures = {"loss": float(np.dot(losses, list(weights.values()))), "grad_norm": norm}
    if losses[1:]:
        figures |= zip(weights, losses, strict=True)
    return figures


def check_finite(accelerator, state, figures):
    """Whether loss and gradient are finite. Counts updates that are not, and ends the run after ten in a row."""
    finite_loss = math.isfinite(figures["loss"])
    if finite_loss and math.isfinite(figures["grad_norm"]):
        return True
    if finite_loss and accelerator.scaler and accelerator.scaler.get_scale() > 1:
        return False  # float16 gradients overflow now and then, until the scale is low enough
    update = state.step + 1
    state.skipped.append(update)
    figures["skipped_updates"] = len(state.skipped)
    log.warning(f"skipping update {update}: loss or gradient is not finite: {figures}")
    if state.skipped[-10:] == list(range(update - 9, update + 1)):
        sys.exit("ten updates in a row were not finite: lower the rate and resume from the last checkpoint")
    return False


def step_optimizer(accelerator, trained, finite):
    """Updates the weights, the schedule and the average, unless loss or gradient is not finite."""
    if finite or accelerator.scaler:  # the scaler skips the update by itself, and lowers its scale
        trained.optimizer.step()
        finite = not accelerator.optimizer_step_was_skipped
    if finite:
        trained.schedule.step()
        if trained.average:
            trained.average.step(trained.parameters)
    trained.optimizer.zero_grad(set_to_none=True)


def peak_memory_gb(device):
    """The most memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def log_figures(accelerator, state, figures):
    """Sends figures to the trackers. One that fails is dropped: logs are not worth the weights."""
    for tracker in [*accelerator.trackers]:
        with attempt(state.failed, f"logging to {tracker.name}"):
            tracker.log(figures, step=state.step)
            continue
        accelerator.trackers.remove(tracker)


def log_update(accelerator, optimizer, figures, state):
    """One log point of an update, and the bar's figures."""
    for group in optimizer.param_groups:
        name = group["name"]
        figures["lr" if name == "transformer" else f"lr_{name}"] = group["lr"]
    seconds = time.perf_counter() - state.clock
    state.seconds.append(seconds)
    state.memory_gb = peak_memory_gb(accelerator.device)
    state.losses.append(figures["loss"])
    average = float(np.ma.masked_invalid(state.losses[-100:]).mean())
    figures["loss_average"] = average
    log_figures(accelerator, state, figures | {"seconds_per_update": seconds, "memory_gb": state.memory_gb})
    shown = {"loss": figures["loss"], "average": average, "lr": figures["lr"], "seconds": seconds}
    state.bar.set_postfix(shown, gb=state.memory_gb, refresh=False)
    state.bar.update()


def save_result(args, accelerator, trained, state, parts):
    """Writes the final weights, then a manifest. Where it cannot, it tries every minute until a signal comes."""
    while not state.finished:
        states = read_states(accelerator, trained.models)
        failed = []
        with attempt(failed, f"writing the result to {args.output_dir} (tried every minute until a signal)"):
            save_weights(args, accelerator, trained.models, states, args.output_dir, parts)
            if accelerator.is_main_process:
                write_manifest(args, state, args.output_dir, RESULT["files"])
        state.finished = not utils.gather_object(failed)
        if not state.finished:
            time.sleep(60)
            stop = read_signal(accelerator, state.caught)
            if stop:
                sys.exit(128 + stop)


def end_training(accelerator, state):
    """Ends the trackers and the process group: from here on no process waits for another."""
    state.bar.close()  # else it would be drawn once more below the last line
    # Drop DDP's reference to the process group, or its destructor deadlocks with gloo's threads over the GIL at exit.
    accelerator.state.group = torch.distributed.group.WORLD
    with attempt(state.failed, "ending the trackers"):
        accelerator.end_training()


def report_end(args, accelerator, state, stop):
    """Exits: 128 + signal after a signal, 1 with a reason if anything is missing, else normally."""
    reasons = []
    if state.failed:
        reasons.append(f"{', '.join(state.failed)} failed")
    if len(state.skipped) * 10 > state.total:
        reasons.append(f"{len(state.skipped)} of {state.total} updates were skipped, not being finite: lower the rate")
    if stop:
        name = signal.Signals(stop).name
        way = "makes what is missing" if state.finished else "goes on"
        reasons.append(f"{name} came at update {state.step}: --resume_from_checkpoint latest {way}")
    elif state.step < state.total:
        reasons.append(f"{state.step} of {state.total} updates were made")
    if reasons:
        if accelerator.is_main_process:
            print(f"\nwhat was trained is saved in {args.output_dir}, but {'; '.join(reasons)}", file=sys.stderr)
        sys.exit(128 + stop if stop else 1)
    log.info(f"The result is in {args.output_dir}")
    log.info(describe_cost(state))


MEMORY_FLAGS = (  # the most effective first
    "gradient_checkpointing cache_latents offload full_bf16 use_8bit_adam fused_backward_pass blocks_to_swap"
    " bnb_quantization_config_path"
).split()


@contextlib.contextmanager
def name_memory_flags(args):
    """Ends a run for which the GPU has too little memory with the flags that lower its need."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        unused = [f"--{flag}" for flag in MEMORY_FLAGS if not vars(args).get(flag, True)]
        sys.exit(f"out of GPU memory: add {', '.join(unused)}, or lower --train_batch_size ({error})")


def choose_seed(args, manifest):
    """Without --seed: that of the checkpoint, or a random one, the same on all processes."""
    drawn = utils.broadcast_object_list([random.SystemRandom().randrange(2**32)])[0]
    if args.seed is None:
        args.seed = manifest.get("seed", drawn)


def draw_sheet(args, dataset):
    """Writes dry_run.png: up to 200 instance images, cropped as in the first epoch."""
    count = min(len(dataset.images["instance"]), 200)
    sheet = Image.new("RGB", (10 * 192, math.ceil(count / 10) * 192), "white")
    for number in range(count):
        seed = derive_seed(args.seed, "instance", 0, number)
        pixels = dataset.pixels("instance", number, dataset.size(number), seed)
        picture = Image.fromarray(pixels[:3].permute(1, 2, 0).numpy())
        sheet.paste(ImageOps.contain(picture, (190, 190)), (number % 10 * 192, number // 10 * 192))
    save_image(sheet, Path(args.output_dir, "dry_run.png"))


def report_dry_run(args, parts, accelerator, targets, dataset):
    """Says what the run would do, before any weights are loaded, and draws its images as the model gets them."""
    table = PromptTable(args, parts, accelerator, frozen_dtype(accelerator))
    table.report_cut(list_prompts(args, dataset, None))
    if args.with_prior_preservation:
        dataset.images["class"] = [None] * args.num_class_images  # missing ones are not drawn
    _, _, updates, total = make_loader(args, accelerator, dataset)
    if not accelerator.is_main_process:
        return
    draw_sheet(args, dataset)
    count = 0
    for name, layers in targets.items():
        model = sketch_part(args, parts, name)
        make_trainable(args, model, layers)
        count += sum(parameter.numel() for parameter in trained_parameters(model))
    print(f"updates: {total}, which is {total / updates:.1f} epochs of {updates}")
    print(f"trained: {count:,} parameters of {', '.join(targets)}")
    print("drawn:   dry_run.png in --output_dir, cropped as in the first epoch")


def main(args):
    """Runs training from start to result."""
    accelerator = start_accelerator(args)
    with contextlib.ExitStack() as cleanup, name_memory_flags(args):
        # The run's own folder, the base model, the layers to train, and the checkpoint to resume, if any.
        claim_folder(args, accelerator, cleanup)
        check_optimizer(args, accelerator)
        parts = read_pipeline(args)
        checkpoint, manifest = find_checkpoint(args)
        finished = checkpoint == Path(args.output_dir)  # then only images, card and upload are made
        targets = choose_targets(args, parts, accelerator, checkpoint)
        choose_seed(args, manifest)

        # The data. Everything is checked before anything is created, drawn or loaded. A dry run ends here.
        dataset = read_instances(args)
        held_out = read_held_out(args)
        facts = describe_run(args, accelerator, dataset)
        compare_runs(accelerator, checkpoint, manifest, facts)
        if args.dry_run:
            report_dry_run(args, parts, accelerator, targets, dataset)
            return
        repository = open_repository(args, accelerator)
        start_trackers(args, accelerator, facts)
        if args.with_prior_preservation and not finished:
            add_class_images(args, parts, accelerator, dataset)
        loader, batches, updates, total = make_loader(args, accelerator, dataset)

        # Frozen models encode what training does not change, and are freed one by one. Then what is trained is loaded.
        frozen = encode_once(args, parts, accelerator, targets, None if finished else dataset, held_out)
        models = load_trained(args, parts, accelerator, targets, checkpoint)
        trained = prepare_models(args, accelerator, models, total)
        frozen.embed.trained = trained.models  # text encoders that are trained are called, not looked up
        state = Progress(facts, catch_signals(cleanup), manifest.get("step", 0), total, finished=finished)
        cleanup.enter_context(rescue(args, accelerator, trained, state))
        resume(accelerator, checkpoint, trained, state)

        state.bar = tqdm(total=total, initial=state.step, desc="Training", disable=not accelerator.is_main_process)
        first_epoch = max(state.step - 1, 0) // updates  # step - 1: its epoch's validation may be due
        seen = []
        for epoch in range(first_epoch, 0 if finished else math.ceil(total / updates)):
            done = max(state.step - epoch * updates, 0)
            batches[:] = order_epoch(args, dataset, accelerator.num_processes, epoch, done)
            state.clock = time.perf_counter()
            for batch in loader:
                if state.step >= total or batch is None:  # accelerate 1.3 makes None of an empty epoch
                    break
                with accelerator.accumulate(*trained.models.values()):
                    torch.manual_seed(derive_seed(args.seed, "dropout", *batch["seeds"]))
                    moments = batch["data"] if args.cache_latents else encode_moments(frozen.vae, batch["data"])
                    drawn = draw_latents(args, frozen.vae.config, moments, batch["seeds"], accelerator.device)
                    losses = batch_losses(args, accelerator, trained.models, frozen, batch["prompts"], drawn)
                    accelerator.backward(mean_loss(args, losses))
                    seen.append(losses.detach())
                if not accelerator.sync_gradients:
                    continue

                norm = clip_gradient(args, accelerator, trained)
                figures = read_update(args, accelerator, seen, norm)
                stop = read_signal(accelerator, state.caught)
                step_optimizer(accelerator, trained, check_finite(accelerator, state, figures))
                state.step += 1
                log_update(accelerator, trained.optimizer, figures, state)
                if stop or state.step % args.checkpointing_steps == 0:
                    save_checkpoint(args, accelerator, trained, state)
                if stop:
                    end_training(accelerator, state)
                    report_end(args, accelerator, state, stop)
                state.clock = time.perf_counter()

            if epoch % args.validation_epochs == 0 and state.step < total:
                with evaluation(trained):
                    validate(args, accelerator, trained, frozen, state)

        # The weights are saved first: whatever fails after this cannot lose them.
        with evaluation(trained):
            save_result(args, accelerator, trained, state, parts)
            paths = validate(args, accelerator, trained, frozen, state)
        stop = read_signal(accelerator, state.caught)
        end_training(accelerator, state)
        if accelerator.is_main_process and not stop:
            publish(args, parts, repository, state, paths)
        report_end(args, accelerator, state, stop)


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        print("\nSIGINT: the run ends before its first update", file=sys.stderr)
        sys.exit(130)
