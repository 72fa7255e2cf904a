#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.3", "bitsandbytes>=0.50", "datasets>=3.6", "diffusers>=0.36", "filelock", "huggingface_hub>=0.34",
#     "numpy>=2.0", "peft>=0.17.1", "pillow>=10.4", "prodigyopt>=1.1.2", "protobuf", "safetensors>=0.4.5",
#     "sentencepiece", "tensorboard", "torch>=2.6", "tqdm", "transformers>=4.56,<5.24", "wandb",
# ]
# ///
"""DreamBooth training of the whole Stable Diffusion 3 or 3.5 transformer, with the SD3 paper's rectified-flow loss.

On one GPU; `accelerate launch --multi_gpu` takes all that there are:

    accelerate launch train_dreambooth_sd3.py --mixed_precision bf16 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir dog-sd3

A run writes into output_dir: a whole pipeline (model_index.json, transformer/, vae/, ...), the model card README.md
with its images, checkpoint-N/ (resume with --resume_from_checkpoint latest), validation/ and the trackers' logs/.

Shapes in the comments: B images of a batch (instance images first, then class images), C latent channels, h and w the
latent's height and width (pixels / 8), S text tokens, D joint width, P pooled width. sigma is the noise level in
[0, 1], a step is one update of the optimizer.

The twin, train_dreambooth_lora_sd3.py, trains LoRA adapters; `diff` of the two files shows what LoRA is.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
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
import types
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

# ---- Arguments ------------------------------------------------------------------------------------------------------

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
WEIGHTINGS = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")


def refuse(message):
    """Ends the run with one line on stderr and exit code 2; where all processes refuse, one of a machine says so."""
    time.sleep(2 if int(os.environ.get("LOCAL_RANK", 0)) else 0)  # until the launcher has ended this one
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def or_refuse(what):
    """Refuses in one line whatever a with block raises, for damaged files and absent servers may lead to anything."""
    try:
        yield
    except Exception as error:
        refuse(f"{what} ({type(error).__name__}: {error})")


def boolean(text):
    """Value of a true/false flag; argparse's type=bool would take 'False' for true."""
    if text.lower() not in {"true", "false", "1", "0", "yes", "no"}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in {"true", "1", "yes"}


def in_range(kind, low, below=1e30):
    """A type of flag: an int or a float of at least `low` and less than `below`, or inf where that is the bound."""

    def parse(text):
        value = kind(text)  # of a word argparse says itself that it is none
        if not (low <= value < below or value == below == math.inf):
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {low} or more, less than {below}")
        return value

    parse.__name__ = kind.__name__  # argparse names it for a word
    return parse


STEPS, COUNT, AMOUNT = in_range(int, 1), in_range(int, 1, 10_001), in_range(float, 0.0)
SHARE, POSITIVE, NORM = in_range(float, 0.0, 1.0), in_range(float, 1e-30), in_range(float, 1e-30, math.inf)


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
    add("--repeats", type=COUNT, default=1, help="How often each instance image occurs in an epoch.")
    add("--instance_prompt", metavar="PROMPT", help="Such as 'a photo of sks dog'; for images without a caption.")
    add("--caption_dropout", type=SHARE, default=0.0, help="Probability of the empty prompt in place of a caption.")
    add("--max_sequence_length", type=in_range(int, 1, 513), default=77, help="T5 tokens of a prompt; CLIP has 77.")
    add("--resolution", type=in_range(int, 16), default=512, help="Side of the crop in pixels, a multiple of 16.")
    add("--use_aspect_ratio_buckets", action="store_true", help="Keep shapes: crop to the nearest of several sizes.")
    add("--aspect_ratio_buckets", metavar="H,W;H,W", help="These sizes; unset: diffusers' for --resolution.")
    add("--center_crop", action="store_true", help="Crop the middle instead of a random place.")
    add("--random_flip", action="store_true", help="Mirror half of the images.")
    add("--alpha_mask", action="store_true", help="Weigh the loss by the images' alpha: skip transparent parts.")
    add("--dataloader_num_workers", type=in_range(int, 0, 1025), default=0, help="Loader processes; 0: in this one.")

    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", action="store_true", help="Train on class images too, against drift.")
    add("--class_data_dir", metavar="FOLDER", help="Folder of class images; missing ones are drawn into it.")
    add("--class_prompt", metavar="PROMPT", help="Prompt of the class images, such as 'a photo of a dog'.")
    add("--num_class_images", type=COUNT, default=100, help="How many class images there have to be.")
    add("--prior_loss_weight", type=AMOUNT, default=1.0, help="Weight of the class images' loss.")
    add("--sample_batch_size", type=COUNT, default=4, help="Batch a process when class images are generated.")
    add("--prior_generation_precision", choices=("no", "fp32", "fp16", "bf16"), help="Unset: that of the run.")


def add_method_flags(parser):
    add = parser.add_argument_group("full training").add_argument
    add("--train_text_encoder", action="store_true", help="Train the three text encoders too.")
    add("--fused_backward_pass", action="store_true", help="Update each weight within the backward pass: less memory.")
    add("--full_bf16", action="store_true", help="Train bfloat16 weights, rounded stochastically: less memory.")
    parser.set_defaults(tracker_project_name="dreambooth-sd3")


def add_training_flags(parser):
    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=COUNT, default=4, help="Instance images of a batch, on each process.")
    add("--num_train_epochs", type=STEPS, default=1, help="Epochs; --max_train_steps wins.")
    add("--max_train_steps", type=STEPS, help="Updates of the optimizer in all.")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="Batches an update.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations in the backward pass.")
    add("--cache_latents", action="store_true", help="Encode each image once, in one crop, and free the VAE.")
    add("--offload", action="store_true", help="Keep the VAE on the CPU between its uses.")
    add("--use_ema", action="store_true", help="Average the weights over the updates; validate and save the average.")
    add("--ema_decay", type=SHARE, default=0.9999, help="Decay of that average, at most (1 + n) / (10 + n) at step n.")
    add("--max_grad_norm", type=NORM, default=1.0, help="Clip the gradient to this norm over all; inf does not.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Unset: as accelerate was configured.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and later.")
    add("--seed", type=in_range(int, 0, 2**32), help="Of all draws; unset: one is drawn and kept in checkpoints.")
    add("--full_determinism", action="store_true", help="Equal runs give equal bits on a GPU too; slower.")
    add("--local_rank", type=int, default=-1, help="Given by old launchers; LOCAL_RANK in the environment counts.")

    add = parser.add_argument_group("loss").add_argument
    add("--weighting_scheme", choices=WEIGHTINGS, default="logit_normal", help="SD3 paper, 3.1; none: uniform.")
    add("--training_shift", type=POSITIVE, help="Shift of the noise levels; unset: the scheduler's, 3 in SD3.")
    add("--logit_mean", type=float, default=0.0, help="Mean of the logit-normal density.")
    add("--logit_std", type=POSITIVE, default=1.0, help="Standard deviation of the logit-normal density.")
    add("--mode_scale", type=float, default=1.29, help="Scale of the mode density.")
    add("--precondition_outputs", type=int, choices=(0, 1), default=1, help="1 compares clean latents, 0 velocities.")

    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", type=str.lower, choices=("adamw", "prodigy"), default="AdamW", help="In any case of letters.")
    add("--learning_rate", type=AMOUNT, default=1e-4, help="Learning rate after warm-up.")
    add("--text_encoder_lr", type=AMOUNT, default=5e-6, help="Text encoders' rate; prodigy takes --learning_rate.")
    add("--scale_lr", action="store_true", help="Multiply --learning_rate by processes, accumulation and batch.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="Its shape over the run.")
    add("--lr_warmup_steps", type=in_range(int, 0), default=500, help="Updates of warm-up.")
    add("--lr_num_cycles", type=COUNT, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=AMOUNT, default=1.0, help="Power of polynomial.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state, from bitsandbytes.")
    add("--adam_beta1", type=SHARE, default=0.9, help="First beta, also Prodigy's.")
    add("--adam_beta2", type=SHARE, default=0.999, help="Second beta, also Prodigy's.")
    add("--adam_weight_decay", type=AMOUNT, default=1e-4, help="Weight decay of the transformer.")
    add("--adam_weight_decay_text_encoder", type=AMOUNT, default=1e-3, help="Weight decay of the text encoders.")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="Epsilon, also Prodigy's.")
    on_by_default = {"type": boolean, "nargs": "?", "const": True, "default": True}
    add("--prodigy_beta3", type=SHARE, help="Unset: the square root of the second beta.")
    add("--prodigy_decouple", **on_by_default, help="Decoupled weight decay.")
    add("--prodigy_use_bias_correction", **on_by_default, help="Adam's bias correction.")
    add("--prodigy_safeguard_warmup", **on_by_default, help="Keep the rate out of D's denominator in warm-up.")


def add_output_flags(parser):
    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", metavar="PROMPT", help="Prompt of the images drawn along the way and at the end.")
    add("--validation_data_dir", metavar="FOLDER", help="Held-out images: their loss at fixed noise is logged.")
    add("--num_validation_images", type=COUNT, default=4, help="How many images each time.")
    add("--validation_epochs", type=STEPS, default=50, help="Draw after epoch 0 and every so many epochs.")
    add("--validation_num_inference_steps", type=COUNT, help="Denoising steps of these; unset: the pipeline's own.")
    add("--validation_guidance_scale", type=AMOUNT, help="Their guidance; unset: the pipeline's own, 0 for Turbo.")
    add("--skip_final_inference", action="store_true", help="Draw no images at the end.")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="sd3-dreambooth", metavar="FOLDER", help="Where everything is written.")
    add("--logging_dir", default="logs", help="The trackers' folder inside output_dir.")
    add("--report_to", metavar="TRACKERS", default="tensorboard", help=f"Some of {','.join(TRACKERS)}; or all, none.")
    add("--tracker_project_name", metavar="NAME", help="The trackers' project.")
    add("--tracker_run_name", metavar="NAME", help="The run's name in wandb and in logging_dir.")
    add("--checkpointing_steps", type=STEPS, default=500, help="Updates from one checkpoint to the next.")
    add("--checkpoints_total_limit", type=COUNT, help="Keep the newest so many checkpoints; unset: all.")
    add("--resume_from_checkpoint", metavar="PATH", help="A checkpoint's path or name, or latest.")
    add("--dry_run", action="store_true", help="Check all input, draw it as the model would see it, train nothing.")
    add("--push_to_hub", action="store_true", help="Upload the result when training ends.")
    add("--hub_token", help="Token for the upload; it is written nowhere.")
    add("--hub_model_id", help="Repository of the upload; unset: the name of output_dir.")
    add("--hub_private_repo", action="store_true", help="Make the repository private when it is created.")


