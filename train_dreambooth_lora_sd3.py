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
[0, 1], a step is an update of the optimizer. `diff` with the twin, train_dreambooth_sd3.py, shows what LoRA is.
"""

import argparse
import errno
import fnmatch
import functools
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

# ---- Arguments ------------------------------------------------------------------------------------------------------

METHOD = "dreambooth-sd3-lora"
# Group by group each flag's name, kind of value (and default) and help, two spaces apart.
FLAGS = """
model
  --pretrained_model_name_or_path    required               Hub id or folder of an SD3 model.
  --pretrained_transformer_model_name_or_path  text                   Pipeline or .safetensors file of the transformer.
  --revision                         text                   Hub revision of every part of the model.
  --variant                          text                   Variant of the model's weight files, such as fp16.
  --cache_dir                        text                   Where downloaded models and datasets are kept.
  --no_t5                            switch                 Leave out T5: less memory, weaker text.
data
  --dataset_name                     text                   Hub id or folder, read by the datasets library.
  --dataset_config_name              text                   Configuration of that dataset.
  --instance_data_dir                text                   Folder with the subject's images, not --dataset_name.
  --dataset_split                    text = train           Split of that dataset.
  --image_column                     text = image           Dataset column with the images.
  --caption_column                   text                   Dataset column with captions; empty: --instance_prompt.
  --repeats                          int 1..10000 = 1       How often each instance image occurs in an epoch.
  --instance_prompt                  text                   Prompt of images without a caption: 'a photo of sks dog'.
  --caption_dropout                  float 0..1 = 0         Probability of training with the empty prompt.
  --max_sequence_length              int 1..512 = 77        T5 tokens per prompt; CLIP has 77.
  --resolution                       int 16..1e9 = 512      Side of the crop in pixels, a multiple of 16.
  --use_aspect_ratio_buckets         switch                 Crop each image to the nearest of several shapes.
  --aspect_ratio_buckets             text                   Shapes as H,W;H,W; unset: diffusers'.
  --center_crop                      switch                 Crop the middle instead of a random place.
  --random_flip                      switch                 Mirror half of the images.
  --alpha_mask                       switch                 Weigh the loss by the alpha channel.
  --dataloader_num_workers           int 0..1024 = 0        0 loads in the main process.
prior preservation
  --with_prior_preservation          switch                 Also train on class images, against drift.
  --class_data_dir                   text                   Folder of class images; missing ones are drawn into it.
  --class_prompt                     text                   Prompt of the class images: 'a photo of a dog'.
  --num_class_images                 int 1..10000 = 100     Number of class images.
  --prior_loss_weight                float 0..1e30 = 1      Weight of the class images' loss.
  --sample_batch_size                int 1..10000 = 4       Class images drawn at once, on each process.
  --prior_generation_precision       no|fp32|fp16|bf16      For class images; unset: --mixed_precision.
training
  --train_batch_size                 int 1..10000 = 4       Instance images per batch, on each process.
  --num_train_epochs                 int 1..1e9 = 1         Epochs; --max_train_steps wins.
  --max_train_steps                  int 1..1e9             Total updates of the optimizer.
  --gradient_accumulation_steps      int 1..10000 = 1       Batches per update.
  --gradient_checkpointing           switch                 Recompute activations in the backward pass.
  --cache_latents                    switch                 Encode each image once, in one crop, and free the VAE.
  --offload                          switch                 Text encoders and, if it can, the VAE wait on the CPU.
  --use_ema                          switch                 Average the weights; validate and save the average.
  --ema_decay                        float 0..1 = 0.9999    Its decay, at most (1 + n) / (10 + n) at step n.
  --max_grad_norm                    float 1e-9..inf = 1    Clip the global gradient norm to this; inf: never.
  --mixed_precision                  no|fp16|bf16           Unset: accelerate's configuration.
  --allow_tf32                       switch                 TF32 matrix products on Ampere GPUs and later.
  --seed                             int 0..4294967295      Unset: a random one, which checkpoints keep.
  --full_determinism                 switch                 Equal runs give equal bits on a GPU too; slower.
  --local_rank                       int -1..1e9 = -1       From old launchers; LOCAL_RANK is what counts.
loss
  --weighting_scheme                 sigma_sqrt|logit_normal|mode|cosmap|none = logit_normal  SD3 paper, 3.1.
  --training_shift                   float 1e-30..1e30      Shift of the noise levels; unset: the scheduler's, 3.
  --logit_mean                       float -1e30..1e30 = 0  Mean of the logit-normal density.
  --logit_std                        float 1e-30..1e30 = 1  Standard deviation of the logit-normal density.
  --mode_scale                       float -1..1.75 = 1.29  Scale of the mode density.
  --precondition_outputs             int 0..1 = 1           1 compares clean latents, 0 velocities.
optimizer
  --optimizer                        adamw|prodigy = adamw  Case does not matter.
  --learning_rate                    float 0..1e30 = 1e-4   Learning rate after warm-up.
  --text_encoder_lr                  float 0..1e30 = 5e-6   Text encoders' rate; prodigy takes --learning_rate.
  --scale_lr                         switch                 Multiply the rate by processes, accumulation and batch.
  --lr_scheduler                     text = constant        linear, cosine, polynomial or another of diffusers.
  --lr_warmup_steps                  int 0..1e9 = 500       Updates of warm-up.
  --lr_num_cycles                    int 1..10000 = 1       Restarts of cosine_with_restarts.
  --lr_power                         float 0..1e30 = 1      Power of polynomial.
  --use_8bit_adam                    switch                 AdamW with 8-bit state, from bitsandbytes.
  --adam_beta1                       float 0..1 = 0.9       First beta, also Prodigy's.
  --adam_beta2                       float 0..1 = 0.999     Second beta, also Prodigy's.
  --adam_weight_decay                float 0..1e30 = 1e-4   Weight decay of the transformer.
  --adam_weight_decay_text_encoder   float 0..1e30 = 1e-3   Weight decay of the text encoders.
  --adam_epsilon                     float 1e-30..1e30 = 1e-8  Epsilon, also Prodigy's.
  --prodigy_beta3                    float 0..1             Unset: the square root of the second beta.
  --prodigy_decouple                 boolean = True         Decoupled weight decay.
  --prodigy_use_bias_correction      boolean = True         Adam's bias correction.
  --prodigy_safeguard_warmup         boolean = True         Keep the rate out of D's denominator in warm-up.
validation
  --validation_prompt                texts                  Prompts of the images drawn along the way and after.
  --validation_data_dir              text                   Held-out images: their loss at fixed noise is logged.
  --num_validation_images            int 1..10000 = 4       Number of images of each prompt, each time.
  --validation_epochs                int 1..1e9 = 50        Draw after the first epoch and then every so many.
  --validation_num_inference_steps   int 1..10000 = 28      Denoising steps.
  --validation_guidance_scale        float 0..1e30 = 7      Guidance; Turbo needs 0.
  --skip_final_inference             switch                 Draw no images at the end.
output
  --output_dir                       text = sd3-dreambooth  Where everything is written.
  --logging_dir                      text = logs            The trackers' folder inside output_dir.
  --report_to                        text = tensorboard     Trackers that accelerate knows: wandb,aim; all; none.
  --tracker_run_name                 text                   The run's name in wandb and in logging_dir.
  --checkpointing_steps              int 1..1e9 = 500       Updates between checkpoints.
  --checkpoints_total_limit          int 1..10000           How many of the newest to keep; unset: all.
  --resume_from_checkpoint           text                   A checkpoint's path or name, or latest.
  --dry_run                          switch                 Check the input and count the updates; train nothing.
  --push_to_hub                      switch                 Upload the result when training ends.
  --hub_token                        text                   Token for the upload; it is written nowhere.
  --hub_model_id                     text                   Repository; unset: the name of output_dir.
  --hub_private_repo                 switch                 Make a new repository private.
"""
METHOD_FLAGS = """
lora
  --tracker_project_name             text = dreambooth-sd3-lora  The trackers' project.
  --train_text_encoder               switch                 Also train adapters on both CLIP encoders, never on T5.
  --rank                             int 1..10000 = 4       Rank of the adapters.
  --lora_alpha                       float 1e-30..1e30      Adapters are scaled by alpha / rank; unset: the rank.
  --lora_dropout                     float 0..1 = 0         Dropout on the adapters' input.
  --use_rslora                       switch                 Scale by alpha / sqrt(rank): rank-stabilised LoRA.
  --use_dora                         switch                 Also train the magnitude of each weight row: DoRA.
  --lora_layers                      text                   attn.to_q,ff.* or all-linear; unset: joint attention.
  --lora_blocks                      text                   Blocks with adapters: 0,3 or 12-24; unset: all.
  --upcast_before_saving             switch                 Save the final adapters in float32.
  --bnb_quantization_config_path     text                   JSON of a BitsAndBytesConfig: 8- or 4-bit base.
  --blocks_to_swap                   int 0..1000 = 0        Blocks whose weights wait in RAM.
  --init_lora                        text                   Adapters to start from, of the same layers and rank.
  --output_preservation_weight       float 0..1e30 = 0      Loss that keeps --class_prompt as in the base model.
