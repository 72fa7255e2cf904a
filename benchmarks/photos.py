#!/usr/bin/env python
"""Times how photos of 12 megapixels become the pixels of a batch: decoded, scaled and cropped, in each epoch.

    OMP_NUM_THREADS=1 python benchmarks/photos.py --resolution 512 1024

The photos are JPEGs of 4000 x 3000 pixels, with noise as a camera has it. A run reads each once before it starts, to
find what is damaged; what is scaled then stays in memory while there is room, and the second row of a resolution shows
a set for which there is none. Times are the processor's, of one thread, in ms an image.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from accelerate import PartialState
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from checkpoints import build_checkpoint  # noqa: E402

import train_dreambooth_lora_sd3 as script  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, nargs="+", default=[512, 1024], help="Side of the crop in pixels.")
    parser.add_argument("--count", type=int, default=8, help="Photos.")
    return parser.parse_args(argv)


def take_photos(folder, count):
    """Writes JPEGs of soft shapes with grain, some 4 MB each."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        grain = generator.integers(-8, 9, (3000, 4000, 1), dtype=np.int16)
        pixels = np.asarray(small.resize((4000, 3000), Image.Resampling.BICUBIC)) + grain
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=92)


def measure(args, room):
    """Milliseconds an image: of the first reading, and of three epochs, with `room` bytes for scaled images."""
    script.KEPT_BYTES, times = room, []
    for epoch in range(-1, 3):
        start = time.process_time()
        if epoch < 0:
            dataset = script.read_instances(args)
        else:
            for index in range(len(dataset)):
                dataset[epoch, index, 0]
        times.append((time.process_time() - start) * 1000 / len(dataset))
    return times


def main(args):
    with tempfile.TemporaryDirectory(prefix="photos-") as work:
        take_photos(Path(work, "photos"), args.count)
        flags = ["--pretrained_model_name_or_path", build_checkpoint(Path(work, "model"), "tiny"), "--random_flip"]
        flags += ["--instance_data_dir", Path(work, "photos"), "--instance_prompt", "sks", "--seed", 0]
        PartialState()  # of the scripts' log
        print("| px | scaled images | before the run | epoch 1 | epoch 2 | epoch 3 |\n|---|---|---|---|---|---|")
        kept = script.KEPT_BYTES
        for resolution in args.resolution:
            parsed = script.parse_args([str(word) for word in [*flags, "--resolution", resolution]])
            for room in (kept, 0):
                row = " | ".join(f"{value:.1f}" for value in measure(parsed, room))
                print(f"| {resolution} | {'in memory' if room else 'no room'} | {row} |", flush=True)


if __name__ == "__main__":
    main(parse_args())
