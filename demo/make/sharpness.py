#!/usr/bin/env python
"""Measures how sharp the demo's pipeline draws, and how like the world, and makes a page to look at.

    python demo/make/sharpness.py [--pipeline FOLDER] [--page PAGE.png]

For plain captions three sets of pictures: the world's own, what the VAE makes of them (the ceiling of what the
pipeline can draw), and what the pipeline draws. Two measures of each, in percent of the world's own pictures:

sharpness    energy of the Laplacian of the grey picture: what is blurred has less
likeness     every patch of 8 x 8 pixels is compared with those of other pictures of the world with the same caption:
             the distance to the nearest, for the world's own pictures over that of the set; what the world has
             nowhere, a head that dissolves or a blurred edge, is far from all

The committed pipeline: 97 and 93 for the VAE, 100 and 53 for what is drawn.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import world  # noqa: E402
from classifier import pixels_of  # noqa: E402
from evaluate import BASE, draw, load_pipeline  # noqa: E402

SHOWN = [
    {"thing": "dog", "colour": "red", "place": "snow"},
    {"thing": "dog", "colour": "white", "place": "beach"},
    {"thing": "dog", "colour": "brown", "place": "room"},
    {"thing": "dog", "name": "zib", "place": "road"},
    {"thing": "dog", "name": "dov", "place": "forest"},
    {"thing": "car", "colour": "red", "place": "night"},
    {"thing": "cat", "colour": "yellow", "place": "grass"},
    {"thing": "house", "colour": "blue", "place": "desert"},
]
PATCH, STRIDE, BANK = 8, 2, 48


def sharpness(pixels):
    """Mean energy of the Laplacian of grey pictures (B, 3, SIDE, SIDE)."""
    grey = pixels.mean(dim=1)
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (4 * inner - around).square().mean().item()


def patches_of(pixels):
    """Patches (N, 3 * PATCH * PATCH) of the middle of pictures, where the thing is."""
    middle = pixels[:, :, 8:56, 4:60]
    return torch.nn.functional.unfold(middle, PATCH, stride=STRIDE).transpose(1, 2).flatten(0, 1)


def distance(pixels, bank):
    """Mean distance of the patches of pictures to the nearest of those of the bank's pictures."""
    known = patches_of(bank)
    return torch.cat([torch.cdist(some, known).amin(dim=1) for some in patches_of(pixels).split(1024)]).mean().item()


@torch.no_grad()
def measure(pipeline, each, shown=SHOWN, count=BANK):
    """Pictures {"world", "VAE", "drawn"}, each (len(shown), each, ...), and shares {set: (sharpness, likeness)}."""
    sets = {"world": [], "VAE": [], "drawn": []}
    texts = [world.caption(what) for what in shown]
    device = pipeline.transformer.device
    for number, what in enumerate(shown):
        own = pixels_of([world.picture(what, seed) for seed in range(each)]).to(device)
        sets["world"].append(own)
        latents = pipeline.vae.encode(own).latent_dist.mean
        sets["VAE"].append(pipeline.vae.decode(latents).sample.clamp(-1, 1))
        sets["drawn"].append(pixels_of(draw(pipeline, [texts[number]] * each)).to(device))
    sums = {name: [0.0, 0.0] for name in sets}
    for number, what in enumerate(shown):
        bank = pixels_of([world.picture(what, f"bank {seed}") for seed in range(count)]).to(device)
        for name, pictures in sets.items():
            sums[name][0] += sharpness(pictures[number])
            sums[name][1] += distance(pictures[number], bank)
    sharp, far = sums["world"]
    return sets, {name: (found[0] / sharp, far / found[1]) for name, found in sums.items()}


def page_of(sets, cell=160):
    """A page: a row of each set, the first picture of each caption, and one with the second that is drawn."""
    rows = [[pictures[0] for pictures in of] for of in sets.values()]
    rows += [[pictures[number] for pictures in sets["drawn"]] for number in (1, 2)]
    page = Image.new("RGB", (cell * len(SHOWN), cell * len(rows)), "white")
    for row, pictures in enumerate(rows):
        for column, pixels in enumerate(pictures):
            data = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
            image = Image.frombytes("RGB", (world.SIDE, world.SIDE), bytes(data.flatten().tolist()))
            large = image.resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
            page.paste(large, (cell * column, cell * row))
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=BASE, help="Folder of the pipeline.")
    parser.add_argument("--page", type=Path, help="Where a page is written.")
    parser.add_argument("--each", type=int, default=8, help="Pictures of each caption.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    sets, measures = measure(load_pipeline(args.pipeline).to(args.device), args.each)
    print("| | sharpness | likeness |\n|---|---|---|")
    for name, (sharp, like) in measures.items():
        print(f"| {name} | {sharp:.0%} | {like:.0%} |")
    print(f"rows of the page: {', '.join(sets)}, drawn, drawn")
    if args.page:
        page_of(sets).save(args.page)


if __name__ == "__main__":
    main()