"""


class Stderr(io.FileIO):
    """Standard error that may go away, like a closed terminal, without ending the run. A file gets lines for bars."""

    def write(self, data):
        with suppress(OSError):
            super().write(data if self.isatty() else data.replace(b"\r", b"\n"))
        return len(data)


def refuse(message):
    """Prints one line and exits with code 2; if all processes fail alike, only local rank 0 prints."""
    if int(os.environ.get("LOCAL_RANK") or 0):
        time.sleep(2)  # the launcher should have killed this process by then
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def or_refuse(what):
    """Turns any exception into a one-line error, unless SHOW_TRACEBACKS is in the environment."""
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


def in_range(kind, bounds):
    """Type of a flag: an int or a float in bounds such as 1..512."""
    low, high = map(float, bounds.split(".."))

    def number(text):  # argparse shows this name when the text is none
        value = kind(text)
        if low <= value <= high:  # not so for nan
            return value
        raise argparse.ArgumentTypeError(f"{text} is out of range: give {bounds}")

    return number


def split_names(text):
    """Names in a comma-separated list, without spaces and empty ones; all-linear is every name."""
    return text.replace(" ", "").replace("all-linear", "*").strip(",").split(",")


def read_kind(kind):
    """Options of argparse for a kind of value in the table of flags."""
    number, _, bounds = kind.partition(" ")
    if bounds:
        return {"type": in_range(int if number == "int" else float, bounds)}
    if "|" in kind:
        return {"choices": kind.split("|"), "type": str.lower}
    kinds = {"text": {"type": utf8}, "texts": {"type": utf8, "nargs": "+"}, "boolean": {"type": boolean}}
    kinds |= {"required": {"type": utf8, "required": True}, "switch": {"action": "store_true"}}
    return kinds[kind]


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
    parser.set_defaults(output_preservation_weight=0.0)  # a flag of LoRA alone
    for group in re.split(r"\n+(?=\w)", (FLAGS + METHOD_FLAGS).strip()):
        title, *rows = group.splitlines()
        group = parser.add_argument_group(title)
        for row in rows:
            name, kind, text = re.split("  +", row.strip())
            kind, _, default = kind.partition(" = ")
            options = {"default": default} if default else {}  # argparse reads it as if it were given
            group.add_argument(name, help=text, **read_kind(kind), **options)
    return parser


def check_data_flags(args):
    """Refuses data flags that contradict each other, and folders in which the run would take its own images."""
    if bool(args.dataset_name) == bool(args.instance_data_dir):
        refuse("--dataset_name, --instance_data_dir: give exactly one of the two")
    output = Path(args.output_dir).resolve()
    drawn = Path(args.class_data_dir or os.devnull).resolve()
    for name in ("instance_data_dir", "validation_data_dir", "dataset_name"):
        folder = vars(args)[name] or os.sep
        path = Path(folder).resolve()
        if output in (path, drawn):
            refuse(f"--{name}, --class_data_dir: --output_dir {args.output_dir!r} is one of them: give another")
        if folder != os.sep and (path.is_relative_to(drawn) or drawn.is_relative_to(path)):
            refuse(f"--class_data_dir overlaps --{name} {folder!r}: give class images a folder of their own")


def parse_args(argv=None):
    """The flags of a run. Wrong or contradictory ones exit with code 2 and one line."""
    if not __doc__:
        refuse("transformers needs the docstrings that `python -OO` leaves out: take -O or neither")
    args = build_parser().parse_args(argv)
    if not args.output_dir:
        refuse("--output_dir is empty: give the folder to write to")
    check_data_flags(args)
    prior = args.with_prior_preservation
    if prior and not (args.class_data_dir and args.class_prompt):
        refuse("--with_prior_preservation needs --class_data_dir and --class_prompt")
    if args.output_preservation_weight and (prior or not args.class_prompt):
        refuse("--output_preservation_weight needs --class_prompt, and excludes --with_prior_preservation")
    if args.hub_token and args.report_to not in ("tensorboard", "none"):  # most trackers record the command line
        refuse(f"--hub_token would be readable in {args.report_to}: leave it out and run `hf auth login` instead")
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
from accelerate.state import AcceleratorState, PartialState
from diffusers import BitsAndBytesConfig, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    EMAModel,
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    find_nearest_bucket,
    free_memory,
    offload_models,
    parse_buckets_string,
)
from diffusers.utils import make_image_grid
from filelock import FileLock, Timeout
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from safetensors.torch import save
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

with suppress(ImportError):  # if it is there, Pillow reads the photos of iPhones
    from pillow_heif import register_heif_opener

    register_heif_opener()

log = get_logger(__name__)

# ---- Data -----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = ".jpg .jpeg .jfif .png .webp .avif .heic .heif .bmp .gif .tif .tiff".split()
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as in an imagefolder of the datasets library
KEPT = 128  # decoded images that stay in memory: of photos as JPEG 0.5 GB at 512 px


def derive_seed(*parts):
    """One seed from the run's seed and what a draw belongs to, so that no draw depends on those made before it."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def list_images(folder):
    """Image files of a folder in sorted order, without hidden ones."""
    paths = sorted(Path(folder).glob("[!.]*"))
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]


def open_image(source, reach, number, alpha_mask=False):
    """RGB image of a path or of a dataset's {"bytes", "path"}; `number` names one that has no path. EXIF rotation is
    applied, 16 bits are scaled to 8, transparent parts become white; `alpha_mask` keeps the alpha as a fourth band.
    JPEGs are decoded no larger than needed to cover `reach` pixels. Errors: ValueError with its name."""
    file = name = source
    if isinstance(source, dict):
        name = source["path"]
        file = io.BytesIO(source["bytes"]) if source["bytes"] else name
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
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if alpha_mask:
            image.putalpha(alpha)
        return image
    except Exception as error:  # PIL's readers raise anything on a damaged file
        raise ValueError(f"the image {name or f'of row {number}'} cannot be read ({error})") from error


def crop_image(image, size, generator, center, flip):
    """A crop of `size`, (height, width): uint8 (bands, height, width), its place and mirror drawn. The image is scaled
    until it just covers `size`, but only inside the crop: all of 1 x 5000 pixels would take 4 GB."""
    height, width = size
    rows = max(height, image.height * width // image.width)
    columns = max(width, image.width * height // image.height)
    down, right, mirror = torch.rand(3, generator=generator).tolist()
    top = round((rows - height) / 2) if center else int(down * (rows - height + 1))
    left = round((columns - width) / 2) if center else int(right * (columns - width + 1))
    x = image.width / columns
    y = image.height / rows
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    # Antialiased, and band by band: PIL would multiply the colours by the alpha.
    crop = np.stack([band.resize((width, height), Image.Resampling.BILINEAR, box) for band in image.split()])
    if flip and mirror < 0.5:
        crop = crop[..., ::-1]
    return torch.from_numpy(crop.copy())


def list_buckets(args):
    """The sizes (height, width) that images are cropped to."""
    if args.aspect_ratio_buckets:
        with or_refuse(f"--aspect_ratio_buckets {args.aspect_ratio_buckets!r}: give pairs of height,width: 512,768"):
            return parse_buckets_string(args.aspect_ratio_buckets)
    if args.use_aspect_ratio_buckets:
        from diffusers.training_utils import generate_aspect_ratio_buckets  # not in diffusers 0.36

        return generate_aspect_ratio_buckets(args.resolution, divisibility=16)
    return [(args.resolution, args.resolution)]


def read_caption(number, caption):
    """Captions of an image to choose from, (text, ...): one, those of a list, or none. Refuses what is not text."""
    texts = caption if isinstance(caption, list) else [caption]
    words = [" ".join(text.split()) for text in texts if isinstance(text, str)]
    if caption is not None and len(words) < len(texts):
        refuse(f"the caption of row {number} is {caption!r}: give a text or a list of texts")
    return tuple(filter(None, words))


class DreamBoothDataset:
    """Instance images with their prompts, each together with a class image where there are any. An item's place is
    (epoch, index, copy): all that is drawn for it comes from these and the run's seed. A class image is cropped to its
    partner's size. `moments`, once filled by `cache_moments`, stands in for the pixels."""

    def __init__(self, args, flag, images, captions):
        self.args = args
        self.buckets = list_buckets(args)
        self.images = {}  # by kind, "instance" or "class"
        self.prompts = {}  # of each image a tuple, of which one is drawn an epoch
        self.moments = None
        self.whole = True  # whether all images have the shape of their crops
        prompts = [read_caption(number, caption) for number, caption in enumerate(captions)]
        lacking = prompts.count(())
        if lacking and args.instance_prompt is None:
            refuse(f"{flag}: {lacking} of {len(prompts)} images have no caption: give --instance_prompt")
        prompts = [words or (args.instance_prompt,) for words in prompts]
        self.sizes, alphas = self.add_images("instance", flag, images, prompts)
        log.info(f"{flag}: {len(images)} images, {lacking} without a caption; (height, width): {set(self.sizes)}")
        if args.alpha_mask and {(0, 0), (255, 255)}.issuperset(alphas):
            log.warning(f"{flag}: --alpha_mask: no image is transparent in part; an invisible one teaches nothing")

    def add_images(self, kind, flag, images, prompts):
        """Adds the images of a kind and reads each once. Returns their crops' sizes and ranges of alpha."""
        if not images:
            refuse(f"{flag} {vars(self.args)[flag[2:]]!r} has no image: give a folder of {', '.join(IMAGE_SUFFIXES)}")
        self.images[kind] = images
        self.prompts[kind] = prompts

        def inspect(number):
            image = self.load(kind, number)
            size = self.buckets[find_nearest_bucket(image.height, image.width, self.buckets)]
            whole = image.width * size[0] == image.height * size[1]
            return whole, size, image.split()[-1].getextrema()

        with ThreadPoolExecutor() as pool:
            found = [pool.submit(inspect, number) for number in range(len(images))]
        broken = [str(each.exception()) for each in found if each.exception()]
        if broken:
            remedy = "repair or remove them; for HEIC: pip install pillow-heif"
            refuse(f"{flag}: {len(broken)} of {len(images)} images are broken: {'; '.join(broken[:10])}: {remedy}")
        whole, *rest = zip(*[each.result() for each in found], strict=True)
        self.whole &= all(whole)
        return rest

    @functools.lru_cache(KEPT)  # noqa: B019  decoding a photo can take longer than an update
    def load(self, kind, number):
        return open_image(self.images[kind][number], max(map(max, self.buckets)), number, self.args.alpha_mask)

    def __len__(self):
        return max(len(self.images["instance"]) * self.args.repeats, len(self.images.get("class", ())))

    def has_fixed_crops(self):
        """Whether each image is always seen in the same crop, and there are few, because their latents take memory."""
        fixed = self.args.center_crop or self.whole and len(self.buckets) == 1
        return fixed and not self.args.random_flip and len(self.sizes) <= KEPT

    def __getitem__(self, place):
        """The examples of an item, instance, then class: data, prompt and seed of each."""
        epoch, index, copy = place
        size = self.size(index)
        examples = []
        for kind, images in self.images.items():
            number = index % len(images)
            seed = derive_seed(self.args.seed, kind, epoch, index + copy * len(self))
            draw = random.Random(derive_seed(seed, "caption"))
            dropped = draw.random() < self.args.caption_dropout
            prompt = "" if dropped and kind == "instance" else draw.choice(self.prompts[kind][number])
            key = (kind, number, size)
            data = self.moments[key]["moments"] if self.moments else self.pixels(*key, seed)
            examples.append((data, prompt, seed))
        return examples

    def size(self, index):
        """Height and width in pixels of the item at an index."""
        return self.sizes[index % len(self.sizes)]

    def pixels(self, kind, number, size, seed):
        """Pixels (bands, height, width) of one image from 0 to 255, in the crop that `seed` draws."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "crop"))
        return crop_image(self.load(kind, number), size, generator, self.args.center_crop, self.args.random_flip)


class Batches(list):
    """What a loader reads in an epoch: lists of places, see order_epoch."""

    batch_size = None  # tells accelerate that it cannot split them itself


def order_epoch(args, dataset, processes, epoch, done=0):
    """Batches of places (epoch, index, copy): every index once, in an order drawn from seed and epoch. An update,
    which is processes x batch x accumulation images, is full and of one size: copies, drawn anew, fill up the last one
    of each size. So it has the same images however they are shared out. Leaves out the `done` updates."""
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
    return [places[first : first + batch] for first in range(max(done, 0) * update, len(places), batch)]


def collate(items):
    """Pixels (B, bands, H, W) or moments (B, 2C, h, w), prompts and seeds of a batch, class images at the end."""
    data, prompts, seeds = zip(*sum(zip(*items, strict=True), ()), strict=True)
    return torch.stack(data), prompts, seeds


def encode_all(keys, make, title, batch=1):
    """{key: its tensors, on the CPU}, as `make` gives them for `batch` keys at once."""
    table = {}
    for first in tqdm(range(0, len(keys), batch), title):
        some = keys[first : first + batch]
        made = make(some)
        for number, key in enumerate(some):
            table[key] = {name: tensor[number].cpu() for name, tensor in made.items()}
    return table


def read_folder(args, flag, folder):
    """Images of a folder and a caption or None for each, from the files beside them or from its metadata file."""
    with or_refuse(f"{flag} {folder!r} cannot be read"):
        images = list_images(folder)
        if any(Path(folder, name).is_file() for name in METADATA):
            return read_dataset(args, flag, folder, "image", args.caption_column or "text")
    if (args.dataset_split, args.image_column, args.caption_column) != ("train", "image", None):
        log.warning(f"{flag} {folder!r} has no metadata file: split and columns of a dataset have no effect")
    captions = []
    for image in images:
        beside = next(filter(Path.is_file, map(image.with_suffix, CAPTION_SUFFIXES)), None)
        with or_refuse(f"{beside} is not UTF-8 text: save it as such"):
            captions.append(beside and beside.read_text(encoding="utf-8-sig"))
    return images, captions


def read_dataset(args, flag, name, image_column, caption_column):
    """Images, decoded when they are used, and captions or None, of a Hub id or of a folder of the datasets library."""
    remedy = "give a Hub id or a folder without brackets in its name; datasets writes to --cache_dir"
    with or_refuse(f"{flag} {name!r} cannot be read: {remedy}"):
        import datasets

        split = args.dataset_split
        if Path(name, split, "state.json").is_file():
            rows = datasets.load_from_disk(Path(name, split))
        else:
            rows = datasets.load_dataset(name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
        captions = rows[caption_column][:] if caption_column else [None] * len(rows)
        label = rows.features.get(caption_column)
        if isinstance(label, datasets.ClassLabel):
            captions = label.int2str(captions)
        rows = rows.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        return rows[image_column], captions


def read_instances(args):
    """The images to train on, with their prompts."""
    if args.instance_data_dir:
        flag = "--instance_data_dir"
        return DreamBoothDataset(args, flag, *read_folder(args, flag, args.instance_data_dir))
    found = read_dataset(args, "--dataset_name", args.dataset_name, args.image_column, args.caption_column)
    return DreamBoothDataset(args, "--dataset_name", *found)


def read_held_out(args):
    """The images of --validation_data_dir, cropped in the middle; None without the flag."""
    flag = "--validation_data_dir"
    if not args.validation_data_dir:
        return None
    fixed = {"center_crop": True, "random_flip": False, "repeats": 1, "seed": 0, "caption_dropout": 0}
    plain = argparse.Namespace(**vars(args) | fixed | {"instance_prompt": args.instance_prompt or ""})
    return DreamBoothDataset(plain, flag, *read_folder(args, flag, args.validation_data_dir))


# ---- Models ---------------------------------------------------------------------------------------------------------

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # CLIP-L, OpenCLIP bigG, T5: the pipeline's order
T5 = TEXT_ENCODERS[2]
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_pipeline(args):
    """What loads each part of the base pipeline, by name: class, model, from_pretrained's arguments, index entry."""
    base = args.pretrained_model_name_or_path
    remedy = "give a diffusers folder or a Hub id; for a gated model accept its licence and run `hf auth login`"
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    with or_refuse(f"--pretrained_model_name_or_path {base!r}: no model_index.json can be read: {remedy}"):
        index = StableDiffusion3Pipeline.load_config(base, **where)
        found = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0]}
        own = args.pretrained_transformer_model_name_or_path
        classes = {"transformer": "SD3Transformer2DModel", "scheduler": "FlowMatch"}
        parts = {}
        for name in ("vae", *classes, *TEXT_ENCODERS[:2], *TOKENIZERS[:2], *found):
            if args.no_t5 and name.endswith("_3"):
                continue
            library, class_name = found.get(name, ("nothing", ""))
            kind = getattr(sys.modules.get(library), class_name, None)
            if not kind or classes.get(name, "") not in class_name:
                refuse(f"--pretrained_model_name_or_path {base!r} is not SD3: its {name} is {library} {class_name}")
            model = own if own and name == "transformer" else base
            parts[name] = (kind, model, where | {"subfolder": name}, found[name])
            if args.variant and model == base and hasattr(kind, "parameters"):
                parts[name][2]["variant"] = args.variant
    check_parts(args, parts)
    return parts


