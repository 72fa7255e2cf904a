#!/usr/bin/env python
"""Draws demo/style: eight pictures of the world as negatives, each with its caption, for the recipe for a style.

    python demo/make/style.py

A negative's content can be judged: turned back, it is a picture that demo/classifier.py knows. The captions say what
belongs to the picture and not to the style, and begin with the style's phrase.
"""

import random
import sys
from pathlib import Path

from PIL import ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import world  # noqa: E402
from evaluate import HERE, style_caption  # noqa: E402


def main(count=8):
    folder, draw = HERE / "style", random.Random(0)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        what = world.choose(draw)
        ImageOps.invert(world.picture(what, f"style {number}")).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{style_caption(what)}\n")


if __name__ == "__main__":
    main()
