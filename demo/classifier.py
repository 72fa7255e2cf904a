#!/usr/bin/env python
"""A small network that recognises thing, colour and place in a picture, and whose features measure likeness.

python demo/classifier.py      # trains it on drawn pictures and writes demo/classifier.safetensors
"""

import random
from pathlib import Path

import torch
import world
from PIL import ImageFilter
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = Path(__file__).resolve().parent / "classifier.safetensors"
HEADS = {"thing": world.THINGS, "colour": list(world.COLOURS), "place": list(world.PLACES)}


def pixels_of(pictures):
    """PIL pictures of SIDE pixels as a float32 tensor (B, 3, SIDE, SIDE) in [-1, 1]."""
    rows = [torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8) for picture in pictures]
    return torch.stack(rows).view(-1, world.SIDE, world.SIDE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


class Classifier(nn.Module):
    """Five strided convolutions, features of 128 numbers, and a linear head for thing, colour and place each."""

    def __init__(self):
        super().__init__()
        widths, layers = [3, 16, 32, 64, 128], []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(of)) for name, of in HEADS.items()})

    def features(self, pixels):
        """Features (B, 128) of unit length of pixels (B, 3, SIDE, SIDE) in [-1, 1]."""
        return nn.functional.normalize(self.body(pixels), dim=-1)

    def forward(self, pixels):
        """Logits {"thing", "colour", "place"} of pixels (B, 3, SIDE, SIDE) in [-1, 1]."""
        features = self.body(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def recognise(self, pictures):
        """What PIL pictures show, a list of {"thing", "colour", "place"}."""
        best = {name: logits.argmax(dim=-1).tolist() for name, logits in self(pixels_of(pictures)).items()}
        return [{name: HEADS[name][best[name][row]] for name in HEADS} for row in range(len(pictures))]


def load_classifier():
    """The trained classifier in float32."""
    classifier = Classifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return classifier.eval()


def draw_batch(size, seed):
    """Pixels and labels {"thing", ...: (size,)} of new pictures, held-out and named ones too, some blurred.

    Four in ten show a thing with a name: patched, in a scarf, in any colours. Their colour label is -100: no label.
    """
    draw, shown = random.Random(f"classifier {seed}"), []
    for _ in range(size):
        plain = {name: draw.choice(of) for name, of in HEADS.items()}
        shown.append(plain if draw.random() < 0.6 else world.choose_nobody(draw))
    pictures = [world.picture(what, draw.random()) for what in shown]
    pictures = [p.filter(ImageFilter.GaussianBlur(draw.uniform(0, 1.2))) for p in pictures]
    pixels = pixels_of(pictures)
    pixels += 0.08 * draw.random() * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    labels = {name: [of.index(what[name]) if name in what else -100 for what in shown] for name, of in HEADS.items()}
    return pixels, {name: torch.tensor(numbers) for name, numbers in labels.items()}


def main(steps=900, batch=48):
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        pixels, labels = draw_batch(batch, step)
        logits = classifier(pixels)
        loss = sum(nn.functional.cross_entropy(logits[name], labels[name]) for name in HEADS)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{step}: {loss.item():.3f}", flush=True)
    save_file({name: value.half().contiguous() for name, value in classifier.state_dict().items()}, WEIGHTS)
    classifier = load_classifier()
    pixels, labels = draw_batch(500, steps)
    with torch.no_grad():
        logits = classifier(pixels)
    for name in HEADS:
        right = (logits[name].argmax(dim=-1) == labels[name])[labels[name] >= 0]
        print(f"{name}: {right.float().mean():.1%} of {len(right)} new pictures")


if __name__ == "__main__":
    main()