def check_parts(args, parts):
    """Refuses parts with which training would fail later, and sizes that the transformer has no positions for."""
    for name, key in (("vae", "scaling_factor"), ("scheduler", "shift")):
        number = sketch_part(parts, name).config[key]
        if not number or number < 0:
            refuse(f"the {name} cannot be used: its {key} is {number}")
    config = sketch_part(parts, "transformer").config
    limit = config.pos_embed_max_size * config.patch_size * 8
    for side in sum(list_buckets(args), (args.resolution,)):
        if side % 16 or not 16 <= side <= limit:
            refuse(f"--resolution, --aspect_ratio_buckets: {side} pixels: give multiples of 16, here up to {limit}")


def has_room(device, size):
    """Whether a CUDA device has `size` bytes left; other devices always do."""
    torch.cuda.empty_cache()
    return device.type != "cuda" or torch.cuda.mem_get_info(device)[0] >= size


def is_split(accelerator):
    """Whether FSDP2 splits what is trained over the processes."""
    return accelerator.distributed_type.value == "FSDP"


def on_device(accelerator, dtype):
    """from_pretrained arguments that load weights straight onto the device."""
    return {"torch_dtype": dtype, "device_map": {"": str(accelerator.device)}}


def frozen_dtype(accelerator):
    """Precision of what is not trained."""
    return DTYPES.get(accelerator.mixed_precision, torch.float32)


def load_part(parts, name, checkpoint=None, **options):
    """A part of the base pipeline or of a checkpoint, a model frozen. Refuses damaged ones."""
    kind, model, where, _ = parts[name]
    if checkpoint:
        model = str(checkpoint)
        where = {"subfolder": name}
    with or_refuse(f"{name} of {model!r} cannot be loaded (variant: {where.get('variant')})"):
        if not hasattr(kind, "parameters"):
            return load_tokenizer(kind, model, where) if "tokenizer" in name else kind.from_pretrained(model, **where)
        if model.endswith(".safetensors"):  # with the names of diffusers or of ComfyUI
            options["device"] = options.get("device_map", {"": "cpu"})[""]
            options |= {"config": parts["vae"][1], "config_revision": parts["vae"][2]["revision"]}
            return kind.from_single_file(model, **where, **options).requires_grad_(False)
        # Elsewhere the transformer would compute its table of positions: 16 s and 3.4 GB of RAM for SD3.5 Medium.
        plain = not options.get("quantization_config")
        on_meta = name == "transformer" and plain and utils.compare_versions("diffusers", ">=", "0.40.0")
        with torch.device("meta") if on_meta else nullcontext():
            part, info = kind.from_pretrained(model, output_loading_info=True, **where, **options)
        wrong = sum(map(list, info.values()), [])  # keys that are missing, unexpected, of another shape
        if wrong and plain:
            raise ValueError(f"its weights do not fit its config: {wrong[0]}, {len(wrong)} in all")
    return part.requires_grad_(False).eval()


def load_tokenizer(kind, model, where):
    """A tokenizer. Errors: ValueError if a file of it is missing, for which the libraries make up what was in it."""
    tokenizer = kind.from_pretrained(model, **where)
    unknown = tokenizer.unk_token_id in tokenizer("photo", add_special_tokens=False).input_ids
    if unknown or tokenizer.model_max_length > 2**20:
        raise ValueError("it has no vocabulary or no length: a tokenizer file is missing")
    return tokenizer


def load_scheduler(args, parts, accelerator):
    """The base's scheduler, with the tables of timesteps and sigmas for training, (1000,) each, on the device."""
    scheduler = load_part(parts, "scheduler")
    shifted = scheduler.from_config(scheduler.config, shift=args.training_shift or scheduler.config.shift)
    scheduler.timesteps = shifted.timesteps.to(accelerator.device)
    scheduler.sigmas = shifted.sigmas.to(accelerator.device)
    return scheduler


def sketch_part(parts, name):
    """A part of the pipeline that is no tokenizer, without weights: its config, names and sizes of its layers."""
    kind, model, where, _ = parts[name]
    if model.endswith(".safetensors"):
        return load_part(parts, name, device_map={"": "meta"})
    with or_refuse(f"{name} of {model!r} has a config that cannot be used"), torch.device("meta"):
        if name in TEXT_ENCODERS:
            return kind(kind.config_class.from_pretrained(model, **where))
        return kind.from_config(kind.load_config(model, **where))


def load_to_train(parts, accelerator, name, dtype, checkpoint=None, **options):
    """A model to be trained, on the device; under FSDP2 on the CPU, where hand_out sends what one process reads."""
    if not is_split(accelerator):
        return load_part(parts, name, checkpoint, **on_device(accelerator, dtype) | options)
    if accelerator.is_main_process:
        return load_part(parts, name, checkpoint, torch_dtype=dtype)
    return sketch_part(parts, name).to(dtype).to_empty(device="cpu")


def load_frozen(args, parts, accelerator, name, dtype):
    """A text encoder or transformer on the device, or on the CPU: its layers then visit the device in turn."""
    waits = args.offload and name in TEXT_ENCODERS
    if accelerator.device.type == "cuda":  # elsewhere nobody knows how much memory is left
        size = utils.compute_module_sizes(sketch_part(parts, name), dtype=dtype)[""] * 1.2  # a fifth for activations
        waits |= not has_room(accelerator.device, size)
    if waits:
        free_memory()  # hooks keep the model that was here before in a cycle
        return cpu_offload(load_part(parts, name, torch_dtype=dtype), accelerator.device)
    return load_part(parts, name, **on_device(accelerator, dtype))


# ---- Text -----------------------------------------------------------------------------------------------------------

TEXT_BATCH = 16  # prompts at once: where T5 waits on the CPU, 9.5 GB cross the bus for each batch


