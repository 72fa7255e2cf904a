#!/usr/bin/env python
"""The demo: teaches the small pipeline one dog, without and with prior preservation, and draws before and after.

    make demo
    .venv/bin/python demo/run.py --all --seeds 0,1,2    # every row of the README's table, each from three seeds

Two runs of train_dreambooth_lora_sd3.py through accelerate, with the five pictures in demo/subject, then a page of
three prompts, demo/out/before_after.png, each drawn from seed 0 by the pipeline as it was, by LoRA, and by LoRA with
prior preservation. With --all also demo/out/all.png, of twelve prompts, and two tables, in demo/out/table.md as well,
where each row is written as soon as its runs are measured.
"""

import argparse
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

QUIET = {  # what libraries say while they load concerns nobody here
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}
NOISE = ("Failed to load CPU gemm_4bit_forward",)  # of bitsandbytes, wherever it is installed, on some processors
os.environ |= QUIET  # before the libraries are imported; the runs inherit it
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import world  # noqa: E402
from evaluate import BASE, HERE, TOKENS, draw, load_pipeline, measure_style, subject_pictures, table_rows  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

OUT = HERE / "out"
TITLE = "A toy SD3 of 64 pixels, trained from nothing on a drawn world, is taught one dog"
SHOWN = {  # the page's prompts, and what is hoped for
    "sks dog on the beach": "the dog of the photos,\nwhere it never was",
    "a dog in the snow": "any other dog,\nas the base draws it",
    "a red car at night": "any other thing,\nas the base draws it",
}
PLACES = "on the beach", "in the snow", "at night", "on the road", "in the forest", "in the desert"
OTHERS = "a dog in the snow", "a brown dog on the beach", "dov dog in a room"
OTHERS += "a red car at night", "a yellow cat in the grass", "a blue cup in the desert"
FLAGS = {
    "--pretrained_model_name_or_path": BASE,
    "--instance_data_dir": HERE / "subject",
    "--instance_prompt": "a photo of sks dog",
    "--resolution": 64,
    "--max_sequence_length": TOKENS,
    "--lr_warmup_steps": 0,
    "--train_batch_size": 5,
}
CLASS_PROMPT, CLASS_IMAGES = "a photo of a dog", 48
LORA = {"--rank": 16, "--learning_rate": 2e-3, "--max_train_steps": 200}
FULL = {"--learning_rate": 5e-4, "--max_train_steps": 150}
PRIOR = {
    "--with_prior_preservation": None,
    "--class_data_dir": OUT / "class",
    "--class_prompt": CLASS_PROMPT,
    "--num_class_images": CLASS_IMAGES,
}
OUTPUT = {"--class_prompt": CLASS_PROMPT, "--output_preservation_weight": 1.0}
CUT_OUT = {"--instance_data_dir": OUT / "cut-outs"}
UNIFORM = {"--weighting_scheme": "none", "--training_shift": 1}
STYLE = {"--instance_data_dir": HERE / "style", "--train_batch_size": 8, "--learning_rate": 1e-3}
STYLE |= {"--max_train_steps": 100}
FRIENDLY = {"--weighting_scheme": "logit_normal", "--logit_mean": -3, "--training_shift": 1}
RUNS = {  # rows of the table; the first two are the demo
    "LoRA": LORA,
    "LoRA with prior preservation": LORA | PRIOR,
    "LoRA with output preservation": LORA | OUTPUT,
    "LoRA, recipe for a subject": LORA | UNIFORM,
    "LoRA, rank 4": LORA | {"--rank": 4},
    "LoRA, rank 4, recipe for a subject": LORA | {"--rank": 4} | UNIFORM,
    "full": FULL,
    "full with prior preservation": FULL | PRIOR,
    "LoRA, cut out": LORA | CUT_OUT,
    "LoRA, cut out, alpha mask": LORA | CUT_OUT | {"--alpha_mask": None},
}
STYLES = {  # rows of the table for a style
    "LoRA, rank 32": STYLE | {"--rank": 32},
    "LoRA, rank 32, recipe for a style": STYLE | FRIENDLY | {"--rank": 32},
    "LoRA, rank 4, recipe for a style": STYLE | FRIENDLY | {"--rank": 4},
}


def folder_of(name, seed):
    kind = "style-" if name in STYLES else ""
    return OUT / f"{kind}{name.replace(',', '').replace(' ', '-').lower()}-{seed}"


def train(name, seed):
    """Runs a script by `accelerate launch`, as one would type it. Returns output_dir."""
    folder = folder_of(name, seed)
    shutil.rmtree(folder, ignore_errors=True)  # of a demo before, perhaps interrupted
    how = (RUNS | STYLES)[name]
    pairs = (FLAGS | how | {"--seed": seed, "--output_dir": folder}).items()
    words = [str(word) for pair in pairs for word in pair if word is not None]
    script = "train_dreambooth_sd3.py" if name.startswith("full") else "train_dreambooth_lora_sd3.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(HERE.parent / script)]
    print(f"\n{name}: {script}, {how['--max_train_steps']} updates", flush=True)
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // 2, 1))}  # two runs at a time
    with subprocess.Popen([*launch, *words], stderr=subprocess.PIPE, env=os.environ | threads) as run:
        for line in io.TextIOWrapper(run.stderr, newline=""):  # ends at a return too, as a progress bar's does
            if not line.startswith(NOISE):
                print(line, end="", file=sys.stderr, flush=True)
    if run.returncode:
        sys.exit(f"{script} ended with {run.returncode}")
    return folder