def build_parser():
    usage = "%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt TEXT ..."
    options = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage, **options)
    parser.error = refuse  # one line, where argparse would print its usage first
    add_input_flags(parser)
    add_training_flags(parser)
    add_output_flags(parser)
    add_method_flags(parser)
    return parser


def check_input_flags(args):
    """Refuses input flags that contradict each other and folders that are not there."""
    if bool(args.dataset_name) == bool(args.instance_data_dir):
        refuse("--dataset_name, --instance_data_dir: give exactly one of the two")
    for name in ("instance_data_dir", "validation_data_dir", "class_data_dir"):
        folder = getattr(args, name)
        if folder and Path(folder).resolve() == Path(args.output_dir).resolve():
            refuse(f"--{name} is --output_dir {args.output_dir!r}: the next run would train on what this one draws")
        if folder and name != "class_data_dir" and not Path(folder).is_dir():
            refuse(f"--{name} {folder!r} is not a folder: give the folder with the images")
    for name in ("class_data_dir", "class_prompt"):
        if args.with_prior_preservation and not getattr(args, name):
            refuse(f"--with_prior_preservation needs --{name}")
        if getattr(args, name) and not (args.with_prior_preservation or vars(args).get("output_preservation_weight")):
            print(f"--{name} has no effect without --with_prior_preservation", file=sys.stderr)
    if args.resolution % 16:
        near = round(args.resolution / 16) * 16
        refuse(f"--resolution {args.resolution} is not a multiple of 16 (VAE 8, patch 2): {near} is the nearest")
    for bucket in (args.aspect_ratio_buckets or "16,16").split(";"):
        sides = re.fullmatch(r" *(\d+) *, *(\d+) *", bucket)
        if not sides or any(int(side) == 0 or int(side) % 16 for side in sides.groups()):
            refuse(f"--aspect_ratio_buckets {bucket!r} is no height,width in multiples of 16, such as 512,768;768,512")


def parse_args(argv=None):
    """Flags of a run. Errors: SystemExit with code 2 and one line for flags that are wrong or contradictory."""
    args = build_parser().parse_args(argv)
    if not args.output_dir:
        refuse("--output_dir is empty: give the folder to write to")
    check_input_flags(args)
    for name in ("logging_dir", "tracker_run_name"):
        if os.path.normpath(getattr(args, name) or "logs").startswith((".", os.sep)):
            refuse(f"--{name} {getattr(args, name)!r} leads out of --output_dir: give a name, such as logs")
    trackers = [name for name in args.report_to.replace(" ", "").split(",") if name] or [args.report_to]
    args.report_to = ",".join(trackers)
    for name in set(trackers) - {*TRACKERS, "all", "none"}:
        refuse(f"--report_to {name!r} is unknown: choose from {', '.join(TRACKERS)}, all, none")
    if args.hub_token and set(trackers) - {"tensorboard", "none"}:  # most record the command line
        refuse(f"--hub_token would be readable in {args.report_to}: leave it out and run `hf auth login` instead")
    needed = {"datasets": args.dataset_name, "prodigyopt": args.optimizer == "prodigy"}
    needed |= {"bitsandbytes": args.use_8bit_adam, **dict.fromkeys(set(trackers) - {"all", "none"}, True)}
    for package in [name for name, wanted in needed.items() if wanted]:
        if importlib.util.find_spec(package) is None:
            refuse(f"these flags need the {package} package: pip install {package}")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        refuse("DeepSpeed is not supported: choose FSDP2 in `accelerate config`, which splits a model as well")
    return args


if __name__ == "__main__":  # before the imports below, which take seconds: --help and a wrong flag answer at once
    ARGS = parse_args()
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a torchvision that nothing here needs
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # the libraries' bars: those of one process will do

import huggingface_hub
import numpy as np
import torch
from accelerate import Accelerator, utils
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, training_utils
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

log = get_logger(__name__)

# ---- Data -----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".avif"}
CAPTION_SUFFIXES = (".txt", ".caption")
ENCODED = ".encoded"  # folder in output_dir for what is encoded once, while a run lasts
KEPT_BYTES = 2**30  # of scaled images that stay in memory: decoding a photo can take longer than an update


def derive_seed(*parts):
    """One seed from the run's seed and what a draw belongs to, so that no draw depends on those made before it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def list_images(folder):
    """Image files of a folder in sorted order; hidden ones are left out."""
    paths = (path for path in sorted(Path(folder).iterdir()) if not path.name.startswith(".") and path.is_file())
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


def open_image(source, reach, number, alpha_mask=False):
    """RGB image of a path, of a file's bytes or of a dataset's {"bytes", "path"}; `number` names one without path.

    EXIF rotation applied, 16 bits scaled to 8, transparent parts on white; `alpha_mask` adds a band that says where.
    Photos are decoded no larger than covers `reach` pixels, which is faster. Errors: ValueError that names the image.
    """
    path = source if isinstance(source, str | Path) else None
    if isinstance(source, dict):
        path, source = source["path"], source["bytes"] or source["path"]
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.draft(None, (reach, reach))
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels, of a range that nobody knows: save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        alpha = 255
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if alpha_mask:
            image.putalpha(alpha)
        return image
    except Exception as error:  # PIL's readers raise whatever a damaged file leads them into
        name = repr(str(path)[:200]) if path else f"of row {number}"
        raise ValueError(f"the image {name} cannot be read ({error}): repair or remove it") from error


def scale_image(image, size):
    """An image scaled until it just covers `size`, (height, width): pixels (H, W, bands) from 0 to 255."""
    height, width = size
    if image.height * width < image.width * height:
        width = image.width * height // image.height
    else:
        height = image.height * width // image.width
    parts = [image.convert("RGB"), *image.split()[3:]]  # apart, or colours would be multiplied by the alpha first
    return np.dstack([part.resize((width, height), Image.Resampling.BILINEAR) for part in parts])  # with antialiasing


def crop_image(pixels, size, generator, center, flip):
    """A crop of `size` of pixels (H, W, bands): (bands, height, width) in [-1, 1], its place and mirror drawn."""
    (tall, wide, _), (height, width) = pixels.shape, size
    down, right, mirror = torch.rand(3, generator=generator).tolist()
    top = round((tall - height) / 2) if center else int(down * (tall - height + 1))
    left = round((wide - width) / 2) if center else int(right * (wide - width + 1))
    pixels = pixels[top : top + height, left : left + width]
    if flip and mirror < 0.5:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


def list_buckets(args):
    """The sizes (height, width) that images are cropped to; the transformer has to have positions for them."""
    buckets = [(args.resolution, args.resolution)]
    if args.aspect_ratio_buckets:
        buckets = training_utils.parse_buckets_string(args.aspect_ratio_buckets)
    elif args.use_aspect_ratio_buckets:
        buckets = training_utils.generate_aspect_ratio_buckets(args.resolution, divisibility=16)
    config = read_transformer_config(args)
    limit = config["pos_embed_max_size"] * config["patch_size"] * 8
    for height, width in buckets:
        if max(height, width) > limit:
            refuse(f"{height}x{width} pixels are too many: the transformer has positions for {limit} a side")
    return buckets


class DreamBoothDataset:
    """Instance images with their prompts, each together with a class image where there are any.

    An item's place is (epoch, index, copy): all that is drawn for it comes from these and the run's seed. A class
    image is cropped to its partner's size. `moments`, once filled by `cache_moments`, stands in for the pixels.
    """

    def __init__(self, args, flag, images, captions):
        self.args, self.buckets, self.images, self.prompts = args, list_buckets(args), {}, {}
        self.moments, self.scaled, self.kept_bytes = None, {}, 0
        prompts = [" ".join(str(caption or "").split()) or args.instance_prompt for caption in captions]
        if None in prompts:
            refuse(f"{flag}: {prompts.count(None)} of {len(prompts)} images have no caption: give --instance_prompt")
        self.sizes, checksums = self.add_images("instance", flag, images, prompts)
        self.digest = derive_seed(prompts, checksums)
        bare, sizes = prompts.count(args.instance_prompt), dict(Counter(self.sizes))
        log.info(f"{flag}: {len(images)} images, {bare} with --instance_prompt; (height, width): {sizes}")

    def add_images(self, kind, flag, images, prompts):
        """Adds the images of a kind and reads each once. Returns the sizes of their crops, and checksums."""
        self.images[kind], self.prompts[kind] = images, prompts
        if not len(images):
            refuse(f"{flag}: there is no image")

        def inspect(number):
            pixels, size = self.load(kind, number)
            return size, hashlib.sha256(pixels).hexdigest()

        with or_refuse(flag), ThreadPoolExecutor() as pool:
            return zip(*pool.map(inspect, range(len(images))), strict=True)

    def load(self, kind, number, size=None):
        """Scaled pixels (H, W, bands) of an image, which stay in memory while there is room, and its crop's size."""
        image = open_image(self.images[kind][number], max(map(max, self.buckets)), number, self.args.alpha_mask)
        size = size or self.buckets[training_utils.find_nearest_bucket(image.height, image.width, self.buckets)]
        pixels = scale_image(image, size)
        if self.kept_bytes + pixels.nbytes <= KEPT_BYTES:
            self.kept_bytes += pixels.nbytes
            self.scaled[kind, number, size] = pixels
        return pixels, size

    def __len__(self):
        return max(len(self.images["instance"]) * self.args.repeats, len(self.images.get("class", ())))

    def __getitem__(self, place):
        """The examples of an item: instance, then class."""
        epoch, index, copy = place
        examples = []
        for kind, images in self.images.items():
            number, seed = index % len(images), derive_seed(self.args.seed, kind, epoch, index + copy * len(self))
            prompt = self.prompts[kind][number]
            if kind == "instance" and random.Random(derive_seed(seed, "caption")).random() < self.args.caption_dropout:
                prompt = ""
            key = kind, number, self.size(index)
            data = self.pixels(*key, seed) if self.moments is None else self.moments[key]["moments"]
            examples.append({"data": data, "prompt": prompt, "seed": seed})
        return examples

    def size(self, index):
        """Height and width in pixels of the item at an index."""
        return self.sizes[index % len(self.sizes)]

    def pixels(self, kind, number, size, seed):
        """Pixels (bands, height, width) in [-1, 1] of one image, in the crop that `seed` draws."""
        scaled = self.scaled.get((kind, number, size))
        if scaled is None:
            scaled, _ = self.load(kind, number, size)
        generator = torch.Generator().manual_seed(derive_seed(seed, "crop"))
        return crop_image(scaled, size, generator, self.args.center_crop, self.args.random_flip)