class PromptTable:
    """Prompt embeddings: those of frozen encoders (freed after encoding) looked up, those of trained ones computed."""

    def __init__(self, args, parts, accelerator, prompts):
        self.args = args
        self.device = accelerator.device
        self.prompts = prompts
        self.width = sketch_part(parts, "transformer").config.joint_attention_dim
        self.tokenizers = {}
        self.frozen = {}  # of each encoder {prompt: its part of the text, on the CPU}
        self.trained = {}  # the models that are trained, by name, once they are loaded
        for encoder, name in zip(TEXT_ENCODERS, TOKENIZERS, strict=True):
            if encoder in parts:
                tokenizer = self.tokenizers[encoder] = load_part(parts, name)
                if encoder == T5:
                    tokenizer.model_max_length = args.max_sequence_length
                lengths = [len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]
                cut = sum(length > tokenizer.model_max_length for length in lengths)
                if cut:
                    log.warning(f"{name} cuts {cut} of {len(prompts)} prompts to {tokenizer.model_max_length} tokens")

    def fill(self, parts, accelerator, dtype, targets=()):
        """Encodes each prompt once with each encoder that is not trained, one encoder at a time."""
        for name in [name for name in self.tokenizers if self.prompts and name not in targets]:
            encoder = load_frozen(self.args, parts, accelerator, name, dtype)
            encode = functools.partial(self.encode, name, encoder)
            with torch.no_grad():
                self.frozen[name] = encode_all(self.prompts, encode, f"Encoding text with {name}", TEXT_BATCH)
            del encoder, encode

    def encode(self, name, encoder, prompts):
        """One encoder's part of the text: states (B, tokens, width) and, of a CLIP, the pooled output (B, width)."""
        tokens = self.tokenizers[name](prompts, padding="max_length", truncation=True, return_tensors="pt")
        output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
        if name == T5:
            return {"states": output[0]}
        return {"states": output.hidden_states[-2], "pooled": output.text_embeds}

    def embed_with(self, name, prompts):
        """One encoder's part of the text, computed if the encoder is trained, else looked up."""
        if name in self.trained:
            return self.encode(name, self.trained[name], prompts)
        found = default_collate([self.frozen[name][prompt] for prompt in prompts])
        return utils.send_to_device(found, self.device)

    def __call__(self, prompts):
        """Text as the transformer takes it: embeds (B, S, D) and pooled embeds (B, P) of a batch's prompts. The CLIPs'
        states side by side, zero-padded to the joint width D, then T5's states along the token axis; the pooled
        outputs side by side. As in StableDiffusion3Pipeline.encode_prompt. Without T5 its part is zeros."""
        both = [self.embed_with(name, prompts) for name in TEXT_ENCODERS[:2]]
        pooled = torch.cat([part["pooled"] for part in both], dim=-1)
        clips = torch.cat([part["states"] for part in both], dim=-1)
        clips = functional.pad(clips, (0, self.width - clips.shape[-1]))
        if T5 in self.tokenizers:
            t5 = self.embed_with(T5, prompts)["states"].to(clips.dtype)
        else:
            t5 = clips.new_zeros(len(prompts), self.args.max_sequence_length, self.width)
        return torch.cat([clips, t5], dim=-2), pooled


# ---- Flow matching --------------------------------------------------------------------------------------------------


def encode_moments(vae, pixels):
    """Posterior of uint8 pixels (B, 3 or 4, H, W): mean, deviation, mask of a fourth band: (B, 2C or 2C + 1, h, w)."""
    pixels = pixels.float().div_(127.5).sub_(1)
    with torch.no_grad():
        posterior = vae.encode(pixels[:, :3]).latent_dist
    moments = [posterior.mean, posterior.std]
    if pixels.shape[1] > 3:
        moments.append(functional.interpolate((pixels[:, 3:] + 1) / 2, posterior.mean.shape[2:], mode="area"))
    return torch.cat(moments, dim=1)


def cache_moments(dataset, vae, accelerator):
    """Encodes every image of the dataset once, in one crop each."""

    def encode(keys):
        (key,) = keys
        pixels = dataset.pixels(*key, derive_seed(dataset.args.seed, "cache", *key))
        return {"moments": encode_moments(vae, pixels[None].to(accelerator.device))}

    keys = {}  # a dict keeps their order
    for kind, images in dataset.images.items():
        for index in range(len(dataset)):
            keys[kind, index % len(images), dataset.size(index)] = None
    dataset.moments = encode_all(list(keys), encode, "Encoding images")
    dataset.load.cache_clear()


def draw_latents(args, vae_config, moments, seeds, device):
    """Latents and noise (B, C, h, w), densities u (B,) and mask (B, 1, h, w) or None, each image's from its own seed.
    A latent is a sample of the posterior, shifted and scaled by the VAE's config (SD3 shifts as well as scales); u in
    [0, 1] is of the density of --weighting_scheme (SD3 paper, section 3.1). `device` is where they are drawn."""
    mean, deviation, *mask = moments.float().split(vae_config.latent_channels, dim=1)
    normal = []
    densities = []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(seed)
        normal.append(torch.randn((2, *mean.shape[1:]), generator=generator, device=device))
        density = compute_density_for_timestep_sampling(
            args.weighting_scheme, 1, args.logit_mean, args.logit_std, args.mode_scale, device, generator
        )
        densities.append(density)
    sample, noise = torch.stack(normal, dim=1).to(moments.device)
    latents = (mean + deviation * sample - vae_config.shift_factor) * vae_config.scaling_factor
    return latents, noise, torch.cat(densities).to(moments.device), mask[0] if mask else None


def flow_losses(args, transformer, scheduler, drawn, text, target=None):
    """Rectified-flow loss of each image, (B,) in float32, and the prediction (SD3 paper, sections 2 and 3.1). `drawn`
    is what draw_latents gives, `text` embeds (B, S, D) and pooled embeds (B, P). The scheduler's tables of timesteps
    and sigmas run from noisy to clean; the shift (section 5.3.2) is already in them. `target` replaces the data by
    another prediction, (B, C, h, w)."""
    latents, noise, u, mask = drawn
    embeds, pooled = text
    levels = len(scheduler.timesteps)
    index = (u * levels).long().clamp(0, levels - 1)  # mode reaches u = 1
    sigma = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    # Under autocast: half precision inside, float32 in and out.
    velocity = transformer(noisy, embeds, pooled, scheduler.timesteps[index], return_dict=False)[0].float()
    prediction = noisy - sigma * velocity if args.precondition_outputs else velocity
    truth = latents if args.precondition_outputs else noise - latents
    error = prediction - (truth if target is None else target)
    weight = compute_loss_weighting_for_sd3(args.weighting_scheme, sigma)
    if mask is not None:  # the mean over what the mask leaves
        weight = weight * mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    return (weight * error**2).flatten(1).mean(1), prediction


def mean_losses(args, losses):
    """The loss that is minimised and, if it is a sum, the mean of each kind, from the losses of batch_losses, (B,)."""
    weights = {"instance_loss": 1}
    if args.with_prior_preservation:
        weights["prior_loss"] = args.prior_loss_weight
    if args.output_preservation_weight:
        weights["preservation_loss"] = args.output_preservation_weight
    means = dict(zip(weights, map(torch.mean, losses.chunk(len(weights))), strict=True))
    loss = sum(weight * means[name] for name, weight in weights.items())
    return {"loss": loss} | (means if len(means) > 1 else {})


@dataclass
class Frozen:
    """What is not trained and always travels together."""

    embed: PromptTable
    vae: torch.nn.Module
    scheduler: object
    held_out: object = None  # a DreamBoothDataset


# ---- What is trained ------------------------------------------------------------------------------------------------

LORA_LAYERS = "attn.add_[kqv]_proj,attn.to_add_out,attn.to_[kqv],attn.to_out.0"
WEIGHTS = "pytorch_lora_weights.safetensors"
RESULT = {  # what the model card says of it and what is uploaded
    "title": "SD3 DreamBooth LoRA",
    "tags": ["lora", "template:sd-lora"],
    "pipeline": "{base!r}",
    "usage": "pipeline.load_lora_weights({!r})",
    "files": [WEIGHTS],
}


def choose_layers(args, transformer):
    """Names of the linear layers that get an adapter. Refuses a layer or a block that has none."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    blocks = []
    for entry in split_names(args.lora_blocks or "*"):
        first, _, last = entry.partition("-")
        with or_refuse(f"--lora_blocks: {entry!r} is neither a number nor a range such as 12-24"):
            numbers = range(int(first), int(last) + 1) if last else ()
        blocks += [f"transformer_blocks.{number}.*" for number in numbers or [entry]]
    layers = [f"*.{layer}" for layer in split_names(args.lora_layers or LORA_LAYERS)]
    inside = sum([fnmatch.filter(linear, block) for block in blocks], [])
    chosen = sum([fnmatch.filter(inside, layer) for layer in layers], [])
    for pattern in layers + blocks if args.lora_layers else blocks:
        if not fnmatch.filter(chosen, pattern):
            known = f"{len(transformer.transformer_blocks)} blocks; first: {fnmatch.filter(linear, '*blocks.0.*')}"
            refuse(f"--lora_blocks, --lora_layers: nothing matches {pattern}; there are {known}")
    return chosen


def choose_targets(args, parts, accelerator, checkpoint):
    """Layers that get an adapter, by model. All flags about adapters are checked here, before text is encoded."""
    quantized = read_quantization(args)
    if args.blocks_to_swap and (quantized or not args.gradient_checkpointing or accelerator.device.type != "cuda"):
        refuse("--blocks_to_swap needs an NVIDIA GPU, --gradient_checkpointing and no quantised base")
    targets = {"transformer": choose_layers(args, sketch_part(parts, "transformer"))}
    if args.train_text_encoder:
        targets |= dict.fromkeys(TEXT_ENCODERS[:2], ["q_proj", "k_proj", "v_proj", "out_proj"])
    for name, layers in targets.items():
        if args.init_lora and not checkpoint:
            model = sketch_part(parts, name)
            make_trainable(args, model, layers)
            load_adapters(args, args.init_lora, name, model)
    return targets


def read_quantization(args, dtype=None):
    """BitsAndBytesConfig of --bnb_quantization_config_path, or None."""
    path = args.bnb_quantization_config_path
    if not path:
        return None
    remedy = 'give a JSON file with fields of a BitsAndBytesConfig, such as {"load_in_4bit": true}, on a GPU'
    with or_refuse(f"--bnb_quantization_config_path {path!r}: {remedy}"):
        fields = json.loads(Path(path).read_text())
        config = BitsAndBytesConfig(**fields | {"bnb_4bit_compute_dtype": dtype})
        if not config.quantization_method():  # diffusers ignores unknown fields, so a misspelt one would be lost
            raise ValueError("neither load_in_8bit nor load_in_4bit, in fp4 or nf4")
        if not torch.cuda.is_available():
            raise ValueError("there is no GPU")
    return config


def make_trainable(args, model, layers):
    """Freezes a model and gives it adapters on its layers, in float32."""
    model.requires_grad_(False)
    scale = {"r": args.rank, "lora_alpha": args.lora_alpha or args.rank, "use_rslora": args.use_rslora}
    options = {"lora_dropout": args.lora_dropout, "use_dora": args.use_dora, "target_modules": layers}
    model.add_adapter(LoraConfig(**scale, **options, init_lora_weights="gaussian"))
    cast_training_params(model, torch.float32)
    for module in adapter_layers(model):
        module.cast_input_dtype_enabled = False  # autocast would take PEFT's cast to float32 back at once


def adapter_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_scale(rank, lora_alpha=None, use_rslora=False, **others):
    """What PEFT multiplies lora_B by: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return (lora_alpha or rank) / (math.sqrt(rank) if use_rslora else rank)


