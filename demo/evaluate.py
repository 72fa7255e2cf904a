#!/usr/bin/env python
"""Measures what DreamBooth did to the demo's pipeline: does it draw the subject, and everything else as before?

    python demo/evaluate.py NAME=FOLDER[,FOLDER...] ...

A folder is the output_dir of a run: adapters, or a whole pipeline. Each name gets a row of a markdown table, the mean
of its folders, below the row of the base model. Every column is a share of drawn pictures in percent; more is better.

subject shown           "a photo of sks dog ..." shows a dog with turquoise ears and a magenta scarf
place right             and it is where the prompt says
other dogs unchanged    "a photo of a dog ...", "a brown dog", "zib dog": a dog in the right place and colour, and
                        nothing is magenta
other things right      other things have the right thing, colour and place, in combinations never trained on

Everything is drawn from fixed seeds. demo/classifier.py judges thing, colour and place; magenta and turquoise pixels
are counted.
"""

import argparse
import random
from pathlib import Path

import torch
import world
from classifier import load_classifier, pixels_of
from diffusers import StableDiffusion3Pipeline
from diffusers.utils.logging import disable_progress_bar
from PIL import Image

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny-sd3"
DOGS = [name for name, looks in world.NAMED.items() if looks["thing"] == "dog"]
STEPS, GUIDANCE, TOKENS = 28, 4.0, 12
MAGENTA, TURQUOISE = (216, 244), (116, 140)  # hues of 256, around those of scarf (230) and ears (128)


def load_pipeline(folder=BASE, base=None):
    """The base pipeline, a run's whole pipeline, or the base with a run's adapters, in float32."""
    disable_progress_bar()  # of loading
    whole = Path(folder, "model_index.json").is_file()
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder if whole else base or BASE, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if not whole:
        pipeline.load_lora_weights(str(folder))
    return pipeline


def draw(pipeline, prompts, seed=0, guidance=GUIDANCE):
    """A picture for each prompt, the i-th from seed + i."""
    images = []
    for first in range(0, len(prompts), 16):
        batch = prompts[first : first + 16]
        images += pipeline(
            batch,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            height=world.SIDE,
            width=world.SIDE,
            max_sequence_length=TOKENS,
            generator=[torch.Generator().manual_seed(seed + first + number) for number in range(len(batch))],
        ).images
    return images


def shows(picture, hues, least=24):
    """Whether at least `least` pixels, neither pale nor dark, have a hue within the two bounds (of 256)."""
    bands = [bytearray(band.tobytes()) for band in picture.convert("HSV").split()]
    shown = [hue for hue, saturation, value in zip(*bands, strict=True) if saturation > 120 and value > 120]
    return sum(hues[0] <= hue <= hues[1] for hue in shown) >= least


def shows_subject(picture):
    """Whether a picture has the magenta of the subject's scarf and the turquoise of its ears."""
    return shows(picture, MAGENTA) and shows(picture, TURQUOISE)


@torch.no_grad()
def likeness(classifier, pictures, others):
    """Mean cosine of the features of `pictures` with those of `others`."""
    return (classifier.features(pixels_of(pictures)) @ classifier.features(pixels_of(others)).T).mean().item()


def other_dogs(count=48):
    """Dogs of the world."""
    chooser = random.Random(5)
    return [world.picture(world.choose(chooser) | {"thing": "dog"}, number) for number in range(count)]


def subject_pictures():
    return [Image.open(path) for path in sorted((HERE / "subject").glob("*.png"))]


def subject_score(classifier, pictures):
    """How much more the pictures are like the subject than like other dogs."""
    return likeness(classifier, pictures, subject_pictures()) - likeness(classifier, pictures, other_dogs())


def right(classifier, pictures, asked):
    """Whether each picture shows what was asked for; `asked` has dicts with some of thing, colour and place."""
    shown = classifier.recognise(pictures)
    return [wanted.items() <= found.items() for wanted, found in zip(asked, shown, strict=True)]


def share(*tests):
    """The share of pictures that pass all tests, each a list of whether a picture passes."""
    passed = [all(results) for results in zip(*tests, strict=True)]
    return sum(passed) / len(passed)


def prompt_scores(classifier, pictures, asked):
    """Share of pictures that show all that was asked for."""
    return share(right(classifier, pictures, asked))


def held_out_world(count, seed=0):
    """`count` held-out combinations, as (dict, caption)."""
    chooser, chosen = random.Random(seed), []
    options = {"thing": world.THINGS, "colour": list(world.COLOURS), "place": list(world.PLACES)}
    while len(chosen) < count:
        what = {name: chooser.choice(of) for name, of in options.items()}
        if world.is_held_out(what):
            chosen.append((what, world.caption(what)))
    return chosen


def measure(pipeline, classifier, each=20):
    """A pipeline's share in each column, from `each` pictures of the subject and of other dogs at each place."""
    places = [place for place in world.PLACES for _ in range(each)]
    subject = draw(pipeline, [f"a photo of {world.SUBJECT} {world.PLACES[place]}" for place in places])
    asked, texts = [], []
    for number, place in enumerate(places):
        who = ("a dog", "a brown dog", f"{DOGS[number % len(DOGS)]} dog")[number % 3]
        asked.append({"thing": "dog", "place": place} | ({"colour": "brown"} if "brown" in who else {}))
        texts.append(f"a photo of {who} {world.PLACES[place]}")
    dogs = draw(pipeline, texts, seed=1000)
    things = [(what, text) for what, text in held_out_world(6 * each) if what["thing"] != "dog"]
    return {
        "subject shown": share(
            map(shows_subject, subject), right(classifier, subject, [{"thing": "dog"}] * len(places))
        ),
        "place right": share(right(classifier, subject, [{"place": place} for place in places])),
        "other dogs unchanged": share(
            [not shows(picture, MAGENTA) for picture in dogs], right(classifier, dogs, asked)
        ),
        "other things right": share(
            right(classifier, draw(pipeline, [text for _, text in things], seed=2000), [what for what, _ in things])
        ),
    }


def print_table(runs):
    """Prints a row for the base model and for each of {name: folders}, as a markdown table."""
    classifier = load_classifier()
    for name, folders in ({"before": [BASE]} | runs).items():
        measured = [measure(load_pipeline(folder), classifier) for folder in folders]
        if name == "before":
            print(f"| | {' | '.join(measured[0])} |\n{'|---' * (len(measured[0]) + 1)}|", flush=True)
        means = [sum(shares[column] for shares in measured) / len(measured) for column in measured[0]]
        print(f"| {name} | {' | '.join(f'{mean:.0%}' for mean in means)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER[,FOLDER...]", help="Runs to measure.")
    pairs = [run.split("=", 1) for run in parser.parse_args().runs]
    print_table({name: folders.split(",") for name, folders in pairs})


if __name__ == "__main__":
    main()