class EpochSampler:
    """Batches of places (epoch, index, copy): every index once an epoch, in an order drawn from seed and epoch.

    Batches hold images of one size and are full, and so are updates: what lacks is filled with copies of the epoch's
    last images, drawn anew. The images of an update depend on its size alone, processes x batch x accumulation. Set
    `epoch`, and `start` to the batches that a process has done of it, before each pass.
    """

    batch_size = None  # tells accelerate that it cannot split them itself

    def __init__(self, args, dataset, processes):
        self.sizes, self.seed = [dataset.size(index) for index in range(len(dataset))], args.seed
        self.batch, self.group = args.train_batch_size, args.train_batch_size * processes
        self.update = self.group * args.gradient_accumulation_steps
        self.epoch = self.start = 0

    def __len__(self):
        return len(self.order()) // self.batch

    def order(self):
        """The epoch's (index, copy): full updates of one size each, then what is left of each size."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        items, filling = [], {}
        for index in torch.randperm(len(self.sizes), generator=generator).tolist():
            filling.setdefault(self.sizes[index], []).append((index, 0))
            if len(filling[self.sizes[index]]) == self.update:
                items += filling.pop(self.sizes[index])
        for number, own in enumerate(filling.values(), start=1):
            items += own
            missing = -len(items) % (self.update if number == len(filling) else self.group)
            items += [(own[n % len(own)][0], 1 + n // len(own)) for n in range(missing)]
        return items

    def __iter__(self):
        places = [(self.epoch, index, copy) for index, copy in self.order()][self.start * self.group :]
        yield from (places[first : first + self.batch] for first in range(0, len(places), self.batch))


def collate(items):
    """A batch of B examples, instance images first, then class images."""
    examples = [example for kind in zip(*items, strict=True) for example in kind]
    data = torch.stack([example["data"] for example in examples])  # (B, bands, H, W), or moments (B, 2C, h, w)
    prompts, seeds = ([example[name] for example in examples] for name in ("prompt", "seed"))
    return {"data": data, "prompts": prompts, "seeds": seeds}


class TensorFolder:
    """Dicts of tensors by key, a safetensors file each, which all processes find: 10,000 captions are up to 50 GB."""

    def __init__(self, args, name):
        self.folder = Path(args.output_dir, ENCODED, name)

    def __setitem__(self, key, tensors):
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, self.folder / f"{derive_seed(key)}.safetensors")

    def __getitem__(self, key):
        return load_file(self.folder / f"{derive_seed(key)}.safetensors")

    def fill(self, accelerator, keys, make, title):
        """Stores what `make` gives for each key, the processes sharing the work."""
        mine = keys[accelerator.process_index :: accelerator.num_processes]
        for key in tqdm(mine, desc=title, disable=not accelerator.is_main_process):
            self[key] = make(key)
        accelerator.wait_for_everyone()


def read_folder(args, flag, folder):
    """Images of a folder and a caption or None for each, from the files beside them or by the datasets library."""
    if any(Path(folder).glob("metadata.*")):
        return read_dataset(args, flag, folder, "image", args.caption_column or "text")
    images, captions = list_images(folder), []
    if not images:
        deeper = next((path.parent for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES), None)
        where = f"it has none itself, but {deeper} has" if deeper else "it has none"
        refuse(f"{flag} {folder!r}: {where}: give a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    for image in images:
        beside = next((path for path in map(image.with_suffix, CAPTION_SUFFIXES) if path.is_file()), None)
        with or_refuse(f"{beside} is not UTF-8 text: save it as such"):
            captions.append(beside.read_text(encoding="utf-8-sig") if beside else None)
    used = {path.with_suffix(suffix).name for path in images for suffix in (path.suffix, *CAPTION_SUFFIXES)}
    others = sorted({path.name for path in Path(folder).iterdir()} - used)
    if others:
        log.warning(f"{flag} {folder}: passed over {', '.join(others[:10])}{' ...' if len(others) > 10 else ''}")
    return images, captions


def read_dataset(args, flag, name, image_column, caption_column):
    """Images of a dataset, a path or a Hub id, decoded when they are used, and a caption or None for each."""
    path, options = Path(name), {"split": args.dataset_split, "cache_dir": args.cache_dir}
    with or_refuse(f"{flag} {name!r} cannot be read"):
        import datasets

        if Path(path, "state.json").is_file() or Path(path, "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            splits = saved if isinstance(saved, dict) else {str(saved.split): saved, "train": saved}
            if args.dataset_split not in splits:
                raise ValueError(f"--dataset_split {args.dataset_split!r} is not in it, but {', '.join(splits)}")
            rows = splits[args.dataset_split]
        elif any(path.glob("metadata.*")):
            rows = datasets.load_dataset("imagefolder", data_dir=name, **options)
        elif path.is_file():
            form = {".jsonl": "json"}.get(path.suffix, path.suffix[1:])
            rows = datasets.load_dataset(form, data_files=name, **options)
        else:
            rows = datasets.load_dataset(name, args.dataset_config_name, **options)
    for option, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column and column not in rows.column_names:
            refuse(f"{option} {column!r} is not in {flag}: its columns are {', '.join(rows.column_names)}")
    captions = rows[caption_column][:] if caption_column else [None] * len(rows)
    if isinstance(rows.features[image_column], datasets.Image):
        return rows.cast_column(image_column, datasets.Image(decode=False))[image_column], captions
    beside = path.parent if path.is_file() else Path()  # paths are relative to the file they stand in
    images = [row if not isinstance(row, str) or "://" in row else str(beside / row) for row in rows[image_column]]
    return images, captions


def read_instances(args):
    """The images to train on, with their prompts."""
    if args.dataset_name:
        flag, columns = "--dataset_name", (args.image_column, args.caption_column)
        return DreamBoothDataset(args, flag, *read_dataset(args, flag, args.dataset_name, *columns))
    flag = "--instance_data_dir"
    return DreamBoothDataset(args, flag, *read_folder(args, flag, args.instance_data_dir))


def read_held_out(args):
    """The images of --validation_data_dir, cropped in the middle; None without the flag."""
    if not args.validation_data_dir:
        return None
    changed = {"center_crop": True, "random_flip": False, "repeats": 1, "seed": 0, "caption_dropout": 0}
    changed["instance_prompt"] = args.instance_prompt or ""
    plain, flag = argparse.Namespace(**vars(args) | changed), "--validation_data_dir"
    return DreamBoothDataset(plain, flag, *read_folder(args, flag, args.validation_data_dir))


# ---- Models ---------------------------------------------------------------------------------------------------------

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # CLIP-L, OpenCLIP bigG, T5: the pipeline's order
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_pipeline(args):
    """Parts of the base pipeline, {name: (library, class)}, from model_index.json. Anything but an SD3 is refused."""
    model, hub = args.pretrained_model_name_or_path, {"cache_dir": args.cache_dir, "revision": args.revision}
    try:
        index = dict(StableDiffusion3Pipeline.load_config(model, **hub))
    except (OSError, TypeError, ValueError) as error:
        cause = str(error.__context__ or error).strip().splitlines()[0]  # diffusers says the same of all causes
        remedy = "give a diffusers folder or a Hub id; for a gated model accept its licence and run `hf auth login`"
        refuse(f"--pretrained_model_name_or_path {model!r}: no model_index.json can be read ({cause}): {remedy}")
    left_out = {"text_encoder_3", "tokenizer_3"} if args.no_t5 else set()
    parts = {name: tuple(e) for name, e in index.items() if isinstance(e, list) and e[0] and name not in left_out}
    needed = dict.fromkeys(("vae", *TEXT_ENCODERS[:2], *TOKENIZERS[:2]), "")
    needed |= {"transformer": "SD3Transformer2DModel", "scheduler": "FlowMatch"}
    for name in needed | parts:
        library, class_name = parts.get(name, ("nothing", ""))
        if library not in ("diffusers", "transformers") or needed.get(name, "") not in class_name:
            found = f"its {name} is {library} {class_name}"
            refuse(f"--pretrained_model_name_or_path {model!r} is no SD3 pipeline: {found}")
    return parts


def load_part(args, parts, name, checkpoint=None, **kwargs):
    """One part of the base pipeline or of a checkpoint, refused if it is damaged; a model is frozen."""
    (library, class_name), model = parts[name], str(checkpoint or args.pretrained_model_name_or_path)
    variant = None if checkpoint else args.variant
    with or_refuse(f"{name} of {model!r} cannot be loaded{f' in the variant {variant!r}' if variant else ''}"):
        part_class = getattr(importlib.import_module(library), class_name)
        if not hasattr(part_class, "parameters"):  # a tokenizer or the scheduler
            part = part_class.from_pretrained(model, **where(args, name))
            if name in TOKENIZERS and part.unk_token_id in part("photo", add_special_tokens=False).input_ids:
                raise ValueError("it knows no word: a file of it is missing")
            return part
        kwargs |= {"variant": variant, "output_loading_info": True, **where(args, name)}
        meta = name == "transformer" and importlib.metadata.version("diffusers") >= "0.40"  # spares seconds and a copy
        with torch.device("meta") if meta and not kwargs.get("quantization_config") else contextlib.nullcontext():
            part, found = part_class.from_pretrained(model, **kwargs)
        odd = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
        if odd and getattr(part, "hf_quantizer", None) is None:
            raise ValueError(f"its weights do not fit its config: {odd[0]}, {len(odd)} in all")
        if name == "vae" and part.config.shift_factor is None:
            raise ValueError("it has no shift_factor, so that it is no SD3's")
    return part.requires_grad_(False).eval()


def where(args, name):
    return {"subfolder": name, "revision": args.revision, "cache_dir": args.cache_dir}


def on_device(accelerator, dtype):
    """Has from_pretrained put weights on the device as they are read, without a copy in the host's memory."""
    cpu = accelerator.device.type == "cpu"  # of several processes "cpu:0", which transformers 4 takes for a GPU
    return {"torch_dtype": dtype, "device_map": {"": "cpu" if cpu else str(accelerator.device)}}


def frozen_dtype(accelerator):
    """Precision of what is not trained."""
    return DTYPES.get(accelerator.mixed_precision, torch.float32)


def read_transformer_config(args):
    return SD3Transformer2DModel.load_config(args.pretrained_model_name_or_path, **where(args, "transformer"))