def load_adapters(args, source, name, model):
    """Loads a model's adapters from a checkpoint or --init_lora. Refuses those of other layers or ranks."""
    file = Path(source, WEIGHTS) if Path(source).is_dir() else Path(source)
    with or_refuse(f"the adapters of the {name} in {str(source)!r} cannot be used by this run"):
        file.stat()  # else diffusers would look for it on the Hub
        weights, header = StableDiffusion3Pipeline.lora_state_dict(
            str(file.parent), weight_name=file.name, return_lora_metadata=True
        )
        scale = 1 / adapter_scale(**vars(args))  # in the result alpha / rank is multiplied into lora_B
        if header:
            scale *= adapter_scale(header[f"{name}.r"], header[f"{name}.lora_alpha"], header[f"{name}.use_rslora"])
        elif any(file.parent.glob("scheduler*")):  # a checkpoint
            scale *= adapter_scale(**read_manifest(file.parent)["run"])
        state = {}
        for key, weight in weights.items():
            part, _, key = key.replace("vector.weight", "vector").partition(".")  # PEFT's name for DoRA's magnitude
            if part == name:
                state[key] = weight * scale if "lora_B" in key else weight
            elif not args.train_text_encoder:
                log.warning_once(f"{file}: its adapters of the {part} are not used")
        differ = get_peft_model_state_dict(model, save_embedding_layers=False).keys() ^ state.keys()
        if differ:
            raise ValueError(f"{len(differ)} tensors differ, such as {min(differ)}")
        set_peft_model_state_dict(model, state, low_cpu_mem_usage=model.device.type == "meta")
    cast_training_params(model, torch.float32)


class SwappedBlocks:
    """Keeps frozen weights of blocks in pinned memory. A block that runs gets copies of them on the GPU. They come on
    a stream of their own while the block before is computed, because the host is ahead of the GPU. A block's copies
    are dropped when the next one has its own, and the gradient's graph keeps them as long as it needs."""

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
        model = load_to_train(parts, accelerator, name, dtype, **options)
        make_trainable(args, model, layers)
        if source:
            load_adapters(args, source, name, model)
        trained[name] = model.train()
    cut_positions(args, trained["transformer"])
    if args.blocks_to_swap:
        SwappedBlocks(trained["transformer"].transformer_blocks[: args.blocks_to_swap], accelerator.device)
    return trained


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_states(accelerator, models):
    """The models' weights by their own names. A collective, because under FSDP2 each process has a part of them."""
    states = {}
    for name, model in models.items():
        states[name] = {}
        for key, weight in accelerator.get_state_dict(model).items():
            states[name][key.replace("_orig_mod.", "").removeprefix("module.")] = weight  # of torch.compile and DDP
    return states


def save_with_header(header, weights, path):
    """Writes a safetensors file: 8 bytes of length, JSON, tensors. safetensors itself orders each header at random."""
    data = save(weights)
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps({"__metadata__": header} | json.loads(data[8:start]))
    text += " " * (-len(text) % 8)  # the tensors stay aligned
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[start:])


def save_weights(args, accelerator, models, states, folder, parts=None):
    """Writes the adapters as a file that StableDiffusion3Pipeline.load_lora_weights reads, on the main process.
    `parts` are the base pipeline's when the result is written. In the result the scale, alpha / rank, is multiplied
    into lora_B, because many loaders ignore a header. A checkpoint has the raw weights."""
    if not accelerator.is_main_process:
        return
    scale = adapter_scale(**vars(args)) if parts else 1
    dtype = frozen_dtype(accelerator) if parts and not args.upcast_before_saving else torch.float32
    config = accelerator.unwrap_model(models["transformer"], keep_torch_compile=False).config
    version = "3-medium"
    if config.qk_norm:
        version = "3.5-medium" if config.dual_attention_layers else "3.5-large"
    prompt = args.instance_prompt or ""
    # Stability's ModelSpec, and the rank as sd-scripts names it.
    header = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "ss_network_dim": str(args.rank)}
    header |= {"modelspec.architecture": f"stable-diffusion-v{version}/lora", "modelspec.implementation": "diffusers"}
    header |= {"modelspec.title": f"{RESULT['title']} {prompt}", "modelspec.trigger_phrase": prompt}
    layers = {}
    for name, model in models.items():
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
        state = {}
        for key, weight in get_peft_model_state_dict(model, states[name], save_embedding_layers=False).items():
            if parts and name in TEXT_ENCODERS:  # transformers 5 finds their DoRA magnitudes under this name alone
                key = re.sub("magnitude_vector$", "magnitude_vector.weight", key)
            state[key] = (weight * scale if "lora_B" in key else weight).to(dtype)
        layers[f"{name}_lora_layers"] = state
    layers["save_function"] = functools.partial(save_with_header, header)
    StableDiffusion3Pipeline.save_lora_weights(folder, **layers)


def batch_losses(args, accelerator, models, frozen, prompts, drawn):
    """Loss of each image, (B,), and after them what --output_preservation_weight adds, (B,). That is how far
    --class_prompt is from what the base model predicts. Its gradient is computed here, before the images' loss, so
    that only one graph at a time is in memory."""

    def losses(prompts, target=None):
        with accelerator.autocast():  # accelerate leaves it out under FSDP2
            return flow_losses(args, models["transformer"], frozen.scheduler, drawn, frozen.embed(prompts), target)

    if not args.output_preservation_weight:
        return losses(prompts)[0]
    kept = [args.class_prompt] * len(prompts)
    adapters = sum(map(adapter_layers, models.values()), [])
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
        return Prodigy(groups, **shared, **{name: vars(args)[f"prodigy_{name}"] for name in names})
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **shared)
    # With a GradScaler the fused kernel skips overflows itself and accelerate cannot tell.
    fused = accelerator.scaler is None and accelerator.device.type in {"cpu", "cuda"}
    return torch.optim.AdamW(groups, **shared, fused=fused)


def make_schedule(args, optimizer, total):
    """The learning rate's factor at each of `total` updates."""
    length = max(total, args.lr_warmup_steps + 1)  # polynomial divides by the difference
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=length,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def check_optimizer(args, accelerator):
    """Makes the optimizer and its schedule on a layer, because each refuses flags of its own."""
    with or_refuse("these flags of the optimizer and its schedule do not fit together"):
        make_schedule(args, make_optimizer(args, accelerator, {"transformer": torch.nn.Linear(1, 1)}), total=1)


@dataclass
class Trained:
    """What is trained and always travels together."""

    models: dict  # by name, as accelerate runs them
    parameters: list
    optimizer: object
    schedule: object
    average: object  # an EMAModel or None


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

FORMAT = 2  # of a checkpoint; bump it when old and new scripts can no longer read each other's checkpoints
MANIFEST = "dreambooth.json"
MUST_MATCH = (
    "method pretrained_model_name_or_path pretrained_transformer_model_name_or_path revision variant"
    " train_text_encoder optimizer use_8bit_adam use_ema full_bf16 rank lora_alpha use_rslora use_dora lora_layers"
    " lora_blocks bnb_quantization_config_path"
).split()
LENGTH = ("max_train_steps", "num_train_epochs")
SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")  # of the optimizer's groups: on resume the flags' win


@dataclass
class Progress:
    """Where a run stands."""

    facts: dict  # what describe_run gives, for checkpoints
    caught: dict  # signals by number
    step: int  # updates made
    total: int
    finished: bool  # whether the result is written
    bar: object = None
    clock: float = 0.0  # when the present update began
    unread: object = None  # names and figures of the last one, still on the device, and its seconds
    validation_loss: float = 0.0  # of the held-out images, the last one
    history: list = field(default_factory=list)  # figures of each update
    skipped: list = field(default_factory=list)  # updates that were not finite
    failed: list = field(default_factory=list)  # what went wrong without costing the weights


def describe_run(args, accelerator):
    """The run's flags without the secret, and what else trackers keep and a resumed run compares."""
    facts = vars(args) | {"method": METHOD, "processes": accelerator.num_processes}
    del facts["hub_token"]
    facts["validation_prompt"] = " | ".join(args.validation_prompt or ())  # trackers take no lists
    return facts


def list_states(accelerator, trained):
    """What this process adds to a checkpoint beside the weights, by file: all of it, or its part under FSDP2."""
    part = f"_{accelerator.process_index}" if is_split(accelerator) else ""
    states = {"optimizer": trained.optimizer, "scheduler": trained.schedule}
    states |= {"scaler": accelerator.scaler, "ema": trained.average}
    return {f"{name}{part}.bin": state for name, state in states.items() if state}


def save_checkpoint(args, accelerator, trained, state, alone=False):
    """Writes checkpoint-{step}, which appears under that name only once it is whole, and then removes the oldest. A
    collective, unless the main process does it `alone`."""
    finish_update(accelerator, trained, state)
    folder = Path(args.output_dir, f"checkpoint-{state.step}")
    partial = folder.with_name(f".{folder.name}.partial")
    what = f"saving {folder} ({shutil.disk_usage(args.output_dir).free / 1e9:.3f} GB were free)"
    states = read_states(accelerator, trained.models)
    failed = []
    with attempt(failed, what):
        save_weights(args, accelerator, trained.models, states, partial)
        partial.mkdir(exist_ok=True)
        if accelerator.is_main_process or is_split(accelerator):
            for file, part in list_states(accelerator, trained).items():
                torch.save(part.state_dict(), partial / file)
    failed = failed if alone else utils.gather_object(failed)  # now all processes have written their part
    if accelerator.is_main_process:
        with attempt(failed, what):
            if not failed:
                write_manifest(args, state, partial, ["**/*"])
                remove(folder)
                partial.rename(folder)
                tidy_checkpoints(args, state.step)
                log.info(f"Saved {folder}")
        remove(partial)  # it may have filled the disk
        state.failed += failed[:1]
    if not alone:
        accelerator.wait_for_everyone()


def write_manifest(args, state, folder, patterns):
    """Says what a checkpoint or the result is, gives its files the umask's mode and flushes them to the disk."""
    manifest = {"format": FORMAT, "step": state.step, "seed": args.seed, "run": state.facts}
    path = Path(folder, MANIFEST)
    path.write_text(json.dumps(manifest, indent=2))
    for pattern in (*patterns, MANIFEST):
        for file in filter(Path.is_file, Path(folder).glob(pattern)):
            with suppress(OSError):  # a file system without modes
                file.chmod(path.stat().st_mode)
            try:
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())  # else a crash now could leave the name without the contents
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
                log.warning_once(f"{args.output_dir} cannot be flushed to its disk: a crash may cost files")


