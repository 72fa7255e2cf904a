"""The few operations of torchvision that diffusers' SD3 scripts use, where no build of it fits the installed torch.

`install()` adds them to sys.modules, unless torchvision is installed. As a program it runs a script with them:

    python benchmarks/torchvision_stand_in.py SCRIPT FLAGS
"""

import importlib.util
import random
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image


class Resize:
    """Scales the short side to a length."""

    def __init__(self, size, interpolation=None):
        self.size = size

    def __call__(self, image):
        short = min(image.size)
        return image.resize([self.size * side // short for side in image.size], Image.Resampling.BILINEAR)


class RandomCrop:
    """Cuts out a square at a random place."""

    def __init__(self, size):
        self.size = size

    @staticmethod
    def get_params(image, size):
        height, width = size
        return random.randint(0, image.height - height), random.randint(0, image.width - width), height, width

    def __call__(self, image):
        return crop(image, *self.get_params(image, (self.size, self.size)))


class CenterCrop(RandomCrop):
    """Cuts out a square from the middle."""

    @staticmethod
    def get_params(image, size):
        height, width = size
        return round((image.height - height) / 2), round((image.width - width) / 2), height, width


class RandomHorizontalFlip:
    """Mirrors an image with a probability."""

    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < self.p else image


class ToTensor:
    """Pixels (3, H, W) in [0, 1]."""

    def __call__(self, image):
        return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)


class Normalize:
    """Subtracts a mean from pixels and divides by a deviation, one number each."""

    def __init__(self, mean, std):
        self.mean, self.std = mean[0], std[0]

    def __call__(self, pixels):
        return (pixels - self.mean) / self.std


class Compose:
    """One operation after another."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, value):
        for step in self.steps:
            value = step(value)
        return value


def crop(image, top, left, height, width):
    return image.crop((left, top, left + width, top + height))


def install():
    if importlib.util.find_spec("torchvision"):
        return
    # The libraries must see first that torchvision is missing: they would ask for more than this has.
    import diffusers.image_processor
    import diffusers.utils.import_utils
    import transformers.image_utils
    import transformers.utils.import_utils

    for library in (diffusers, transformers):
        for name in ("is_torchvision_available", "is_torchvision_v2_available"):
            getattr(library.utils.import_utils, name, bool)()
    names = (Resize, RandomCrop, CenterCrop, RandomHorizontalFlip, ToTensor, Normalize, Compose)
    modules = [
        importlib.util.module_from_spec(ModuleSpec(f"torchvision{part}", None))
        for part in ("", ".transforms", ".transforms.functional")
    ]
    root, transforms, functional = modules
    root.transforms, transforms.functional, functional.crop = transforms, functional, crop
    vars(transforms).update({name.__name__: name for name in names})
    transforms.InterpolationMode = SimpleNamespace(BILINEAR="bilinear")
    sys.modules |= {module.__name__: module for module in modules}


if __name__ == "__main__":
    install()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
