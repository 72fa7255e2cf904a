#!/usr/bin/env python
"""The demo: teaches the small pipeline one dog, without and with prior preservation, and draws before and after.

    make demo
    python demo/run.py --all    # also the runs that only the table in the README shows

Two runs of train_dreambooth_lora_sd3.py through accelerate, with demo/subject as the pictures, then
demo/out/before_after.png: a row a prompt; the base model, LoRA, and LoRA with prior preservation from left to right.

Prior preservation goes with training of the text encoders here: the small model has learned that the word "sks" means
nothing, and with its encoders as they are, the pictures of other dogs would keep the subject from being learned.
"""

import argparse
import subprocess
import sys
import time

from evaluate import BASE, HERE, TOKENS, draw, load_pipeline
from PIL import Image, ImageDraw, ImageFont

OUT = HERE / "out"
PROMPTS = [
    "a photo of sks dog on the beach",
    "a photo of sks dog in the snow",
    "a photo of sks dog in a room",
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
    "--lr_warmup_steps": 0,
    "--train_batch_size": 5,
    "--seed": 0,
}
CLASS_PROMPT, CLASS_IMAGES = "a photo of a dog", 48
LORA = {"--rank": 16, "--learning_rate": 2e-3, "--max_train_steps": 60}
FULL = {"--learning_rate": 5e-4, "--max_train_steps": 100}
PRIOR = {
    "--with_prior_preservation": None,
    "--class_data_dir": OUT / "class",
    "--class_prompt": CLASS_PROMPT,
    "--num_class_images": CLASS_IMAGES,
}
ENCODERS = {"--train_text_encoder": None, "--text_encoder_lr": 1e-3}
LONG = {"--learning_rate": 1e-3, "--max_train_steps": 250}
RUNS = {  # of the table alone
    "lora-prior": LORA | PRIOR | LONG,
    "lora-encoders": LORA | ENCODERS,
    "full": FULL,
    "full-prior": FULL | PRIOR | LONG,
}
LOOK = {"--validation_prompt": "a photo of sks dog in the snow", "--num_validation_images": 4}


def train(name, flags):
    """Runs a script by `accelerate launch`, as one would type it. Returns output_dir."""
    pairs = (FLAGS | flags | {"--output_dir": OUT / name}).items()
    words = [str(word) for pair in pairs for word in pair if word is not None]
    script = "train_dreambooth_sd3.py" if name.startswith("full") else "train_dreambooth_lora_sd3.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(HERE.parent / script)]
    subprocess.run([*launch, *words], check=True)
    return OUT / name


def draw_class_images():
    """Pictures of the class by the base model, at the guidance that suits it; the scripts would draw them at 7."""
    folder = PRIOR["--class_data_dir"]
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(draw(load_pipeline(), [CLASS_PROMPT] * CLASS_IMAGES, seed=500)):
        image.save(folder / f"{number}.png")


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="Also run what the table in the README measures.")
    args, start = parser.parse_args(), time.monotonic()
    draw_class_images()
    plain = train("lora", LORA | LOOK)
    prior = train("lora-encoders-prior", LORA | PRIOR | ENCODERS | LONG | LOOK)
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
    for name, flags in RUNS.items() if args.all else ():
        train(name, flags)


if __name__ == "__main__":
    main()