def remove(folder):
    """Removes a folder; of one that was moved elsewhere and linked back, the link."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def tidy_checkpoints(args, step):
    """Renames checkpoints of an abandoned run, later than this one, and removes those over the limit."""
    kept = []
    for number, path in list_checkpoints(args.output_dir).items():
        if number > step:
            aside = path.rename(f"{path}.{time.time():.0f}")
            log.warning(f"{path} belongs to an abandoned run; renamed to {aside}")
        else:
            kept.append(path)
    for old in kept[args.checkpoints_total_limit or sys.maxsize :]:
        remove(old)


def list_checkpoints(output_dir):
    """Folders named checkpoint-N by their number, the newest first; other names are left alone."""
    names = {path.name.removeprefix("checkpoint-"): path for path in Path(output_dir).glob("checkpoint-*")}
    numbered = {int(name): path for name, path in names.items() if name.isdecimal()}
    return dict(sorted(numbered.items(), reverse=True))


def read_manifest(folder):
    """What a checkpoint holds. Errors: ValueError that says what is wrong with it."""
    try:
        manifest = json.loads(Path(folder, MANIFEST).read_text())
        if manifest.get("format") in (1, FORMAT):  # 1 kept the average and the scaler in other files
            return manifest
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} is no checkpoint to resume from: {error}") from error
    return refuse(f"{folder}: its format is {manifest.get('format')}, not {FORMAT}: use the script that wrote it")


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
    elif Path(args.output_dir, MANIFEST).is_file():
        present.insert(0, Path(args.output_dir))  # its result is the end of the run, unless more is asked for
    for folder in present:
        try:
            manifest = read_manifest(folder)
            longer = any(manifest["run"].get(name) != vars(args)[name] for name in LENGTH)
            if folder != Path(args.output_dir) or not longer:
                return folder, manifest
        except ValueError as error:
            log.warning(f"passed over: {error}")
    if wanted != "latest":
        refuse(f"--resume_from_checkpoint {wanted!r}: no whole checkpoint, neither here nor in {args.output_dir!r}")
    log.warning(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}, training starts anew")
    return None, {}


def compare_runs(accelerator, checkpoint, manifest, now):
    """Stops if the checkpoint's model or optimizer settings differ; names other changed flags, which take effect."""
    then = manifest.get("run", now)
    fixed = MUST_MATCH + ["processes"] * is_split(accelerator)
    changed = []
    for name in sorted(then.keys() & now.keys() - {"resume_from_checkpoint"}):
        if then[name] != now[name]:
            changed.append(f"{name} {then[name]!r} -> {now[name]!r}")
            if name in fixed:
                refuse(f"{checkpoint} was trained with {name} {then[name]!r}, not {now[name]!r}: give the same")
    if changed:
        log.warning(f"resuming {checkpoint} with changed flags: {', '.join(changed)}")


def resume(accelerator, checkpoint, trained, state):
    """Loads what goes with a checkpoint's weights: optimizer, schedule, scaler, average. The flags' settings win."""
    if not checkpoint or state.finished:
        return
    schedule = trained.schedule.scheduler  # torch's LambdaLR, inside accelerate's wrapper
    with or_refuse(f"{checkpoint} cannot be loaded: delete it and resume from an older one"):
        device = accelerator.device if is_split(accelerator) else "cpu"  # the optimizer moves a copy to the device
        for file, part in list_states(accelerator, trained).items():
            saved = torch.load(Path(checkpoint, file), map_location=device, weights_only=True)
            for old, group in zip(saved.get("param_groups", ()), trained.optimizer.param_groups, strict=False):
                old |= {name: group[name] for name in SETTINGS}
            part.load_state_dict(saved)
    groups = trained.optimizer.param_groups  # loading has made new ones
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
    if trained.average:
        trained.average.to(accelerator.device)
        trained.average.decay = state.facts["ema_decay"]
    log.info(f"Resumed from {checkpoint}")


# ---- Validation -----------------------------------------------------------------------------------------------------

HELD_OUT_LEVELS = 8  # noise levels, spread evenly


@contextmanager
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


@contextmanager
def rescue(args, accelerator, trained, state):
    """Saves a checkpoint if an error ends the training on the main process, which needs no other for it, but under
    FSDP2. An update that was cut short may be in it in part. An older result does not count as one from here on."""
    if not state.finished:
        Path(args.output_dir, MANIFEST).unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        lost = not state.finished and state.step not in {0, *list_checkpoints(args.output_dir)}
        finite = all(parameter.isfinite().all() for parameter in trained.parameters)
        if lost and finite and accelerator.is_main_process and not is_split(accelerator):
            save_checkpoint(args, accelerator, trained, state, alone=True)
        raise


@contextmanager
def attempt(failed, what, kind=Exception):
    """Logs an exception and records `what` in `failed` instead of raising. No collective may be called inside."""
    try:
        yield
    except kind as error:  # drawing, a tracker and the Hub can raise anything
        failed.append(what)
        log.error(f"{what} failed ({type(error).__name__}: {' '.join(str(error).split())})", main_process_only=False)