def load_scheduler(args, parts, accelerator):
    """The base's scheduler, with the tables of timesteps and sigmas for training, (1000,) each, on the device."""
    scheduler = load_part(args, parts, "scheduler")
    tables = type(scheduler).from_config(scheduler.config, shift=args.training_shift or scheduler.config.shift)
    scheduler.timesteps = tables.timesteps.to(accelerator.device)
    scheduler.sigmas = tables.sigmas.to(accelerator.device)
    return scheduler


def sketch_part(args, parts, name):
    """A model of the pipeline by its config alone, frozen, on the meta device: sizes without values."""
    (library, class_name), model = parts[name], args.pretrained_model_name_or_path
    with or_refuse(f"{name} of {model!r} has a config that cannot be used"), torch.device("meta"):
        part_class = getattr(importlib.import_module(library), class_name)
        if library == "diffusers":
            part = part_class.from_config(part_class.load_config(model, **where(args, name)))
        else:
            part = part_class(part_class.config_class.from_pretrained(model, **where(args, name)))
    return part.requires_grad_(False)


def choose_targets(args, parts, accelerator):
    """Models that are trained, by their name in the pipeline, each of them whole; refuses flags that exclude it."""
    names = [name for name in TEXT_ENCODERS if args.train_text_encoder and name in parts]
    if "text_encoder_3" in names and accelerator.mixed_precision == "fp16":
        refuse("--train_text_encoder: T5 overflows in fp16: take --mixed_precision bf16 or no, or --no_t5")
    if args.full_bf16 and accelerator.mixed_precision != "bf16":
        refuse(f"--full_bf16 needs --mixed_precision bf16, not {accelerator.mixed_precision}")
    if (args.full_bf16 or args.fused_backward_pass) and args.optimizer == "prodigy":
        refuse("--full_bf16, --fused_backward_pass update weight by weight, prodigy all at once: take adamw")
    if args.fused_backward_pass:
        if accelerator.scaler or args.gradient_accumulation_steps * accelerator.num_processes > 1:
            refuse("--fused_backward_pass keeps no gradient: it needs accumulation 1, one process, and no fp16")
        if math.isfinite(args.max_grad_norm):
            log.warning("--fused_backward_pass: --max_grad_norm has no effect, for no gradient is kept")
    sketch_part(args, parts, "transformer")  # a config that cannot be used is refused now
    return dict.fromkeys(["transformer", *names])


def make_trainable(args, model, layers):
    """Has every parameter of a model trained."""
    model.requires_grad_(True)


def load_trained(args, parts, accelerator, targets, checkpoint):
    """The models of `targets`, every parameter of which is trained: the base's or a checkpoint's."""
    if accelerator.is_main_process:  # what is not trained is saved now: later there is less memory, or a full disk
        for name in parts.keys() - set(targets):
            load_part(args, parts, name).save_pretrained(Path(args.output_dir, name))
    trained, dtype = {}, torch.bfloat16 if args.full_bf16 else torch.float32
    for name, layers in targets.items():
        model = load_part(args, parts, name, checkpoint, **on_device(accelerator, dtype))
        make_trainable(args, model, layers)
        trained[name] = model.train()
    return trained


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---- Text -----------------------------------------------------------------------------------------------------------


class PromptTable:
    """Embeds of prompts: looked up for frozen encoders, gone once the table is full; `trained` ones are called."""

    def __init__(self, args, parts, accelerator, dtype, targets=()):
        self.args, self.accelerator, self.dtype, self.trained = args, accelerator, dtype, {}
        self.width = read_transformer_config(args)["joint_attention_dim"]
        present = [(e, t) for e, t in zip(TEXT_ENCODERS, TOKENIZERS, strict=True) if e in parts]
        self.tokenizers = {encoder: load_part(args, parts, tokenizer) for encoder, tokenizer in present}
        if "text_encoder_3" in self.tokenizers:
            self.tokenizers["text_encoder_3"].model_max_length = args.max_sequence_length
        tables = self.tables = {e: TensorFolder(args, f"{e} {dtype}") for e in self.tokenizers if e not in targets}
        send = functools.partial(utils.send_to_device, device=accelerator.device)
        # What was read last stays on the device. The cache knows `tables`, not self, so that it goes with this table.
        self.look_up = functools.lru_cache(64)(lambda name, prompt: send(tables[name][prompt]))

    def fill(self, parts, prompts):
        """Encodes each prompt once with each frozen encoder, the processes sharing the work, one encoder at a time."""
        for name, table in self.tables.items():
            encoder = load_part(self.args, parts, name, **on_device(self.accelerator, self.dtype))
            with torch.no_grad():
                encode = functools.partial(self.encode, encoder=encoder, name=name)
                table.fill(self.accelerator, prompts, encode, f"Encoding with {name}")
            del encoder, encode
            training_utils.free_memory()

    def report_cut(self, prompts):
        """Names the prompts that CLIP or T5 reads only in part, ten at most, with the words that are lost."""
        cut = {}
        for name in sorted(self.tokenizers.keys() & {"text_encoder", "text_encoder_3"}):
            tokenizer, reader = self.tokenizers[name], "T5" if name == "text_encoder_3" else "CLIP"
            for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
                if lost := ids[tokenizer.model_max_length - 1 : -1]:
                    cut.setdefault(prompt, []).append(f"{reader} loses {tokenizer.decode(lost)!r}")
        for prompt in list(cut)[:10]:
            log.warning(f"the prompt {prompt[:60]!r} is too long: {', '.join(cut[prompt])}")
        log.info(f"{len(prompts)} different prompts, {len(cut)} of them cut")

    def encode(self, prompts, encoder, name):
        """One encoder's part of the text: states (B, tokens, width) and, of a CLIP, the pooled output (B, width)."""
        ids = self.tokenizers[name](prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = encoder(ids.to(self.accelerator.device), output_hidden_states=True)
        if name == "text_encoder_3":
            return {"states": output[0]}
        return {"states": output.hidden_states[-2], "pooled": output.text_embeds}

    def __call__(self, prompts):
        """Text as the transformer takes it: embeds (B, S, D) and pooled embeds (B, P) of a batch's prompts.

        The CLIPs' states side by side, zero-padded to the joint width D, then T5's states along the token axis; the
        pooled outputs side by side. As in StableDiffusion3Pipeline.encode_prompt. Without T5 its part is zeros.
        """
        encoded = {}
        for name in self.tokenizers:
            if name in self.trained:
                encoded[name] = self.encode(prompts, self.trained[name], name)
            else:
                found = [self.look_up(name, prompt) for prompt in prompts]
                encoded[name] = {part: torch.cat([f[part] for f in found]) for part in found[0]}
        clip_l, clip_g = encoded["text_encoder"], encoded["text_encoder_2"]
        clips = torch.cat([clip_l["states"], clip_g["states"]], dim=-1)
        clips = torch.nn.functional.pad(clips, (0, self.width - clips.shape[-1]))
        zeros = {"states": clips.new_zeros(len(prompts), self.args.max_sequence_length, self.width)}
        t5 = encoded.get("text_encoder_3", zeros)["states"].to(clips.dtype)
        return torch.cat([clips, t5], dim=-2), torch.cat([clip_l["pooled"], clip_g["pooled"]], dim=-1)


# ---- Flow matching --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_loan(vae, device):
    """Has the VAE on the device in a with block; its weights stay on the CPU as well, so none is copied back."""
    waiting = [(parameter, parameter.data) for parameter in vae.parameters()]
    vae.to(device)
    try:
        yield
    finally:
        for parameter, weight in waiting:
            parameter.data = weight


def encode_moments(vae, pixels):
    """Posterior of pixels (B, 3 or 4, H, W): mean, deviation and a fourth band as mask, (B, 2C or 2C + 1, h, w)."""
    with torch.no_grad(), on_loan(vae, pixels.device):
        posterior = vae.encode(pixels[:, :3]).latent_dist
    moments = [posterior.mean, posterior.std]
    if pixels.shape[1] > 3:
        mask = (pixels[:, 3:] + 1) / 2
        moments.append(torch.nn.functional.interpolate(mask, posterior.mean.shape[2:], mode="area"))
    return torch.cat(moments, dim=1)


def cache_moments(dataset, vae, accelerator, name):
    """Encodes every image of the dataset once, in one crop each."""

    def encode(key):
        pixels = dataset.pixels(*key, derive_seed(dataset.args.seed, "cache", *key))
        return {"moments": encode_moments(vae, pixels[None].to(accelerator.device))[0]}

    places = [(kind, images, index) for kind, images in dataset.images.items() for index in range(len(dataset))]
    keys = dict.fromkeys((kind, index % len(images), dataset.size(index)) for kind, images, index in places)
    moments = TensorFolder(dataset.args, name)
    moments.fill(accelerator, list(keys), encode, "Caching latents")
    dataset.moments, dataset.scaled = moments, {}


def draw_latents(args, vae_config, moments, seeds, device):
    """Latents and noise (B, C, h, w), densities u (B,) and mask (B, 1, h, w) or None, each image's from its own seed.

    A latent is a sample of the posterior, shifted and scaled by the VAE's config (SD3 shifts as well as scales); u in
    [0, 1] is of the density of --weighting_scheme (SD3 paper, section 3.1). `device` is where they are drawn.
    """
    mean, deviation, *mask = moments.float().split(vae_config.latent_channels, dim=1)
    density = {name: getattr(args, name) for name in ("logit_mean", "logit_std", "mode_scale")}
    density |= {"batch_size": 1, "device": device, "weighting_scheme": args.weighting_scheme}
    normal, u = [], []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(seed)
        normal.append(torch.randn((2, *mean.shape[1:]), generator=generator, device=device))
        u.append(training_utils.compute_density_for_timestep_sampling(generator=generator, **density))
    sample, noise = torch.stack(normal, dim=1).to(moments.device)
    latents = (mean + deviation * sample - vae_config.shift_factor) * vae_config.scaling_factor
    return latents, noise, torch.cat(u).to(moments.device), mask[0] if mask else None


def flow_losses(args, transformer, scheduler, drawn, text, target=None):
    """Rectified-flow loss of each image, (B,) in float32, and the prediction (SD3 paper, sections 2 and 3.1).

    `drawn` is what draw_latents gives, `text` embeds (B, S, D) and pooled embeds (B, P). The scheduler's tables of
    timesteps and sigmas run from noisy to clean; the shift (section 5.3.2) is already in them. `target` is another
    prediction, (B, C, h, w); unset: the data.
    """
    (latents, noise, u, mask), (embeds, pooled) = drawn, text
    index = (u * len(scheduler.timesteps)).long().clamp(0, len(scheduler.timesteps) - 1)  # mode reaches u = 1
    sigma = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    rest = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "return_dict": False}
    # Under autocast, which is half precision inside and float32 in and out.
    velocity = transformer(hidden_states=noisy, timestep=scheduler.timesteps[index], **rest)[0].float()
    prediction, truth = velocity, noise - latents
    if args.precondition_outputs:
        prediction, truth = noisy - sigma * velocity, latents
    error = prediction - (truth if target is None else target)
    weight = training_utils.compute_loss_weighting_for_sd3(args.weighting_scheme, sigma)
    if mask is not None:  # the mean over what it leaves
        weight = weight * mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    return (weight * error**2).flatten(1).mean(dim=1), prediction


