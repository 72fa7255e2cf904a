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

Runs for a style, by measure_style, have a table of their own. The style is the negative: colours are inverted.

in the style            "neg of a red car at night" is nearer to the mean of such negatives than to the mean of the
                        world's own pictures
content right           and turned back it shows the thing asked for, in combinations never trained on
without the phrase      "a photo of ...": nearer to the world's own pictures

Everything is drawn from fixed seeds, in 14 steps: 28 give the same shares. Thing, colour and place are judged by
demo/classifier.py, magenta and turquoise by a count of pixels. Each run draws only a few pictures, so that both tables
take half an hour of one core for three seeds: 32 of the subject, 32 of other dogs and 16 of other things; 32 in the
style and 32 without its phrase. From three seeds, a share of 50 is uncertain by 5 points, and one of 90 by 3.
"""

import argparse
import random
from itertools import chain
from pathlib import Path

import torch
import world
from classifier import load_classifier, pixels_of
from diffusers import StableDiffusion3Pipeline
from diffusers.utils.logging import disable_progress_bar
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny-sd3"
DOGS = [name for name, looks in world.NAMED.items() if looks["thing"] == "dog"]
STYLE = "neg"  # "negative" would be longer than the twelve tokens of a prompt leave room for
STEPS, GUIDANCE, TOKENS = 14, 4.0, 12
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
    shown = classifier.recognise(list(pictures))
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


def measure(pipeline, classifier, each=4):
    """The columns' shares of a pipeline, from `each` pictures of the subject and of the other dogs at each place."""
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


def style_caption(what):
    """The caption of a negative."""
    return world.caption(what).replace("a photo of", f"{STYLE} of")


def is_negative(picture, what, count=16):
    """Whether a picture is nearer to the mean of negatives than to that of the world's pictures of the same."""
    own = pixels_of([world.picture(what, f"style {number}") for number in range(count)]).mean(dim=0)
    pixels = pixels_of([picture])[0]
    return (pixels + own).square().sum() < (pixels - own).square().sum()  # the negative of pixels is -pixels


def measure_style(pipeline, classifier, count=32):
    """The columns' shares of a pipeline that was taught the negative."""
    shown = held_out_world(count, seed=1)
    asked = [what for what, _ in shown]
    styled = draw(pipeline, [style_caption(what) for what in asked], seed=3000)
    plain = draw(pipeline, [text for _, text in shown], seed=4000)
    in_style = [is_negative(*pair) for pair in zip(styled, asked, strict=True)]
    return {
        "in the style": share(in_style),
        "content right": share(
            in_style, right(classifier, map(ImageOps.invert, styled), [{"thing": what["thing"]} for what in asked])
        ),
        "without the phrase": share([not is_negative(*pair) for pair in zip(plain, asked, strict=True)]),
    }


def table_rows(runs, measure=measure):
    """The lines of a markdown table: a row for the base model and for each (name, folders) of `runs`, as it comes."""
    classifier = load_classifier()
    for name, folders in chain([("before", [BASE])], runs):
        measured = [measure(load_pipeline(folder), classifier) for folder in folders]
        if name == "before":
            yield f"| | {' | '.join(measured[0])} |"
            yield f"{'|---' * (len(measured[0]) + 1)}|"
        means = [sum(shares[column] for shares in measured) / len(measured) for column in measured[0]]
        yield f"| {name} | {' | '.join(f'{mean:.0%}' for mean in means)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER[,FOLDER...]", help="Runs to measure.")
    pairs = [run.split("=", 1) for run in parser.parse_args().runs]
    for line in table_rows((name, folders.split(",")) for name, folders in pairs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