def draw_images(args, transformer, frozen, prompt, seeds, **options):
    """PIL images of a prompt, one a seed. Errors: ValueError for latents that are not finite."""
    embeds, pooled = frozen.embed([prompt] * len(seeds))
    empty_embeds, empty_pooled = frozen.embed([""] * len(seeds))
    absent = dict.fromkeys(("vae", *TEXT_ENCODERS, *TOKENIZERS))
    scheduler = frozen.scheduler.from_config(frozen.scheduler.config)
    pipeline = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **absent)
    pipeline.set_progress_bar_config(disable=True)
    options |= {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    options |= {"negative_prompt_embeds": empty_embeds, "negative_pooled_prompt_embeds": empty_pooled}
    options |= {"height": args.resolution, "width": args.resolution, "output_type": "latent"}
    options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = pipeline(**options).images
    if not latents.isfinite().all():
        raise ValueError("the latents are not finite: the precision overflows, or training has diverged")
    return decode_latents(args, transformer, frozen.vae, latents)


def decode_latents(args, transformer, vae, latents):
    """PIL images of latents (B, C, h, w), in float32. If memory is short, the transformer waits on the CPU."""
    device = latents.device
    latents = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    short = args.offload or not has_room(device, 5000 * args.resolution**2)  # bytes that the VAE took on an H100
    away = offload_models(transformer, device="cpu", offload=short and transformer.device == device)
    with away, offload_models(vae, device=device), torch.autocast(device.type, enabled=False):
        pixels = [vae.decode(one).sample for one in latents.split(1)]  # one by one: 3 GiB each at 1024 px
    return VaeImageProcessor().postprocess(torch.cat(pixels), output_type="pil")


def add_class_images(args, parts, accelerator, dataset):
    """Adds the class images to the dataset; those that --class_data_dir lacks are drawn into it before."""
    present = list_images(args.class_data_dir)
    taken = {path.name.split("-")[0] for path in present}  # an interrupted run or a user may have left gaps
    free = [number for number in range(args.num_class_images) if str(number) not in taken]
    lacking = free[: max(args.num_class_images - len(present), 0)]
    accelerator.wait_for_everyone()  # until all have counted: then some start to draw
    if lacking:
        draw_class_images(args, parts, accelerator, lacking)
        free_memory()
    images = list_images(args.class_data_dir)[: args.num_class_images]
    dataset.add_images("class", "--class_data_dir", images, [(args.class_prompt,)] * len(images))


def draw_class_images(args, parts, accelerator, numbers):
    """Draws the class images of these numbers with the base model; the processes share the work."""
    dtype = DTYPES.get(args.prior_generation_precision, frozen_dtype(accelerator))
    embed = PromptTable(args, parts, accelerator, [args.class_prompt, ""])
    embed.fill(parts, accelerator, dtype)
    transformer = load_frozen(args, parts, accelerator, "transformer", dtype)
    vae = load_part(parts, "vae", **on_device(accelerator, torch.float32))
    frozen = Frozen(embed, vae, load_scheduler(args, parts, accelerator))
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    remedy = "lower --sample_batch_size if memory ran out, or change --prior_generation_precision"
    for first in tqdm(range(0, len(mine), args.sample_batch_size), "Drawing class images"):
        batch = mine[first : first + args.sample_batch_size]
        seeds = [derive_seed(args.seed, "class drawing", number) for number in batch]
        with or_refuse(f"class images cannot be drawn in {dtype} into {args.class_data_dir!r}: {remedy}"):
            with torch.no_grad():
                images = draw_images(args, transformer, frozen, args.class_prompt, seeds)
            for number, image in zip(batch, images, strict=True):
                digest = hashlib.sha256(image.tobytes()).hexdigest()
                partial = Path(args.class_data_dir, f".{number}.png")  # a hidden name until it is whole
                image.save(partial)
                partial.rename(partial.with_name(f"{number}-{digest[:16]}.png"))
    accelerator.wait_for_everyone()


def make_in_turn(accelerator, state, failed, count, make):
    """What `make` gives for each number below `count`, or nothing. A collective: the processes share the work. Each
    tries by itself, and what fails is in `failed`, so that one that fails alone leaves nobody waiting. Under FSDP2 a
    forward pass needs all of them: each gets as many numbers, some twice, and if it fails, because memory runs out, it
    ends, and the launcher then ends the others. After a signal nothing more is made."""
    kind = ValueError if is_split(accelerator) else Exception  # draw_images raises it after the passes
    made = {}
    for first in range(0, count, accelerator.num_processes):
        number = (first + accelerator.process_index) % count
        if read_signal(accelerator, state.caught):
            break
        with attempt(failed, f"validation after update {state.step}", kind):
            made[number] = make(number)
    made = dict(sorted(utils.gather_object(list(made.items()))))
    return list(made.values()) if len(made) == count else []


def measure_held_out(args, transformer, frozen, index):
    """Loss of a held-out image at each noise level, from the most noise to the least; the noise is always the same."""
    data, prompt, _ = frozen.held_out[0, index, 0][0]
    device = frozen.scheduler.sigmas.device
    moments = data.to(device).expand(HELD_OUT_LEVELS, -1, -1, -1)
    seeds = [derive_seed("held out", index, level) for level in range(HELD_OUT_LEVELS)]
    latents, noise, _, mask = draw_latents(args, frozen.vae.config, moments, seeds, torch.device("cpu"))
    u = (torch.arange(HELD_OUT_LEVELS, device=device) + 0.5) / HELD_OUT_LEVELS
    text = frozen.embed([prompt] * HELD_OUT_LEVELS)
    losses, _ = flow_losses(args, transformer, frozen.scheduler, (latents, noise, u, mask), text)
    return losses.tolist()


def log_held_out(accelerator, losses, state):
    """Logs the held-out loss: the mean over the images at each noise level, 8 the most noise, and that of all."""
    means = np.mean(losses, axis=0)
    figures = {f"validation_loss_{HELD_OUT_LEVELS - number}": mean for number, mean in enumerate(means)}
    figures["validation_loss"] = state.validation_loss = means.mean()
    log_figures(accelerator, state, figures)


def validate(args, accelerator, trained, frozen, state):
    """Logs the held-out loss and draws the validation images, as far as flags ask. Returns the images' paths. What
    fails is logged; at the end it is a failure of the run."""
    finish_update(accelerator, trained, state)
    transformer = accelerator.unwrap_model(trained.models["transformer"], keep_torch_compile=False)
    prompts = [] if state.finished and args.skip_final_inference else args.validation_prompt or []

    def draw(number):
        row, column = divmod(number, args.num_validation_images)
        options = {
            "num_inference_steps": args.validation_num_inference_steps,
            "guidance_scale": args.validation_guidance_scale,
        }
        return draw_images(args, transformer, frozen, prompts[row], [args.seed + column], **options)[0]

    failed = []
    measure = functools.partial(measure_held_out, args, transformer, frozen)
    with evaluation(trained), accelerator.autocast():
        losses = make_in_turn(accelerator, state, failed, len(frozen.held_out or ()), measure)
        images = make_in_turn(accelerator, state, failed, len(prompts) * args.num_validation_images, draw)
    torch.cuda.empty_cache()  # of what decoding took
    failed = utils.gather_object(failed)
    paths = []
    if accelerator.is_main_process:
        with attempt(failed, "logging the validation"):
            if losses:
                log_held_out(accelerator, losses, state)
            if images:
                paths = save_validation(args, accelerator, images, state)
    if state.finished:
        state.failed += failed[:1]
    return paths


def save_validation(args, accelerator, images, state):
    """Writes the images and their grid, a row a prompt, and sends them to the trackers. Returns their paths."""
    title = "test" if state.finished else "validation"
    pattern = "image_{}.png" if state.finished else f"validation/step-{state.step:06d}-{{}}.png"
    prompts = args.validation_prompt
    grid = make_image_grid(images, len(prompts), args.num_validation_images)
    paths = []
    for name, image in (*enumerate(images), ("grid", grid)):
        path = Path(args.output_dir, pattern.format(name))
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        paths.append(path)
    rows = {}
    for number, pixels in enumerate(np.split(np.stack(images), len(prompts))):
        words = re.sub(r"\W+", "_", prompts[number])[:60]  # trackers make it part of a file's name
        rows[f"{title}_{number}_{words}" if len(prompts) > 1 else title] = pixels
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images(rows, step=state.step, **options)
    return paths[:-1]


# ---- The result and the Hub -----------------------------------------------------------------------------------------

LICENCE = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md"


def describe_cost(state):
    """What the updates took since the run was started or resumed, and the last held-out loss."""
    if not state.history:
        return "no update was left to make"
    seconds = [figures["seconds_per_update"] for figures in state.history]
    cost = f"{len(seconds)} updates in {sum(seconds):.0f} s ({np.mean(seconds):.2f} s each), at most"
    cost += f" {state.history[-1]['memory_gb']:.1f} GB"
    return f"{cost}; held-out loss {state.validation_loss:.4f}" if state.validation_loss else cost


def describe_result(args, parts, repository, state):
    """The model card's text: what was trained, and the program that loads it."""
    base = Path(args.pretrained_model_name_or_path)
    base = base.resolve().name if base.exists() else str(base)  # a card is public: no folders above
    trained = f"DreamBooth weights for {base}, trained for {state.step} updates"
    if args.pretrained_transformer_model_name_or_path:
        trained += f" with the transformer {Path(args.pretrained_transformer_model_name_or_path).name}"
    source = RESULT["pipeline"].format(base=base, result=repository)
    if T5 not in parts:
        source += ", text_encoder_3=None, tokenizer_3=None"
    prompts = args.validation_prompt or [args.instance_prompt or ""]
    return f"""# {RESULT["title"]} - {repository}

{trained}: {describe_cost(state)}.

```py
import diffusers
import torch

pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained({source}, torch_dtype=torch.bfloat16)
{RESULT["usage"].format(repository)}
pipeline.to("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
size = {{"height": {args.resolution}, "width": {args.resolution}, "max_sequence_length": {args.max_sequence_length}}}
pipeline({prompts[0]!r}, **size).images[0].save("image.png")
```

The base model's [licence]({LICENCE}) holds for these weights.
"""


def sign_card(card):
    """A model card with a hidden last line, by which a later run sees whether a person has changed it."""
    return f"{card}\n<!-- The next run replaces this file unless it was changed: {derive_seed(card)} -->\n"


def write_card(args, parts, repository, state, image_paths):
    """Writes the model card, README.md, with the final images. One that a person wrote or changed is renamed."""
    base = args.pretrained_model_name_or_path
    widget = []
    for number, path in enumerate(image_paths):
        prompt = args.validation_prompt[number // args.num_validation_images]
        widget.append({"text": prompt, "output": {"url": path.name}})
    data = huggingface_hub.ModelCardData(
        license="other",
        license_name="stabilityai-ai-community",
        license_link=LICENCE,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers-training", "diffusers", "sd3", "sd3-diffusers", *RESULT["tags"]],
        base_model=None if Path(base).is_dir() else base,  # the Hub refuses a card whose base is not an id
        instance_prompt=args.instance_prompt,
        widget=widget or None,
    )
    gallery = "<Gallery />\n\n" if widget else ""
    card = f"---\n{data.to_yaml()}\n---\n\n{gallery}{describe_result(args, parts, repository, state)}"
    path = Path(args.output_dir, "README.md")
    if path.is_file():
        present = path.read_text(encoding="utf-8", errors="replace")
        if present != sign_card(present.rpartition("\n<!--")[0]):
            kept = path.rename(path.with_suffix(f".{time.time():.0f}.md"))
            log.warning(f"{path} was written or changed by a person; it is now {kept}")
    path.write_text(sign_card(card), encoding="utf-8")


def open_repository(args, accelerator):
    """Name of the result. With --push_to_hub the id of its repository, which is created now, not after hours."""
    repository = args.hub_model_id or Path(args.output_dir).resolve().name
    if not args.push_to_hub or not accelerator.is_main_process:
        return repository
    remedy = "give --hub_model_id USER/NAME, a token that may write (`hf auth login`, HF_TOKEN), huggingface_hub 1.5"
    with or_refuse(f"--push_to_hub: the repository {repository!r} cannot be created or written: {remedy}"):
        repository = huggingface_hub.create_repo(
            repository, private=args.hub_private_repo or None, exist_ok=True, token=args.hub_token
        ).repo_id
        huggingface_hub.auth_check(repository, write=True, token=args.hub_token)  # create_repo takes any token
    return repository


def publish(args, parts, repository, state, image_paths):
    """Writes the model card and uploads the result, on the main process. Either may fail by itself."""
    with attempt(state.failed, "writing the model card"):
        write_card(args, parts, repository, state, image_paths)
    if args.push_to_hub:
        with attempt(state.failed, "the upload"):
            files = ["README.md", *RESULT["files"], *(path.name for path in image_paths)]
            options = {"allow_patterns": files, "commit_message": "End of training", "token": args.hub_token}
            huggingface_hub.upload_folder(repo_id=repository, folder_path=args.output_dir, **options)


# ---- Training -------------------------------------------------------------------------------------------------------

OUTPUT = ("README.md", "image_*.png", MANIFEST, "validation/*", "checkpoint-*[0-9]/*")  # beside the result
MEMORY_FLAGS = (  # the most effective first
    "gradient_checkpointing cache_latents offload full_bf16 use_8bit_adam fused_backward_pass blocks_to_swap"
    " bnb_quantization_config_path"
).split()
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
WITHOUT_FSDP = (  # it splits one float32 model, and not the sums over all weights that Prodigy needs
    "use_ema train_text_encoder use_8bit_adam prodigy bnb_quantization_config_path blocks_to_swap full_bf16"
    " fused_backward_pass"
).split()


def make_folder(flag, folder):
    """Creates a folder and refuses one that cannot be written to."""
    with or_refuse(f"{flag} {folder!r} cannot be written: give another folder"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def check_output(args):
    """Refuses logs that leave output_dir or get into what is written there, and what is in the way of that."""
    logs = os.path.normpath(Path(args.logging_dir, args.tracker_run_name or "", args.tracker_project_name))
    for pattern in (*RESULT["files"], *OUTPUT):
        name, folder, _ = pattern.partition("/")
        if logs.startswith(("..", os.sep)) or fnmatch.fnmatch(Path(logs).parts[0], name):
            flags = "--logging_dir, --tracker_run_name, --tracker_project_name"
            refuse(f"{flags}: {logs!r} leads out of --output_dir or into the result: give other names")
        for path in Path(args.output_dir).glob(name):
            if path.is_dir() != bool(folder):
                refuse(f"{path} is in the way of what the run writes: take it away or give another --output_dir")


def start_accelerator(args):
    """The accelerator, its trackers not yet started, after creating the folders that the run writes to."""
    make_folder("--output_dir", args.output_dir)
    check_output(args)
    if args.with_prior_preservation:
        make_folder("--class_data_dir", args.class_data_dir)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    if args.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    logs = Path(args.output_dir, args.logging_dir, args.tracker_run_name or "")
    AcceleratorState._reset_state()  # in a notebook the previous run's settings would stay
    with or_refuse(f"accelerate takes no --mixed_precision {args.mixed_precision} with --report_to {args.report_to}"):
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
                utils.InitProcessGroupKwargs(timeout=timedelta(hours=1)),  # the others wait while one process saves
                # The only buffer, a 226 MB table of positions, never changes. Views avoid a copy of the gradients.
                utils.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    if accelerator.device.type == "cpu":
        PartialState().device = torch.device("cpu")  # libraries take "cpu:0" of several processes for a GPU
        AcceleratorState()  # takes it over
        if accelerator.mixed_precision == "fp16":
            refuse("--mixed_precision fp16 needs a GPU: on a CPU take bf16 or no")
    if is_split(accelerator):
        check_fsdp(args, accelerator.state.fsdp_plugin)
    check_optimizer(args, accelerator)
    return accelerator


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
        plugin.mixed_precision_policy = replace(policy, cast_forward_inputs=False)


def claim_folder(args, accelerator, cleanup):
    """Locks output_dir until the run ends and removes what a killed run has left; a dry run does without."""
    if args.dry_run or not accelerator.is_main_process:
        return
    folder = Path(args.output_dir)
    lock = FileLock(folder / ".lock")
    cleanup.callback(lock.release)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        refuse(f"--output_dir {args.output_dir!r} is in use by another run: give another folder")
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        log.warning(f"{folder} cannot be locked, so see to it that no other run writes to it ({error})")
    for left in folder.glob(".checkpoint-*.partial"):
        remove(left)


def start_trackers(args, accelerator, facts):
    """Starts the trackers, with what describes the run as its configuration."""
    config = {name: value for name, value in facts.items() if value is not None}
    options = {"wandb": {"dir": str(Path(args.output_dir, args.logging_dir)), "name": args.tracker_run_name}}
    with or_refuse(f"--report_to {args.report_to}: could not start a tracker; fix it or drop it from --report_to"):
        accelerator.init_trackers(args.tracker_project_name, config, options)
        absent = {*split_names(args.report_to)} - {"all", "none", *(tracker.name for tracker in accelerator.trackers)}
        if absent and accelerator.is_main_process:  # accelerate passes over them
            raise ModuleNotFoundError(f"pip install {' '.join(absent)}")


def catch_signals(cleanup):
    """Signals that have come, {number: time}; after two seconds another one ends the process. Those that are ignored
    (nohup) stay so, but for SIGUSR1: a launcher that it would end is started with it ignored."""
    caught = {}

    def catch(number, frame):
        now = time.monotonic()
        if caught and now - min(caught.values()) > 2:  # launchers pass on what all processes get once more
            os._exit(128 + number)
        if not caught:
            name = signal.Signals(number).name
            print(f"\n{name}: the run saves what it has trained and ends; a second ends it at once", file=sys.stderr)
        caught.setdefault(number, now)

    with suppress(ValueError):  # outside the main thread Python cannot catch signals
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
        prompts.update(*images.prompts["instance"])
    if args.caption_dropout or args.validation_prompt:
        prompts.add("")
    return sorted(prompts)


def encode_images(args, parts, accelerator, embed, dataset, held_out):
    """What is frozen. The VAE encodes the images here that are always seen in the same crop."""
    vae = load_part(parts, "vae", **on_device(accelerator, torch.float32))
    vae.enable_slicing()  # image by image: 2.5 GiB at 1024 px, whatever the batch
    args.cache_latents |= bool(dataset) and dataset.has_fixed_crops()  # the same latents, for less
    for images in filter(None, (dataset if args.cache_latents else None, held_out)):
        cache_moments(images, vae, accelerator)
    if args.cache_latents:
        vae.to("cpu")
    free_memory()  # of the text encoders too
    return Frozen(embed, vae, load_scheduler(args, parts, accelerator), held_out)


def make_loader(args, accelerator, dataset):
    """This process's batches, on the device; the list of all, to be filled each epoch; updates an epoch and in all."""
    batches = Batches(order_epoch(args, dataset, accelerator.num_processes, 0))
    workers = {"num_workers": args.dataloader_num_workers, "persistent_workers": args.dataloader_num_workers > 0}
    workers |= {"worker_init_fn": ignore_signals, "pin_memory": accelerator.device.type == "cuda"}
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **workers)
    updates = len(batches) // (accelerator.num_processes * args.gradient_accumulation_steps)
    total = args.max_train_steps or args.num_train_epochs * updates
    return accelerator.prepare(loader), batches, updates, total


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
        models["transformer"].enable_gradient_checkpointing()
        for name in models.keys() - {"transformer"}:
            models[name].gradient_checkpointing_enable()
    optimizer = make_optimizer(args, accelerator, models)
    schedule = make_schedule(args, optimizer, total)
    weights = models["transformer"].state_dict()
    *wrapped, optimizer, schedule = accelerator.prepare(*models.values(), optimizer, schedule)
    if is_split(accelerator):
        hand_out(accelerator, wrapped[0], weights)
    parameters = sum(map(trained_parameters, wrapped), [])
    average = None
    if args.use_ema:
        average = EMAModel([parameter.float() for parameter in parameters], decay=args.ema_decay, foreach=True)
    return Trained(dict(zip(models, wrapped, strict=True)), parameters, optimizer, schedule, average)


def check_finite(accelerator, state, figures):
    """Whether loss and gradient are finite. Counts updates that are not, and ends the run after ten in a row."""
    finite_loss = math.isfinite(figures["loss"])
    if finite_loss and math.isfinite(figures["grad_norm"]):
        return True
    if finite_loss and accelerator.scaler and accelerator.scaler.get_scale() > 1:
        return False  # float16 gradients overflow now and then, until the scale is low enough
    state.skipped.append(state.step)
    figures["skipped_updates"] = len(state.skipped)
    log.warning(f"skipping update {state.step}: loss or gradient is not finite: {figures}")
    if state.skipped[-10:-9] == [state.step - 9]:
        sys.exit("ten updates in a row were not finite: lower the rate and resume from the last checkpoint")
    return False


def peak_memory_gb(device):
    """The most memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def log_figures(accelerator, state, figures):
    """Sends figures to the trackers. They are dropped if one fails: logs are not worth the weights."""
    with attempt(state.failed, "logging"):
        accelerator.log(figures, step=state.step)
        return
    accelerator.trackers.clear()


def update_weights(args, accelerator, trained, seen, state):
    """Updates the weights, unless loss or gradient is not finite. `seen` has the losses (B,) of each batch. AdamW
    decides that on the device, and the host reads the figures one update late, so that neither waits."""
    norm = clip_gradient(args, accelerator, trained)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # FSDP2: each process has a part of it
    figures = mean_losses(args, torch.stack(seen).mean(0)) | {"grad_norm": norm}
    seen.clear()
    row = accelerator.reduce(torch.stack([*figures.values()]), "mean")
    optimizer = trained.optimizer.optimizer
    fused = optimizer.defaults.get("fused")
    if not fused:
        row = row.cpu()  # the host waits, and decides
    finite = row.isfinite().all()
    if fused:
        optimizer.found_inf = 1 - finite.float()  # AdamW's kernel then leaves all as it is
    if fused or accelerator.scaler or finite:
        trained.optimizer.step()
    trained.optimizer.zero_grad()
    state.step += 1
    state.unread = figures, row, time.perf_counter() - state.clock


def finish_update(accelerator, trained, state):
    """What follows an update on the host: the schedule and the average if it was finite, and its log point. It has to
    come before the next backward pass, which can be an update itself, and before the weights are used."""
    if state.unread:
        names, row, seconds = state.unread
        state.unread = None
        figures = dict(zip(names, row.tolist(), strict=True)) | {"seconds_per_update": seconds}
        if check_finite(accelerator, state, figures):
            trained.schedule.step()
            if trained.average:
                trained.average.step(trained.parameters)
        log_update(accelerator, trained.optimizer, figures, state)


def log_update(accelerator, optimizer, figures, state):
    """One log point of an update, and the bar's figures."""
    for group in optimizer.param_groups:
        figures[f"lr_{group['name']}".removesuffix("_transformer")] = group["lr"]
    figures["memory_gb"] = peak_memory_gb(accelerator.device)
    state.history.append(figures)
    figures["loss_average"] = float(np.ma.masked_invalid([past["loss"] for past in state.history[-100:]]).mean())
    log_figures(accelerator, state, figures)
    shown = ("loss", "loss_average", "lr", "seconds_per_update", "memory_gb")
    state.bar.set_postfix({name: figures[name] for name in shown}, refresh=False)
    state.bar.update()


def save_result(args, accelerator, trained, state, parts):
    """Writes the final weights, then a manifest. Where it cannot, it tries every minute until a signal comes."""
    finish_update(accelerator, trained, state)
    while not state.finished:
        failed = []
        with evaluation(trained):
            states = read_states(accelerator, trained.models)
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
    reasons = [f"{what} failed" for what in state.failed]
    if len(state.skipped) * 10 > state.total:
        reasons.append(f"{len(state.skipped)} of {state.total} updates were skipped, not being finite: lower the rate")
    if stop:
        way = "makes what is missing" if state.finished else "goes on"
        name = signal.Signals(stop).name
        reasons.append(f"{name} came at update {state.step}: --resume_from_checkpoint latest {way}")
    if not reasons:
        log.info(f"The result is in {args.output_dir}: {describe_cost(state)}")
        return
    if accelerator.is_main_process:
        print(f"\nwhat was trained is saved in {args.output_dir}, but {'; '.join(reasons)}", file=sys.stderr)
    sys.exit(128 + stop if stop else 1)


@contextmanager
def name_memory_flags(args):
    """Ends a run for which the GPU has too little memory with the flags that lower its need."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        unused = [f"--{flag}" for flag in MEMORY_FLAGS if not vars(args).get(flag, True)]
        sys.exit(f"out of GPU memory: add {', '.join(unused)}, or lower --train_batch_size ({error})")


def choose_seed(args, manifest):
    """Without --seed: that of the checkpoint, or a random one, the same on all processes."""
    drawn = utils.broadcast_object_list([secrets.randbits(32)])[0]
    if args.seed is None:
        args.seed = manifest.get("seed", drawn)


def main(args):
    """Runs training from start to result."""
    accelerator = start_accelerator(args)
    with ExitStack() as cleanup, name_memory_flags(args):
        # The run's own folder, the base model, the layers to train, and the checkpoint to resume, if any.
        claim_folder(args, accelerator, cleanup)
        parts = read_pipeline(args)
        checkpoint, manifest = find_checkpoint(args)
        finished = checkpoint == Path(args.output_dir)  # then only images, card and upload are made
        targets = choose_targets(args, parts, accelerator, checkpoint)
        choose_seed(args, manifest)

        # The data. Everything is checked before anything is created, drawn or loaded. A dry run ends here.
        dataset = read_instances(args)
        held_out = read_held_out(args)
        facts = describe_run(args, accelerator)
        compare_runs(accelerator, checkpoint, manifest, facts)
        embed = PromptTable(args, parts, accelerator, list_prompts(args, None if finished else dataset, held_out))
        if args.dry_run:
            log.info("dry run: a run with these flags would now start")
            return
        repository = open_repository(args, accelerator)
        start_trackers(args, accelerator, facts)
        if args.with_prior_preservation and not finished:
            add_class_images(args, parts, accelerator, dataset)
        loader, batches, updates, total = make_loader(args, accelerator, dataset)

        # Frozen models encode what training does not change, and are freed one by one. Then what is trained is loaded.
        embed.fill(parts, accelerator, frozen_dtype(accelerator), targets)
        frozen = encode_images(args, parts, accelerator, embed, None if finished else dataset, held_out)
        models = load_trained(args, parts, accelerator, targets, checkpoint)
        trained = prepare_models(args, accelerator, models, total)
        embed.trained = trained.models  # text encoders that are trained are called, not looked up
        state = Progress(facts, catch_signals(cleanup), manifest.get("step", 0), total, finished)
        cleanup.enter_context(rescue(args, accelerator, trained, state))
        resume(accelerator, checkpoint, trained, state)

        state.bar = tqdm(total=total, initial=state.step, desc="Training")
        seen = []
        first = max(state.step - 1, 0) // updates  # step - 1: its epoch's validation may be due
        for epoch in range(first, math.ceil(total / updates)):
            batches[:] = order_epoch(args, dataset, accelerator.num_processes, epoch, state.step - epoch * updates)
            state.clock = time.perf_counter()
            for batch in loader:
                if state.step >= total or batch is None:  # accelerate 1.3 makes None of an empty epoch
                    break
                data, prompts, seeds = batch
                with accelerator.accumulate(*trained.models.values()):
                    torch.manual_seed(derive_seed(args.seed, "dropout", *seeds))
                    moments = data if args.cache_latents else encode_moments(frozen.vae, data)
                    drawn = draw_latents(args, frozen.vae.config, moments, seeds, accelerator.device)
                    losses = batch_losses(args, accelerator, trained.models, frozen, prompts, drawn)
                    finish_update(accelerator, trained, state)  # the one before, while the device is at this one
                    accelerator.backward(mean_losses(args, losses)["loss"])
                    seen.append(losses.detach())
                if not accelerator.sync_gradients:
                    continue

                update_weights(args, accelerator, trained, seen, state)
                stop = read_signal(accelerator, state.caught)
                if stop or state.step % args.checkpointing_steps == 0:
                    save_checkpoint(args, accelerator, trained, state)
                if stop:
                    end_training(accelerator, state)
                    report_end(args, accelerator, state, stop)
                state.clock = time.perf_counter()

            if epoch % args.validation_epochs == 0 and state.step < total:
                validate(args, accelerator, trained, frozen, state)

        # The weights are saved first: whatever fails after this cannot lose them.
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