def batch_losses(args, transformer, scheduler, embed, prompts, drawn):
    """Loss of each image, (B,); for --fused_backward_pass whether it is finite, for after that the weights differ."""
    losses, _ = flow_losses(args, transformer, scheduler, drawn, embed(prompts))
    if args.fused_backward_pass:
        transformer.loss_is_finite = bool(losses.isfinite().all())
    return losses


def mean_loss(args, losses):
    """The loss that is minimised: the instance images' mean, and the class images' by --prior_loss_weight."""
    if not args.with_prior_preservation:
        return losses.mean()
    instance, prior = losses.chunk(2)
    return instance.mean() + args.prior_loss_weight * prior.mean()


# ---- Optimizer ------------------------------------------------------------------------------------------------------


def update_singly(args, optimizer, trained):
    """With --fused_backward_pass or --full_bf16, has an optimizer update one parameter at a time.

    A bfloat16 one is widened to float32 for its update, and rounded back up or down with the probability that keeps
    its mean, for to the nearest it would lose small updates.
    """
    if not (args.fused_backward_pass or args.full_bf16):
        return optimizer
    parameters, step = [p for group in optimizer.param_groups for p in group["params"]], optimizer.step

    def update(parameter, gradient=None):
        gradient, narrow = parameter.grad if gradient is None else gradient, parameter.data
        if args.full_bf16:
            parameter.grad, parameter.data, gradient = None, narrow.float(), gradient.float()
        parameter.grad = gradient
        if not args.fused_backward_pass or trained["transformer"].loss_is_finite:
            step()
        parameter.grad = None
        if args.full_bf16:
            bits = parameter.data.view(torch.int32)
            bits += torch.randint_like(bits, 2**16)
            narrow.copy_(bits.bitwise_and_(-(2**16)).view(torch.float32))
            parameter.data = narrow

    def update_all(self, closure=None):
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        self.zero_grad(set_to_none=True)
        for parameter, gradient in gradients:
            update(parameter, gradient)

    def load(self, saved):  # as it is: torch would copy all of it, in the parameters' precision
        for group, old in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in old.items() if name != "params"})
        for number, state in saved["state"].items():
            state |= state.pop("__bnb_optimizer_quant_state__", {})  # bitsandbytes wraps what is not of one shape
            self.state[parameters[number]] = utils.send_to_device(state, parameters[number].device)

    optimizer.step = types.MethodType(update_all, optimizer)
    optimizer.load_state_dict = types.MethodType(load, optimizer)
    if args.fused_backward_pass:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(update)
    return optimizer


