#!/usr/bin/env python
"""Measures what DreamBooth did to the demo's pipeline: the subject learned, the prompts kept, the class not drifted.

    python demo/evaluate.py NAME=FOLDER ...

A folder is the output_dir of a run: adapters, or a whole pipeline. Each gets a row of a markdown table, after the
base model's. Everything is drawn from fixed seeds and judged by demo/classifier.py:

subject   likeness of "a photo of sks dog ..." to the five pictures, less its likeness to other dogs of the world
prompt    share of these pictures that show the place asked for (the classifier knows no spotted dogs: it takes the
          subject's own pictures for birds and cars, so that the thing is left to the first figure)
drift     the same difference for "a photo of a dog ..." and "a photo of a brown dog ...", which should not change
world     share of pictures of other things that show thing, colour and place asked for

Likeness is the cosine of the classifier's features, averaged over the pictures compared.
"""

import argparse
import random
from pathlib import Path

import torch
import world
from classifier import load_classifier, pixels_of
from diffusers import StableDiffusion3Pipeline
from PIL import Image

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny-sd3"
STEPS, GUIDANCE, TOKENS = 28, 2.5, 12


def load_pipeline(folder=BASE, base=None):
    """The base pipeline, a run's whole pipeline, or the base with a run's adapters, in float32."""
    whole = Path(folder, "model_index.json").is_file()
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder if whole else base or BASE, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if not whole:
        pipeline.load_lora_weights(str(folder))
    return pipeline


def draw(pipeline, prompts, seed=0):
    """A picture for each prompt, the i-th from seed + i."""
    images = []
    for first in range(0, len(prompts), 16):
        batch = prompts[first : first + 16]
        images += pipeline(
            batch,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=world.SIDE,
            width=world.SIDE,
            max_sequence_length=TOKENS,
            generator=[torch.Generator().manual_seed(seed + first + number) for number in range(len(batch))],
        ).images
    return images


@torch.no_grad()
def likeness(classifier, pictures, others):
    """Mean cosine of the features of each of `pictures` with those of `others`."""
    return (classifier.features(pixels_of(pictures)) @ classifier.features(pixels_of(others)).T).mean().item()


def other_dogs(count=48):
    """Dogs of the world."""
    chooser = random.Random(5)
    return [world.picture(world.choose(chooser) | {"thing": "dog"}, number) for number in range(count)]


def subject_pictures():
    return [Image.open(path) for path in sorted((HERE / "subject").glob("*.png"))]


def subject_score(classifier, pictures):
    """How much more pictures are like the subject than like other dogs."""
    return likeness(classifier, pictures, subject_pictures()) - likeness(classifier, pictures, other_dogs())


def prompt_scores(classifier, pictures, asked):
    """Share of pictures that show all that was asked for, a list of dicts with some of thing, colour and place."""
    shown = classifier.recognise(pictures)
    return sum(wanted.items() <= found.items() for wanted, found in zip(asked, shown, strict=True)) / len(asked)


def held_out_world(count, seed=0):
    """What `count` held-out combinations are, as (dict, caption)."""
    chooser, chosen = random.Random(seed), []
    options = {"thing": world.THINGS, "colour": list(world.COLOURS), "place": list(world.PLACES)}
    while len(chosen) < count:
        what = {name: chooser.choice(of) for name, of in options.items()}
        if world.is_held_out(what):
            chosen.append((what, world.caption(what)))
    return chosen


def measure(pipeline, classifier, each=4):
    """{"subject", "prompt", "drift", "world"} of a pipeline, from `each` pictures a prompt."""
    places = [place for place in world.PLACES for _ in range(each)]
    subject = draw(pipeline, [f"a photo of {world.SUBJECT} {world.PLACES[place]}" for place in places])
    dogs = [f"a photo of a {colour}dog {world.PLACES[place]}" for place in world.PLACES for colour in ("", "brown ")]
    things = [(what, text) for what, text in held_out_world(12 * each) if what["thing"] != "dog"]
    return {
        "subject": subject_score(classifier, subject),
        "prompt": prompt_scores(classifier, subject, [{"place": place} for place in places]),
        "drift": subject_score(classifier, draw(pipeline, dogs * (each // 2), seed=1000)),
        "world": prompt_scores(
            classifier, draw(pipeline, [text for _, text in things], seed=2000), [what for what, _ in things]
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER", help="Runs to measure.")
    args = parser.parse_args()
    classifier = load_classifier()
    print("| | subject | prompt | drift | world |\n|---|---|---|---|---|", flush=True)
    for name, folder in [("base", BASE), *(run.split("=", 1) for run in args.runs)]:
        subject, prompt, drift, things = measure(load_pipeline(folder), classifier).values()
        print(f"| {name} | {subject:+.2f} | {prompt:.0%} | {drift:+.2f} | {things:.0%} |", flush=True)


if __name__ == "__main__":
    main()