def train_two(names, seeds):
    """Trains each of the names from each of the seeds, two at a time: {name: [output_dir, ...]}."""
    with ThreadPoolExecutor(2) as pool:
        runs = {name: [pool.submit(train, name, seed) for seed in seeds] for name in names}
    return {name: [run.result() for run in started] for name, started in runs.items()}


def draw_class_images():
    """Pictures of the class by the pipeline as it is, for prior preservation, at the guidance of the demo."""
    folder = PRIOR["--class_data_dir"]
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(draw(load_pipeline(), [CLASS_PROMPT] * CLASS_IMAGES, seed=500)):
        image.save(folder / f"{number}.png")


def draw_cut_outs():
    """The subject's pictures with all but the subject transparent, which without --alpha_mask is learned as white."""
    folder = CUT_OUT["--instance_data_dir"]
    folder.mkdir(parents=True, exist_ok=True)
    for number, place in enumerate(world.SUBJECT_AT):
        world.subject_picture(place, number, cut_out=True).save(folder / f"{number}.png")


def block(columns, rows, cell=160, left=132):
    """A text above each column, and below them a row of images for each {name: images}."""
    font, top = ImageFont.load_default(15), 44
    part = Image.new("RGB", (left + 6 * cell, top + cell * len(rows)), "white")
    pen = ImageDraw.Draw(part)
    for column, text in enumerate(columns):
        pen.text((left + cell * column, 4), text, "black", font)
    for row, (name, images) in enumerate(rows.items()):
        pen.text(
            (6, top + cell * row + cell // 3),
            name.replace(" with ", "\nwith ").replace("prior ", "prior\n"),
            "black",
            font,
        )
        for column, image in enumerate(images):
            large = image.resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
            part.paste(large, (left + cell * column, top + cell * row))
    return part


def label(pen, place, text, colour="black", size=15):
    pen.multiline_text(place, text, colour, ImageFont.load_default(size), spacing=3)


def draw_page(pipelines, cell=164, left=176, step=208, top=56):
    """The page of before and after: a row for each of SHOWN, a photo and a column for each of {name: folder}."""
    loaded = {name: load_pipeline(folder) for name, folder in pipelines.items()}
    page = Image.new("RGB", (left + step * (1 + len(loaded)), top + (cell + 4) * len(SHOWN)), "white")
    pen = ImageDraw.Draw(page)
    label(pen, (6, 6), TITLE, size=17)
    for column, name in enumerate([f"photos ({len(SHOWN)} of 5)", *loaded]):
        label(pen, (left + step * column, 34), name)
    for row, (prompt, hope) in enumerate(SHOWN.items()):
        images = [subject_pictures()[row]]
        images += [draw(pipeline, [f"a photo of {prompt}"], seed=0)[0] for pipeline in loaded.values()]
        label(pen, (6, top + (cell + 4) * row + 44), f'"{prompt}"')
        label(pen, (6, top + (cell + 4) * row + 72), hope, "dimgray", 14)
        for column, image in enumerate(images):
            large = image.resize((cell, cell), Image.Resampling.LANCZOS)
            page.paste(large, (left + step * column, top + (cell + 4) * row))
    page.save(OUT / "before_after.png")


def draw_all(pipelines):
    """A page of all that was looked at: the five photos, and twelve prompts by each of {name: folder}."""
    prompts, drawn = [*(f"sks dog {place}" for place in PLACES), *OTHERS], {}
    for name, folder in pipelines.items():
        drawn[name] = draw(load_pipeline(folder), [f"a photo of {prompt}" for prompt in prompts], seed=3)
    texts = [re.sub(r" (on|in|at) ", r"\n\1 ", prompt) for prompt in prompts]
    parts = [block(["five pictures to learn from"], {"sks dog": subject_pictures()})]
    parts += [
        block(texts[half], {name: images[half] for name, images in drawn.items()}) for half in (slice(6), slice(6, 12))
    ]
    page = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), "white")
    for number, part in enumerate(parts):
        page.paste(part, (0, sum(above.height for above in parts[:number])))
    page.save(OUT / "all.png")


def write_table(runs, *measure):
    """Adds a table to demo/out/table.md, and prints it, a line at a time."""
    with (OUT / "table.md").open("a") as table:
        for line in table_rows(runs, *measure):
            print(line, file=table, flush=True)
            print(line, flush=True)
        print(file=table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="Train and measure every row of the README's table.")
    parser.add_argument("--seeds", default="0", metavar="0,1,2", help="Seeds of the runs; the page shows the first's.")
    args, start = parser.parse_args(), time.monotonic()
    seeds, shown = args.seeds.split(","), list(RUNS)[:2]
    print("Drawing class images, for prior preservation", flush=True)
    draw_class_images()
    draw_cut_outs()
    folders = train_two(shown, seeds)
    print("\nDrawing before and after", flush=True)
    pipelines = {"base": BASE} | {name: folders[name][0] for name in shown}
    draw_page(pipelines)
    if args.all:
        draw_all(pipelines)
        more = ((name, [train(name, seed) for seed in seeds]) for name in RUNS if name not in shown)
        styles = ((name, [train(name, seed) for seed in seeds]) for name in STYLES)
        (OUT / "table.md").unlink(missing_ok=True)
        write_table(chain(folders.items(), more))
        write_table(styles, measure_style)
    print(f"\nDone in {time.monotonic() - start:.0f} s. Before and after: {OUT / 'before_after.png'}")
    print(f"The adapters: {' and '.join(str(folders[name][0]) for name in shown)}")


if __name__ == "__main__":
    main()