def make_optimizer(args, accelerator, trained):
    """AdamW, its 8-bit form or Prodigy, with a parameter group a model."""
    rate = args.learning_rate
    if args.scale_lr:
        rate *= accelerator.num_processes * args.gradient_accumulation_steps * args.train_batch_size
    groups = []
    for name, model in trained.items():
        text = name in TEXT_ENCODERS
        decay = args.adam_weight_decay_text_encoder if text else args.adam_weight_decay
        own_rate = args.text_encoder_lr if text and args.optimizer == "adamw" else rate
        groups.append({"params": trained_parameters(model), "lr": own_rate, "weight_decay": decay, "name": name})
    shared = {"lr": rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        own = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
        return Prodigy(groups, **shared, **{name: getattr(args, f"prodigy_{name}") for name in own})
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return update_singly(args, AdamW8bit(groups, **shared), trained)
    # The fused kernel would skip an overflow of fp16 by itself, where nobody sees that the update was none.
    fused = accelerator.scaler is None and accelerator.device.type in {"cpu", "cuda"}
    return update_singly(args, torch.optim.AdamW(groups, **shared, fused=fused), trained)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

FORMAT = 1  # of a checkpoint; raised when a script of before could no longer read it
MANIFEST, AVERAGE = "dreambooth.json", "ema.safetensors"
MUST_MATCH = (
    "method pretrained_model_name_or_path revision variant train_text_encoder optimizer use_8bit_adam use_ema"
    " full_bf16 rank lora_alpha use_rslora use_dora lora_layers lora_blocks bnb_quantization_config_path"
).split()
MAY_DIFFER = "local_rank cache_dir dataloader_num_workers max_train_steps num_train_epochs"  # and output flags
SHARES = ("processes", "train_batch_size", "gradient_accumulation_steps")  # their product is the size of an update


def save_weights(args, accelerator, trained, folder, final=False):
    """Writes each trained model into a folder of its name; `final` adds the index of a whole pipeline."""
    for name, model in trained.items():
        state = accelerator.get_state_dict(model)  # on each process, for each may have a part of it
        state = {key.replace("_orig_mod.", ""): weight for key, weight in state.items()}
        if not accelerator.is_main_process:
            continue
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
        if name == "transformer":  # diffusers saves what a model holds, transformers what it is handed
            with torch.device("meta"):
                model = type(model).from_config(model.config)
            model.load_state_dict(state, assign=True)
            model.save_pretrained(Path(folder, name))
        else:
            model.save_pretrained(Path(folder, name), state_dict=state)
    if final and accelerator.is_main_process:
        parts = read_pipeline(args)
        names = ("transformer", "vae", "scheduler", *TEXT_ENCODERS, *TOKENIZERS)
        index = {"_class_name": "StableDiffusion3Pipeline"} | {name: parts.get(name, (None, None)) for name in names}
        Path(folder, "model_index.json").write_text(json.dumps(index, indent=2))
    accelerator.wait_for_everyone()


def describe_run(args, accelerator, dataset):
    """The run's flags less the secret, and what else trackers keep and a run that resumes compares."""
    facts = {name: value for name, value in vars(args).items() if name != "hub_token"}
    facts["method"] = build_parser().get_default("tracker_project_name")
    if Path(args.pretrained_model_name_or_path).is_dir():
        facts["pretrained_model_name_or_path"] = str(Path(args.pretrained_model_name_or_path).resolve())
    return {**facts, "processes": accelerator.num_processes, "images": dataset.digest}


def save_checkpoint(args, accelerator, trained, average, run, step):
    """Writes checkpoint-{step}, which appears under that name only once it is whole, and then removes the oldest."""
    folder = Path(args.output_dir, f"checkpoint-{step}")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        accelerator.save_state(partial)
        save_weights(args, accelerator, trained, partial)
        if accelerator.is_main_process:
            complete_checkpoint(args, run, average, step, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # it may be what has filled the disk
        raise
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for number, path in list_checkpoints(args.output_dir).items():
            if number > step:  # the run has gone on from one before it
                log.warning(f"{path} was of an earlier course: it is now {path.rename(f'{path}.{time.time():.0f}')}")
        for old in list(list_checkpoints(args.output_dir).values())[args.checkpoints_total_limit or sys.maxsize :]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    log.info(f"Saved {folder}")


def complete_checkpoint(args, run, average, step, folder):
    """Adds the averaged weights and the manifest to what accelerate has written, and has it all reach the disk."""
    for path in folder.glob("random_states_*.pkl"):  # no draw depends on them, and to read a pickle can run code
        path.unlink()
    if average:
        state = {str(number): weight.contiguous() for number, weight in enumerate(average.shadow_params)}
        save_file(state | {"step": torch.tensor(average.optimization_step)}, folder / AVERAGE)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    manifest = {"format": FORMAT, "step": step, "seed": args.seed, "run": run, "files": sizes}
    Path(folder, MANIFEST).write_text(json.dumps(manifest, indent=2))
    for name in (*sizes, MANIFEST):
        with Path(folder, name).open("rb+") as file:
            os.fsync(file.fileno())  # else a machine that dies now could keep the name and lose the contents


def list_checkpoints(output_dir):
    """Folders named checkpoint-N by their number, the newest first; other names are left alone."""
    paths = {int(path.name[11:]): path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()}
    return dict(sorted(paths.items(), reverse=True))


def read_manifest(folder):
    """What a checkpoint holds. Errors: ValueError that says what is wrong with it."""
    try:
        manifest = json.loads(Path(folder, MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            refuse(f"{folder}: its format is {manifest.get('format')}, not {FORMAT}: use the script that wrote it")
        for name, size in manifest["files"].items():
            if Path(folder, name).stat().st_size != size:
                raise ValueError(f"{name} has {Path(folder, name).stat().st_size} bytes, not {size}")
        manifest["step"], manifest["seed"], manifest["run"]["processes"]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is no checkpoint to resume from: {error}") from error
    return manifest


def find_checkpoint(args):
    """Folder and manifest of --resume_from_checkpoint, or (None, {}) where training starts anew."""
    wanted, present = args.resume_from_checkpoint, list(list_checkpoints(args.output_dir).values())
    if present and not wanted and not args.dry_run:
        found = f"--output_dir {args.output_dir!r} has {present[0].name} of an earlier run"
        refuse(f"{found}: add --resume_from_checkpoint latest, give another folder, or take the checkpoints away")
    if wanted and wanted != "latest":
        present = [path for path in (Path(wanted), Path(args.output_dir, wanted)) if path.is_dir()][:1]
    for folder in present if wanted else ():
        try:
            return folder, read_manifest(folder)
        except ValueError as error:
            log.warning(f"passed over: {error}")
    if wanted == "latest":
        log.warning(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}, training starts anew")
    elif wanted:
        refuse(f"--resume_from_checkpoint {wanted!r}: no whole checkpoint, neither here nor in {args.output_dir!r}")
    return None, {}


def compare_runs(accelerator, checkpoint, then, run):
    """Refuses to go on from a run whose weights or optimizer were others, and says what else has changed."""
    differ = {name: old for name, old in then.items() if name in run and run[name] != old}
    fixed = [*MUST_MATCH, "processes"] if accelerator.distributed_type.value == "FSDP" else MUST_MATCH
    for name in fixed:
        if name in differ:
            refuse(f"{checkpoint} was trained with {name} {differ[name]!r}, not {run[name]!r}: give the same")
    output = argparse.ArgumentParser()
    add_output_flags(output)
    silent = [*MAY_DIFFER.split(), *vars(output.parse_args([]))]
    if math.prod(then[name] for name in SHARES) == math.prod(run[name] for name in SHARES):
        silent += SHARES  # an update has the same images, however they are shared out
    if changed := [f"{name} {run[name]!r} was {old!r}" for name, old in differ.items() if name not in silent]:
        log.warning(f"the run goes on from {checkpoint}, but not as it was: {', '.join(changed)}")


def resume(accelerator, checkpoint, average, step, total):
    """Loads what goes with the weights of a checkpoint: state of the optimizer, schedule and scaler, the average."""
    with or_refuse(f"{checkpoint} cannot be loaded: take it away and resume from an older one"):
        accelerator.load_state(checkpoint)
        if average:
            state = load_file(Path(checkpoint, AVERAGE), device=str(accelerator.device))
            average.optimization_step = state.pop("step").item()
            average.shadow_params = [state[str(number)] for number in range(len(state))]
    log.info(f"Resumed from {checkpoint}")
    if step >= total:
        log.warning(f"nothing is left to train: {checkpoint} has {step} updates, {total} are asked for")


# ---- Validation -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluation(models, parameters, average):
    """Models in eval mode, without gradients and with the averaged weights if there are any, in a with block."""
    torch.nn.ModuleList(models).eval()
    if average:
        average.store(parameters)
        average.copy_to(parameters)
    try:
        with torch.no_grad():
            yield
    finally:
        if average:
            average.restore(parameters)
        torch.nn.ModuleList(models).train()


def draw_images(args, transformer, vae, scheduler, prompt, empty, seeds, stop, **options):
    """PIL images of one prompt, one a seed, by the base pipeline with its own steps and guidance unless `options` say.

    `prompt` and `empty` are embeds (1, S, D) and pooled embeds (1, P) of the prompt and of "". The VAE decodes in
    float32. Errors: ValueError for latents that are not finite; InterruptedError once `stop()` is true.
    """
    absent = dict.fromkeys(("vae", *TEXT_ENCODERS, *TOKENIZERS))
    scheduler = type(scheduler).from_config(scheduler.config)
    pipeline = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **absent)
    pipeline.set_progress_bar_config(disable=True)

    def look(pipeline, number, timestep, tensors):
        if stop():
            raise InterruptedError("a signal has come")
        return tensors

    options |= {"height": args.resolution, "width": args.resolution, "output_type": "latent"}
    latents = pipeline(
        prompt_embeds=prompt[0].expand(len(seeds), -1, -1),
        pooled_prompt_embeds=prompt[1].expand(len(seeds), -1),
        negative_prompt_embeds=empty[0].expand(len(seeds), -1, -1),
        negative_pooled_prompt_embeds=empty[1].expand(len(seeds), -1),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        callback_on_step_end=look,
        **options,
    ).images
    if not latents.isfinite().all():
        raise ValueError("the latents are not finite: the precision overflows, or training has diverged")
    latents = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    with torch.autocast(latents.device.type, enabled=False):
        pixels = torch.cat([vae.decode(one).sample for one in latents.split(1)])  # 3 GiB each at 1024 px
    return VaeImageProcessor().postprocess(pixels, output_type="pil")


def add_class_images(args, parts, accelerator, dataset):
    """Adds the class images to the dataset; those that --class_data_dir lacks are drawn into it before."""
    present = list_images(args.class_data_dir)
    taken = {path.name.split("-")[0] for path in present}  # an interrupted run, or a user, may have left gaps
    lacking = max(args.num_class_images - len(present), 0)
    numbers = [number for number in range(args.num_class_images) if str(number) not in taken][:lacking]
    accelerator.wait_for_everyone()  # nobody counts what another has already drawn
    if numbers:
        draw_class_images(args, parts, accelerator, numbers)
        training_utils.free_memory()
    images = list_images(args.class_data_dir)[: args.num_class_images]
    dataset.add_images("class", "--class_data_dir", images, [args.class_prompt] * len(images))


def draw_class_images(args, parts, accelerator, numbers):
    """Draws the class images of these numbers with the base model, the processes sharing the work."""
    dtype = DTYPES.get(args.prior_generation_precision, frozen_dtype(accelerator))
    embed = PromptTable(args, parts, accelerator, dtype)
    embed.fill(parts, [args.class_prompt, ""])
    texts, scheduler = (embed([args.class_prompt]), embed([""])), load_part(args, parts, "scheduler")
    transformer = load_part(args, parts, "transformer", **on_device(accelerator, dtype))
    vae = load_part(args, parts, "vae", **on_device(accelerator, torch.float32))
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    firsts = range(0, len(mine), args.sample_batch_size)
    for first in tqdm(firsts, desc="Drawing class images", disable=not accelerator.is_main_process):
        batch = mine[first : first + args.sample_batch_size]
        seeds = [derive_seed(args.seed, "class drawing", number) for number in batch]
        with or_refuse(f"class images cannot be drawn in {dtype}, see --prior_generation_precision"), torch.no_grad():
            images = draw_images(args, transformer, vae, scheduler, *texts, seeds, stop=bool)
        for number, image in zip(batch, images, strict=True):
            name = f"{number}-{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png"
            save_image(image, Path(args.class_data_dir, name))
    accelerator.wait_for_everyone()


def save_image(image, path):
    """Writes a PNG that is either whole or not there."""
    partial = path.with_name(f".{path.name}")
    image.save(partial, format="PNG")
    partial.replace(path)


def measure_held_out(args, accelerator, transformer, vae_config, scheduler, embed, held_out):
    """Mean loss of the held-out images at eight noise levels each, whose noise is the same at every call and run."""
    losses, device = {}, accelerator.device
    # Padded, for under FSDP2 all processes take part in each forward pass; whatever comes twice counts once.
    with accelerator.split_between_processes(list(range(len(held_out))), apply_padding=True) as mine:
        for index, level in itertools.product(mine, range(8)):
            example, seeds = held_out[0, index, 0][0], [derive_seed("held out", index, level)]
            moments, text = example["data"][None].to(device), embed([example["prompt"]])
            latents, noise, _, mask = draw_latents(args, vae_config, moments, seeds, torch.device("cpu"))
            drawn = latents, noise, torch.full((1,), (level + 0.5) / 8, device=device), mask
            losses[index, level] = flow_losses(args, transformer, scheduler, drawn, text)[0].item()
    losses = dict(utils.gather_object(list(losses.items())))
    return math.fsum(losses.values()) / len(losses)


def validate(args, accelerator, embed, vae, scheduler, held_out, step, caught, final=False):
    """Logs the held-out loss and draws --num_validation_images, image i from seed + i, as far as flags ask for them.

    Returns the images' paths on the main process. Errors: InterruptedError after a signal, on all processes alike.
    """
    transformer, images = accelerator.unwrap_model(embed.trained["transformer"], keep_torch_compile=False), {}
    with accelerator.autocast(), on_loan(vae, accelerator.device):
        if held_out:
            loss = measure_held_out(args, accelerator, transformer, vae.config, scheduler, embed, held_out)
            accelerator.log({"validation_loss": loss}, step=step)
        if not args.validation_prompt or final and args.skip_final_inference:
            return []
        options = {name: getattr(args, f"validation_{name}") for name in ("num_inference_steps", "guidance_scale")}
        options = {name: value for name, value in options.items() if value is not None}
        texts, stop = (embed([args.validation_prompt]), embed([""])), lambda: read_signal(accelerator, caught)
        with accelerator.split_between_processes(list(range(args.num_validation_images)), apply_padding=True) as mine:
            for n in mine:
                images[n] = draw_images(args, transformer, vae, scheduler, *texts, [args.seed + n], stop, **options)[0]
    training_utils.free_memory()
    images = dict(utils.gather_object(list(images.items())))
    if not accelerator.is_main_process:
        return []
    images = [images[number] for number in sorted(images)]
    pattern = "image_{}.png" if final else f"validation/step-{step:06d}-{{}}.png"
    paths = [Path(args.output_dir, pattern.format(number)) for number in range(len(images))]
    paths[0].parent.mkdir(exist_ok=True)
    for path, image in zip(paths, images, strict=True):
        save_image(image, path)
    save_image(make_image_grid(images, 1, len(images)), Path(args.output_dir, pattern.format("grid")))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            tracker.log_images({"test" if final else "validation": pixels}, step=step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            picture = importlib.import_module(tracker.name).Image
            pictures = [picture(image, caption=args.validation_prompt) for image in images]
            tracker.log({"test" if final else "validation": pictures}, step=step)
    return paths


# ---- The result and the Hub -----------------------------------------------------------------------------------------


def describe_result(args, repository):
    """Title and tags of the model card, the lines of its program that load the pipeline, and the files to upload."""
    absent = [f"{name}=None" for name in ("text_encoder_3", "tokenizer_3") if name not in read_pipeline(args)]
    source = ", ".join([repr(repository), *absent])
    usage = f"pipeline = StableDiffusion3Pipeline.from_pretrained({source}, torch_dtype=torch.bfloat16)\n"
    folders = [f"{name}/*" for name in ("transformer", "vae", "scheduler", "text_encoder*", "tokenizer*")]
    return f"SD3 DreamBooth - {repository}", [], usage, ["model_index.json", *folders]


def public_name(args):
    """The base model's id, or the name of its folder, whose path is nobody's business."""
    base = args.pretrained_model_name_or_path
    return Path(base).resolve().name if Path(base).is_dir() else base


def name_base_model(args):
    """Family of the base model by its transformer's config and its name, with the page of its licence."""
    config, family = read_transformer_config(args), "Stable Diffusion 3 Medium"
    if config.get("dual_attention_layers"):
        family = "Stable Diffusion 3.5 Medium"
    elif config.get("qk_norm"):
        turbo = "turbo" in str(args.pretrained_model_name_or_path).lower()
        family = f"Stable Diffusion 3.5 Large{' Turbo' * turbo}"
    return family, f"https://huggingface.co/stabilityai/{family.lower().replace(' ', '-')}/blob/main/LICENSE.md"


CARD_MARK = "<!-- Written by the training script, whose next run replaces what nobody has changed: "


def describe_training(args, accelerator, step):
    """The model card's words on how the weights were trained: updates, versions and the flags that were given."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    flags, default = [], build_parser().get_default
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    for name, value in vars(args).items():
        if value != default(name) and name not in ("output_dir", "local_rank", "hub_token"):
            if isinstance(value, str) and "prompt" not in name and Path(value).exists():
                value = Path(value).resolve().name  # a card is public, the folders above are not
            flags.append(f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}")
    devices = f"{accelerator.num_processes} x {accelerator.device.type}"
    return f"Trained for {step} updates on {devices} with {versions}:\n\n```sh\n{' '.join(flags)}\n```"


def write_card(args, accelerator, repository, step, image_paths):
    """Writes the model card, README.md, with the final images as its gallery; one that a person wrote is put aside."""
    (family, licence), (title, tags, usage, _) = name_base_model(args), describe_result(args, repository)
    base, prompt = public_name(args), args.validation_prompt or args.instance_prompt or ""
    version = "sd3.5" if "3.5" in family else "sd3"
    data = {
        "license": "other",
        "license_name": "stabilityai-ai-community",
        "license_link": licence,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers-training", "diffusers", version, f"{version}-diffusers", *tags],
        "instance_prompt": args.instance_prompt,
        "widget": [{"text": prompt, "output": {"url": path.name}} for path in image_paths] or None,
    }
    if not Path(args.pretrained_model_name_or_path).is_dir():  # the Hub refuses a card whose base model is no id
        data |= {"base_model": base, "base_model_relation": "adapter" if "lora" in tags else "finetune"}
    subject = f"Their subject is called `{args.instance_prompt}`." if args.instance_prompt else ""
    card = f"""---
{huggingface_hub.ModelCardData(**data).to_yaml()}
---

# {title}

{"<Gallery />" if image_paths else ""}

DreamBooth weights for {base} ({family}). {subject}

```py
import torch
from diffusers import StableDiffusion3Pipeline

{usage}pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
size = {{"height": {args.resolution}, "width": {args.resolution}, "max_sequence_length": {args.max_sequence_length}}}
pipeline({prompt!r}, **size).images[0].save("image.png")
```

{describe_training(args, accelerator, step)}

The base model's [licence]({licence}) holds for these weights.
"""
    path = Path(args.output_dir, "README.md")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    old, _, digest = text.rpartition(CARD_MARK)
    if text and digest != f"{hashlib.sha256(old.encode()).hexdigest()} -->\n":
        log.warning(f"{path} is a person's: it is now {path.rename(path.with_suffix(f'.{time.time():.0f}.md'))}")
    path.write_text(f"{card}{CARD_MARK}{hashlib.sha256(card.encode()).hexdigest()} -->\n", encoding="utf-8")


def open_repository(args, accelerator):
    """Id of the Hub repository, which is created: better at the start than after hours. None without --push_to_hub."""
    if not args.push_to_hub or not accelerator.is_main_process:
        return None
    repository = args.hub_model_id or Path(args.output_dir).resolve().name
    remedy = "give --hub_model_id USER/NAME, a token that may write (`hf auth login`, HF_TOKEN), huggingface_hub 1.5"
    with or_refuse(f"--push_to_hub: the repository {repository!r} cannot be created or written: {remedy}"):
        options = {"private": args.hub_private_repo or None, "exist_ok": True, "token": args.hub_token}
        repository = huggingface_hub.create_repo(repository, **options).repo_id
        huggingface_hub.auth_check(repository, write=True, token=args.hub_token)  # create_repo takes any
    return repository


def publish(args, accelerator, repository, step, image_paths, failed):
    """Gives the weights the umask's mode, writes the card and uploads this run's result; either may fail by itself."""
    if not accelerator.is_main_process:
        return
    os.umask(umask := os.umask(0o077))  # read by being set; safetensors writes files for their owner alone
    for path in Path(args.output_dir).rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)
    with attempt(failed, "writing the model card"):
        write_card(args, accelerator, repository or args.output_dir, step, image_paths)
    if repository:
        patterns = ["README.md", *describe_result(args, repository)[-1], *(path.name for path in image_paths)]
        options = {"commit_message": "End of training", "allow_patterns": patterns, "token": args.hub_token}
        with attempt(failed, "the upload"):
            huggingface_hub.upload_folder(repo_id=repository, folder_path=args.output_dir, **options)


# ---- Training -------------------------------------------------------------------------------------------------------


def start_accelerator(args):
    """The accelerator with its trackers not yet started, and the folders that the run writes to."""
    for name in ("output_dir", "class_data_dir") if args.with_prior_preservation else ("output_dir",):
        folder = getattr(args, name)
        with or_refuse(f"--{name} {folder!r} cannot be written: give another folder"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    logs = Path(args.output_dir, args.logging_dir, args.tracker_run_name or "")
    AcceleratorState._reset_state()  # in a notebook the settings of the run before would stand
    with or_refuse(f"--mixed_precision {args.mixed_precision}: accelerate does not start as it is configured"):
        accelerator = Accelerator(
            # A plugin, since accelerate prefers the environment's number to a plain argument.
            gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to.split(","),
            project_config=utils.ProjectConfiguration(args.output_dir, str(logs)),
            dataloader_config=utils.DataLoaderConfiguration(even_batches=False, non_blocking=True),
            step_scheduler_with_optimizer=False,  # else it would be stepped once a process
            kwargs_handlers=[
                utils.InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # others wait while one encodes
                # The one buffer, a table of positions of 226 MB, never changes; views spare a copy of the gradients.
                utils.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        refuse("--mixed_precision fp16 needs a GPU: on a CPU take bf16 or no")
    if accelerator.distributed_type.value == "FSDP":
        if args.use_ema or args.train_text_encoder:
            refuse("--use_ema, --train_text_encoder: FSDP2 trains one model, in parts: leave them out, or use DDP")
        plugin = accelerator.state.fsdp_plugin
        if policy := plugin.mixed_precision_policy:  # it would round the timesteps: bfloat16 has 353 of the 1000
            plugin.mixed_precision_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # torch 2.13 has another name, which none knows
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    if args.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    return accelerator


def claim_folder(args, accelerator, cleanup):
    """Keeps output_dir, and what is encoded into it, for this run alone until it ends; a dry run does without."""
    if args.dry_run or not accelerator.is_main_process:
        return
    lock, encoded = FileLock(Path(args.output_dir, ".lock")), Path(args.output_dir, ENCODED)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        refuse(f"--output_dir {args.output_dir!r} belongs to a run that is going on: give another folder")
    for left in (encoded, *Path(args.output_dir).glob(".checkpoint-*.partial")):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    cleanup.callback(lock.release)
    cleanup.callback(shutil.rmtree, encoded, ignore_errors=True)


def start_trackers(args, accelerator, run):
    """Starts the trackers, with what describes the run as its configuration."""
    config = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in run.items()}
    folder, name = str(Path(args.output_dir, args.logging_dir)), args.tracker_run_name
    options = {"wandb": {"dir": folder, "name": name}, "trackio": {"name": name}}
    with or_refuse(f"--report_to {args.report_to}: a tracker does not start: mend it or leave it out"):
        accelerator.init_trackers(args.tracker_project_name, config=config, init_kwargs=options)


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


def catch_signals(cleanup):
    """A list that SIGTERM, SIGINT and SIGUSR1 (SLURM's warning) put their number into; a second ends the process."""
    caught = []

    def catch(number, frame):
        if caught:
            os._exit(128 + number)
        caught.append(number)
        name = signal.Signals(number).name
        print(f"\n{name}: the run saves a checkpoint and ends; a second signal ends it at once", file=sys.stderr)

    with contextlib.suppress(ValueError):  # outside of the main thread, where Python catches none
        for number in SIGNALS:
            cleanup.callback(signal.signal, number, signal.signal(number, catch))
    return caught


def leave_signals(worker):
    """Has a loader process leave signals to the training process, which needs its batches to finish the update."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C and a launcher signal the whole group
    for number in SIGNALS:  # torch itself ends the process by SIGTERM
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def read_signal(accelerator, caught):
    """The signal that any process has caught, or 0. Called on all of them alike."""
    return int(accelerator.gather(torch.tensor([max(caught, default=0)], device=accelerator.device)).max())


def encode_once(args, parts, accelerator, targets, dataset, held_out):
    """The prompts' table and the VAE, after encoding what training does not change; each encoder goes when done."""
    prompts = {prompt for each in (dataset, held_out) if each for kind in each.prompts.values() for prompt in kind}
    prompts |= {"", *filter(None, (args.validation_prompt, args.class_prompt))}
    embed = PromptTable(args, parts, accelerator, frozen_dtype(accelerator), targets)
    embed.report_cut(sorted(prompts))
    embed.fill(parts, sorted(prompts))
    vae = load_part(args, parts, "vae", **on_device(accelerator, torch.float32))
    vae.enable_slicing()  # image by image: 2.5 GiB at 1024 px, whatever the batch
    if args.cache_latents:
        cache_moments(dataset, vae, accelerator, "latents")
    if held_out:
        cache_moments(held_out, vae, accelerator, "held out")
    if args.cache_latents or args.offload:
        vae.to("cpu")
        training_utils.free_memory()
    return embed, vae


def make_loader(args, accelerator, dataset):
    """Batches on the device, this process's share, the sampler that orders them, and updates an epoch and in all."""
    sampler = EpochSampler(args, dataset, accelerator.num_processes)
    options = {"num_workers": args.dataloader_num_workers, "persistent_workers": args.dataloader_num_workers > 0}
    options |= {"worker_init_fn": leave_signals, "pin_memory": accelerator.device.type == "cuda"}
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **options)
    updates = len(sampler) * args.train_batch_size // sampler.update
    total = args.max_train_steps or args.num_train_epochs * updates
    if args.lr_warmup_steps > total and args.lr_scheduler != "constant":
        log.warning(f"--lr_warmup_steps {args.lr_warmup_steps}: the run ends in the warm-up, after {total} updates")
    return accelerator.prepare(loader), sampler, updates, total


def prepare_models(args, accelerator, trained, total):
    """The models as accelerate runs them, their trained parameters, the optimizer, its schedule and the average."""
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    for model in trained.values() if args.gradient_checkpointing else ():
        getattr(model, next(name for name in names if hasattr(model, name)))()  # by version of the library
    optimizer = make_optimizer(args, accelerator, trained)
    options = {"num_training_steps": total, "num_cycles": args.lr_num_cycles, "power": args.lr_power}
    schedule = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, **options)
    *models, optimizer, schedule = accelerator.prepare(*trained.values(), optimizer, schedule)
    if accelerator.distributed_type.value == "FSDP":  # accelerate has all others enter autocast by themselves
        models[0].forward = accelerator.autocast()(models[0].forward)
    trained = dict(zip(trained, models, strict=True))
    # accelerate leaves the weights to save_weights and load_trained, which write and read them in the form users load.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    if accelerator.num_processes > 1:  # from here on a process that hangs is found out sooner
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(minutes=20))
    parameters = [parameter for model in models for parameter in trained_parameters(model)]
    average = training_utils.EMAModel([p.float() for p in parameters], decay=args.ema_decay) if args.use_ema else None
    return trained, parameters, optimizer, schedule, average


def read_update(args, accelerator, seen, norm, caught):
    """Figures of an update, averaged over the losses (B,) of its batches, `seen`, and the processes; a signal or 0."""
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2: each process has a part of it
    parts = torch.stack(seen).mean(dim=0).chunk(2 if args.with_prior_preservation else 1)
    others = [torch.as_tensor(value).to(parts[0]) for value in (norm, max(caught, default=0))]
    rows = accelerator.gather(torch.stack([*(part.mean() for part in parts), *others])[None])
    rows = torch.cat([rows[:, :-1].mean(dim=0), rows[:, -1:].amax(dim=0)])
    *losses, norm, number = rows.tolist()  # here the host waits for the device, once an update
    seen.clear()
    figures = {"loss": losses[0], "grad_norm": norm}
    if args.with_prior_preservation:
        figures |= {"instance_loss": losses[0], "prior_loss": losses[1]}
        figures["loss"] += args.prior_loss_weight * losses[1]
    return figures, int(number)


def may_update(accelerator, figures, step, skipped):
    """Whether an update may reach the weights. `skipped` collects those that may not; ten in a row end the run."""
    finite, scaler = math.isfinite(figures["loss"]), accelerator.scaler
    if finite and (math.isfinite(figures["grad_norm"]) or scaler is not None and scaler.get_scale() > 1):
        return True  # where float16 gradients overflow, the scaler skips the update by itself and lowers its scale
    skipped.append(step)
    figures["skipped_updates"] = len(skipped)
    log.warning(f"update {step} is skipped, for it is not finite: {figures}")
    if skipped[-10:] == list(range(step - 9, step + 1)):
        sys.exit("ten updates in a row were not finite: lower the rate and resume from the last checkpoint")
    return scaler is not None  # which has to see the update to skip it


def log_update(accelerator, bar, trained, schedule, figures, step):
    """One log point of an update, and the bar's figures."""
    for name, rate in zip(trained, schedule.get_last_lr(), strict=True):
        figures["lr" if name == "transformer" else f"lr_{name}"] = rate
    accelerator.log(figures, step=step)
    bar.update()
    bar.set_postfix(loss=f"{figures['loss']:.4f}", lr=f"{figures['lr']:.2e}")


@contextlib.contextmanager
def attempt(failed, what):
    """Lets what is not worth the weights fail by itself: says so, adds it to `failed`; yields a list for a result."""
    try:
        yield []
    except InterruptedError:  # by a signal, which is obeyed later
        pass
    except Exception as error:  # whatever drawing, a tracker or the Hub raises
        failed.append(what)
        log.error(f"{what} failed ({type(error).__name__}: {' '.join(str(error).split())})", main_process_only=False)


def end_run(args, accelerator, bar, step, total, skipped, failed, stop):
    """Ends the run: after a signal with 128 + its number, where less was done than asked for with 1 and the reason."""
    bar.close()  # else it would be drawn once more below the last line
    failed = utils.broadcast_object_list([failed])[0]
    # Else DDP would be the last to hold the group, and at the end of main would wait for gloo's threads while it has
    # Python's lock, which they may need to let go of what they have just sent.
    accelerator.state.group = torch.distributed.group.WORLD
    accelerator.end_training()
    reasons = [f"{', '.join(failed)} failed"] if failed else []
    if step < total:
        reasons.append(f"{step} of {total} updates were made")
    if len(skipped) * 10 > total:
        reasons.append(f"{len(skipped)} of {total} updates were skipped, not being finite: lower the rate")
    if stop:
        reasons = [f"{signal.Signals(stop).name} came at update {step}: --resume_from_checkpoint latest goes on"]
    if reasons and accelerator.is_main_process:
        print(f"\nwhat was trained is saved in {args.output_dir}, but {'; '.join(reasons)}", file=sys.stderr)
    if reasons:
        sys.exit(128 + stop if stop else 1)
    log.info(f"The result is in {args.output_dir}")


def draw_sheet(args, dataset):
    """Writes dry_run.png: up to 200 instance images as the model gets them in the first epoch, above their prompts."""
    tiles = []
    for number, prompt in enumerate(dataset.prompts["instance"][:200]):
        seed = derive_seed(args.seed, "instance", 0, number)
        pixels = dataset.pixels("instance", number, dataset.size(number), seed)
        if args.alpha_mask:  # what is left out is grey
            pixels = pixels[:3] * (pixels[3:] + 1) / 2
        picture = VaeImageProcessor().postprocess(pixels[None], output_type="pil")[0]
        tile = ImageOps.expand(ImageOps.pad(picture, (192, 192), color="white"), (8, 8, 8, 56), "white")
        words = "\n".join(prompt[start : start + 32] for start in range(0, min(len(prompt), 96), 32))
        ImageDraw.Draw(tile).text((8, 208), words, "black", ImageFont.load_default(12))
        tiles.append(tile)
    columns = math.ceil(len(tiles) ** 0.5)
    tiles += [Image.new("RGB", (208, 256), "white")] * (-len(tiles) % columns)
    save_image(make_image_grid(tiles, len(tiles) // columns, columns), Path(args.output_dir, "dry_run.png"))


def report_dry_run(args, parts, accelerator, targets, dataset):
    """Says what the run would do before its weights are loaded, and draws its images as the model gets them."""
    table = PromptTable(args, parts, accelerator, frozen_dtype(accelerator))
    table.report_cut(sorted(set(dataset.prompts["instance"])))
    if args.with_prior_preservation:
        dataset.images["class"] = [None] * args.num_class_images  # those that lack are not drawn
    _, _, updates, total = make_loader(args, accelerator, dataset)
    if accelerator.is_main_process:
        draw_sheet(args, dataset)
        models = {name: sketch_part(args, parts, name) for name in targets}
        for name, model in models.items():
            make_trainable(args, model, targets[name])
        count = sum(parameter.numel() for model in models.values() for parameter in trained_parameters(model))
        print(f"updates: {total}, which is {total / updates:.1f} epochs of {updates}")
        print(f"trained: {count:,} parameters of {', '.join(targets)}")
        print(f"drawn:   {Path(args.output_dir, 'dry_run.png')}, cropped as in the first epoch")


def main(args):
    """Trains, and leaves in output_dir what the module's docstring lists."""
    accelerator = start_accelerator(args)
    with contextlib.ExitStack() as cleanup:
        # What there is: a folder for this run alone, the base model, what of it is trained, a run to go on from.
        claim_folder(args, accelerator, cleanup)
        parts = read_pipeline(args)
        targets = choose_targets(args, parts, accelerator)
        checkpoint, manifest = find_checkpoint(args)
        seed = utils.broadcast_object_list([random.SystemRandom().randrange(2**32)])[0]
        step, args.seed = manifest.get("step", 0), manifest.get("seed", seed) if args.seed is None else args.seed

        # The data: all of it is checked before anything is created, drawn or loaded. A dry run ends here.
        dataset, held_out = read_instances(args), read_held_out(args)
        run = describe_run(args, accelerator, dataset)
        compare_runs(accelerator, checkpoint, manifest.get("run", run), run)
        if args.dry_run:
            report_dry_run(args, parts, accelerator, targets, dataset)
            return
        repository = open_repository(args, accelerator)
        start_trackers(args, accelerator, run)
        if args.with_prior_preservation:
            add_class_images(args, parts, accelerator, dataset)
        loader, sampler, updates, total = make_loader(args, accelerator, dataset)

        # What is frozen: the text encoders, then the VAE, each gone before the next one comes. Then what is trained.
        embed, vae = encode_once(args, parts, accelerator, targets, dataset, held_out)
        scheduler = load_scheduler(args, parts, accelerator)
        trained = load_trained(args, parts, accelerator, targets, checkpoint)
        trained, parameters, optimizer, schedule, average = prepare_models(args, accelerator, trained, total)
        if checkpoint:
            resume(accelerator, checkpoint, average, step, total)
        embed.trained, models, transformer = trained, list(trained.values()), trained["transformer"]
        caught, seen, skipped, failed = catch_signals(cleanup), [], [], []
        bar = tqdm(total=total, initial=step, desc="Training", disable=not accelerator.is_main_process)
        for epoch in range(max(step - 1, 0) // updates, math.ceil(total / updates)):  # step - 1: its images may be due
            sampler.epoch, sampler.start = epoch, max(step - epoch * updates, 0) * args.gradient_accumulation_steps
            for batch in loader if step < (epoch + 1) * updates else ():
                if step >= total:
                    break
                with accelerator.accumulate(*models):
                    torch.manual_seed(derive_seed(args.seed, "dropout", *batch["seeds"]))
                    moments = batch["data"] if args.cache_latents else encode_moments(vae, batch["data"])
                    drawn = draw_latents(args, vae.config, moments, batch["seeds"], accelerator.device)
                    losses = batch_losses(args, transformer, scheduler, embed, batch["prompts"], drawn)
                    accelerator.backward(mean_loss(args, losses))
                    seen.append(losses.detach())
                if not accelerator.sync_gradients:
                    continue

                norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                figures, stop = read_update(args, accelerator, seen, norm, caught)
                updated = may_update(accelerator, figures, step + 1, skipped)
                if updated:
                    optimizer.step()
                    updated = not accelerator.optimizer_step_was_skipped  # by the scaler of fp16
                if updated:
                    schedule.step()
                if updated and average:
                    average.step(parameters)
                optimizer.zero_grad(set_to_none=True)
                step += 1
                log_update(accelerator, bar, trained, schedule, figures, step)
                if stop or step % args.checkpointing_steps == 0:
                    save_checkpoint(args, accelerator, trained, average, run, step)
                if stop:
                    end_run(args, accelerator, bar, step, total, skipped, failed, stop)

            if epoch % args.validation_epochs == 0 and step < total:
                with attempt([], f"validation at update {step}"), evaluation(models, parameters, average):
                    validate(args, accelerator, embed, vae, scheduler, held_out, step, caught)
        bar.close()

        # The weights come first: nothing that follows is worth them.
        with evaluation(models, parameters, average):
            save_weights(args, accelerator, trained, args.output_dir, final=True)
            with attempt(failed, "drawing the final images") as paths:
                paths += validate(args, accelerator, embed, vae, scheduler, held_out, step, caught, final=True)
        publish(args, accelerator, repository, step, paths, failed)
        end_run(args, accelerator, bar, step, total, skipped, failed, read_signal(accelerator, caught))


if __name__ == "__main__":
    main(ARGS)
