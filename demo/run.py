#!/usr/bin/env python
"""The demo: teaches the small pipeline one dog, without and with prior preservation, and draws before and after.

    make demo

Two runs of train_dreambooth_lora_sd3.py through accelerate, with demo/subject as the pictures, then
demo/out/before_after.png: a row a prompt; the base model, LoRA, and LoRA with prior preservation from left to right.
"""

import subprocess
import sys
import time
from pathlib import Path

from evaluate import BASE, HERE, TOKENS, draw, load_pipeline
from PIL import Image, ImageDraw, ImageFont

OUT = HERE / "out"
PROMPTS = [
    "a photo of sks dog on the beach",
    "a photo of sks dog in the snow",
    "a photo of sks dog at night",
    "a photo of a dog",
    "a photo of a brown dog on the beach",
    "a photo of a car",
]
FLAGS = {
    "--pretrained_model_name_or_path": BASE,
    "--instance_data_dir": HERE / "subject",
    "--instance_prompt": "a photo of sks dog",
    "--resolution": 64,
    "--max_sequence_length": TOKENS,
    "--rank": 16,
    "--learning_rate": 2e-3,
    "--lr_warmup_steps": 0,
    "--train_batch_size": 5,
    "--max_train_steps": 100,
    "--seed": 0,
}
PRIOR = {"--class_data_dir": OUT / "class", "--class_prompt": "a photo of a dog", "--num_class_images": 40}
LOOK = {"--validation_prompt": "a photo of sks dog in the snow", "--num_validation_images": 4}


def train(script, output, flags, *switches):
    """Runs a script by `accelerate launch`, as one would type it. Returns output_dir."""
    words = [str(word) for pair in (FLAGS | flags | {"--output_dir": output}).items() for word in pair]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(HERE.parent / script)]
    subprocess.run([*launch, *words, *switches], check=True)
    return Path(output)


def sheet(rows, columns, cell=2 * 64):
    """A picture with a row of images for each (prompt, images), and the columns' names above."""
    font, left, top = ImageFont.load_default(15), 8, 30
    page = Image.new("RGB", (left + 3 * cell * len(columns), top + (cell + 26) * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for column, name in enumerate(columns):
        pen.text((left + 3 * cell * column, 6), name, "black", font)
    for row, (prompt, groups) in enumerate(rows):
        y = top + (cell + 26) * row
        pen.text((left, y), prompt, "black", font)
        for column, images in enumerate(groups):
            for number, image in enumerate(images):
                x = left + 3 * cell * column + number * (cell + 2)
                page.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (x, y + 20))
    return page


def main():
    start = time.monotonic()
    script = "train_dreambooth_lora_sd3.py"
    plain = train(script, OUT / "lora", LOOK)
    prior = train(script, OUT / "lora-prior", LOOK | PRIOR, "--with_prior_preservation")
    runs = {"before": BASE, "LoRA": plain, "LoRA with prior preservation": prior}
    columns = []
    for folder in runs.values():
        pipeline = load_pipeline(folder)
        images = draw(pipeline, [prompt for prompt in PROMPTS for _ in range(2)], seed=7)
        columns.append([images[first : first + 2] for first in range(0, len(images), 2)])
    page = sheet([(prompt, groups) for prompt, *groups in zip(PROMPTS, *columns, strict=True)], list(runs))
    page.save(OUT / "before_after.png")
    print(f"\nValidation images: {plain}/image_*.png and {prior}/image_*.png")
    print(f"Before and after, drawn in {time.monotonic() - start:.0f} s: {OUT / 'before_after.png'}")


if __name__ == "__main__":
    main()
