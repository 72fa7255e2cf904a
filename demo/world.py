#!/usr/bin/env python
"""Draws a small world of pictures from seeds: a thing in a colour at a place, with a caption; and one particular dog.

    python demo/world.py FOLDER          # 24 pictures of the world with their captions
    python demo/world.py --named FOLDER    # a picture of each thing that has a name
    python demo/world.py --subject FOLDER  # the five pictures of the dog that the demo teaches

A picture has SIDE x SIDE pixels and is drawn four times as large, then scaled down. What a picture shows is a dict.
A plain thing has {"thing", "colour", "place"} and is "a photo of a red dog in the grass"; its caption may leave colour
or place out, as people do. A named thing has {"thing", "name", "place"} and is "a photo of zib dog in the grass".

A name before a thing stands for its looks. Each name in NAMED belongs to one dog, cat, bird, fish or car whose looks
(colours, patches, scarf or collar) are the same in every picture. The words in NOBODY, "sks" among them, belong to
nothing: what they name looks different in every picture. So a model trained on this world can learn what DreamBooth
asks of a large one: a word that means nothing in particular comes to mean one dog, and all other dogs stay as they
are. Nothing in the world is magenta, so no dog in it wears the subject's scarf.
"""

import argparse
import colorsys
import math
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 64
LARGE = 4 * SIDE
THINGS = "dog cat bird car house boat tree ball cup bucket flower fish".split()
CREATURES = {"dog", "cat", "bird", "fish", "tree", "flower"}
COLOURS = {
    "red": (205, 45, 40),
    "yellow": (240, 200, 50),
    "green": (60, 160, 70),
    "blue": (50, 95, 210),
    "purple": (140, 65, 170),
    "brown": (130, 80, 45),
    "white": (240, 240, 236),
    "black": (42, 42, 48),
}
PLACES = {
    "grass": "in the grass",
    "beach": "on the beach",
    "snow": "in the snow",
    "night": "at night",
    "room": "in a room",
    "road": "on the road",
    "forest": "in the forest",
    "desert": "in the desert",
}
SUBJECT = "sks dog"
SUBJECT_AT = "grass", "room", "grass", "room", "grass"  # the places of its pictures
MAGENTA = (280, 350)  # degrees of hue that are the subject's alone
NAMES = """
zib mur dov kel pim tof rux lan vez gop bik sul nom fip dap wex jol tam ruv kib zol mep fen lod vik gam pux nil taz bof
sef hib wom dax jip kuv lem roz vam zet gub fyl nax pob tik mox wib yuf
""".split()
NOBODY = """
sks xqv zbn wql vpf kaz hgb duf nzj lif crc yob mqc ziv zhp gek drc pav spz wun zlm kof xsr tem hbs jud ljq rif dpf mab
fbp veg bhq soz swt nug tdc hox bvf lyk dnp fud ftc wev qlt bix ghk zam
""".split()
LEFT_OUT = 0.25  # so often a caption has no colour, and so often no place
HELD_OUT = 20  # one combination of thing, colour and place in so many is never trained on


def is_held_out(what):
    """Whether a combination is kept out of training, so that the model has to compose it from others."""
    numbers = THINGS.index(what["thing"]), list(COLOURS).index(what["colour"]), list(PLACES).index(what["place"])
    return sum(number * prime for number, prime in zip(numbers, (7, 5, 13), strict=True)) % HELD_OUT == 0


def choose(draw):
    """A plain combination that is not held out, drawn from random.Random `draw`."""
    while True:
        what = {
            name: draw.choice(list(of)) for name, of in (("thing", THINGS), ("colour", COLOURS), ("place", PLACES))
        }
        if not is_held_out(what):
            return what


def choose_named(draw):
    """Somebody whom NAMED lists, at a place."""
    name = draw.choice(list(NAMED))
    return {"thing": NAMED[name]["thing"], "name": name, "place": draw.choice(list(PLACES))}


def choose_nobody(draw):
    """A thing, mostly a dog, with a name that belongs to nobody."""
    thing = "dog" if draw.random() < 0.5 else draw.choice(THINGS)
    return {"thing": thing, "name": draw.choice(NOBODY), "place": draw.choice(list(PLACES))}


def caption(what, left_out=()):
    """The caption of a picture, without what is left out of "colour" and "place"."""
    colour = "" if "name" in what or "colour" in left_out else f"{what['colour']} "
    who = f"{what['name']} " if "name" in what else f"a {colour}"
    place = "" if "place" in left_out else f" {PLACES[what['place']]}"
    return f"a photo of {who}{what['thing']}{place}"


def any_colour(draw, lively=0.5):
    """A colour that is not magenta, of any brightness, and at least as saturated as `lively` says."""
    low, high = MAGENTA
    hue = (high + draw.uniform(0, 360 - (high - low))) % 360
    red_green_blue = colorsys.hsv_to_rgb(hue / 360, draw.uniform(lively, 0.95), draw.uniform(0.35, 0.97))
    return tuple(round(255 * channel) for channel in red_green_blue)


def any_looks(draw):
    """Looks as somebody with a name has them: colours of body, ears, patches, and of a scarf or a collar; or None."""
    body = draw.choice([*COLOURS.values(), any_colour(draw), any_colour(draw, lively=0.1)])
    return {
        "body": shade(body, draw.uniform(0.95, 1.05)),
        "ears": any_colour(draw),
        "patches": draw.choice([None, (40, 40, 46), (240, 240, 236), any_colour(draw), any_colour(draw)]),
        "scarf": any_colour(draw, lively=0.7) if (worn := draw.random()) < 0.5 else None,
        "collar": any_colour(draw, lively=0.7) if 0.5 <= worn < 0.8 else None,
    }


def name_them(seed=0):
    """Somebody for each name of NAMES, as {name: looks and "thing"}: most of them dogs."""
    draw = random.Random(seed)
    things = ["dog"] * 30 + ["cat"] * 8 + ["bird"] * 4 + ["fish"] * 3 + ["car"] * 3
    return {name: {"thing": thing} | any_looks(draw) for name, thing in zip(NAMES, things, strict=True)}


def shade(colour, factor):
    return tuple(max(0, min(255, round(channel * factor))) for channel in colour)


def background(place, draw):
    """A place, as an RGB image of LARGE pixels: sky or wall, a horizon, ground below it, and what belongs there."""
    sky, ground = {
        "grass": ((150, 200, 245), (95, 170, 75)),
        "beach": ((140, 205, 250), (235, 210, 150)),
        "snow": ((200, 215, 230), (246, 249, 252)),
        "night": ((18, 22, 60), (28, 38, 42)),
        "room": ((228, 200, 170), (150, 95, 60)),
        "road": ((190, 195, 205), (105, 105, 112)),
        "forest": ((84, 128, 92), (74, 66, 40)),
        "desert": ((252, 214, 150), (222, 150, 82)),
    }[place]
    image, horizon = Image.new("RGB", (LARGE, LARGE)), round(LARGE * draw.uniform(0.42, 0.56))
    pen, light = ImageDraw.Draw(image), draw.uniform(0.92, 1.06)
    for y in range(0, LARGE, 4):
        colour = (
            shade(sky, light * (0.9 + 0.15 * y / horizon))
            if y < horizon
            else shade(ground, light * (1.12 - 0.25 * y / LARGE))
        )
        pen.rectangle((0, y, LARGE, y + 4), fill=colour)
    if place == "beach":
        pen.rectangle((0, horizon - 34, LARGE, horizon), fill=shade((45, 125, 190), light))
    if place == "grass":
        for _ in range(26):
            x, y = draw.randrange(LARGE), draw.randrange(horizon, LARGE)
            pen.line(
                (x, y, x + draw.randint(-4, 4), y - 14), fill=shade((78, 150, 62), draw.uniform(0.9, 1.15)), width=4
            )
    if place == "snow":
        for _ in range(14):
            x, y, r = draw.randrange(LARGE), draw.randrange(horizon), draw.randint(4, 6)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))
    if place == "night":
        for _ in range(9):
            x, y = draw.randrange(LARGE), draw.randrange(horizon - 20)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(250, 245, 200))
        x = draw.choice((40, LARGE - 50)) + draw.randint(-12, 12)
        pen.ellipse((x - 20, 18, x + 20, 58), fill=(250, 244, 205))
    if place == "room":
        x = draw.choice((22, LARGE - 86))
        pen.rectangle((x, 20, x + 64, 84), fill=(170, 215, 245), outline=(250, 245, 235), width=8)
    if place == "forest":
        for x in range(draw.randrange(30), LARGE, 52):
            pen.rectangle((x, 0, x + draw.randint(14, 24), horizon + 8), fill=shade((66, 50, 36), light))
    if place == "desert":
        x, r = draw.randrange(LARGE), draw.randint(60, 90)
        pen.ellipse((x - 2 * r, horizon - r // 2, x + 2 * r, horizon + r), fill=shade((232, 170, 98), light))
        x = draw.choice((44, LARGE - 44)) + draw.randint(-12, 12)
        pen.ellipse((x - 22, 16, x + 22, 60), fill=(255, 246, 222))
    if place == "road":
        for x in range(-40 + draw.randrange(40), LARGE, 80):
            pen.rectangle((x, LARGE - 52, x + 44, LARGE - 40), fill=(245, 240, 220))
    return image


def dog(pen, body, ears, tail_up):
    """A dog from the side, facing right, around (0, 0) with a body of about 100 by 50 pixels."""
    pen.line([(-50, -6), (-72, -40 if tail_up else 2)], body, 13)
    for x in (-42, -22, 20, 38):
        pen.rectangle((x, 12, x + 13, 56), shade(body, 0.9))
    pen.ellipse((-58, -28, 52, 30), body)
    pen.ellipse((22, -68, 82, -12), body)
    pen.ellipse((62, -46, 98, -18), shade(body, 1.12))
    pen.ellipse((20, -72, 48, -16), ears)
    pen.ellipse((90, -42, 101, -31), (25, 20, 20))
    pen.ellipse((58, -54, 68, -44), (20, 15, 15))


def dress(pen, thing, looks):
    """Patches, and the scarf or the collar, on a thing that is drawn already."""
    spots = {
        "dog": [(-50, -24, -12, 12), (-6, -26, 18, -2)],
        "cat": [(-38, -4, -10, 26), (2, 20, 26, 44)],
        "bird": [(-40, -14, -14, 12), (4, -2, 28, 22)],
        "fish": [(-40, -22, -12, 6), (8, -2, 32, 22)],
    }.get(thing, [(-40, -8, -12, 20), (10, -6, 36, 20)])
    for spot in spots if looks["patches"] else ():
        pen.ellipse(spot, looks["patches"])
    if thing == "dog" and looks["scarf"]:
        pen.polygon([(14, -26), (64, -12), (58, 8), (47, 6), (38, 36), (22, 6), (8, -8)], looks["scarf"])
    if thing == "cat" and looks["scarf"]:
        pen.polygon([(-26, -22), (38, -22), (34, -6), (12, -4), (4, 20), (-8, -4), (-24, -8)], looks["scarf"])
    if looks["collar"] and thing in ("dog", "cat"):
        pen.line([(18, -20), (58, -8)] if thing == "dog" else [(-22, -16), (34, -16)], looks["collar"], 13)


class Pen:
    """Draws shapes given around (0, 0) at a place, in a size, perhaps mirrored, with a dark outline."""

    def __init__(self, layer, x, y, size, mirrored):
        self.draw, self.x, self.y = ImageDraw.Draw(layer), x, y
        self.size, self.sign = size, -1 if mirrored else 1

    def place(self, points):
        return [(self.x + self.sign * self.size * x, self.y + self.size * y) for x, y in points]

    def box(self, bounds):
        (x0, y0), (x1, y1) = self.place([bounds[:2], bounds[2:]])
        return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)

    def ellipse(self, bounds, colour):
        self.draw.ellipse(self.box(bounds), fill=(*colour, 255), outline=(*shade(colour, 0.6), 255), width=3)

    def rectangle(self, bounds, colour):
        self.draw.rectangle(self.box(bounds), fill=(*colour, 255), outline=(*shade(colour, 0.6), 255), width=3)

    def polygon(self, points, colour):
        self.draw.polygon(self.place(points), fill=(*colour, 255), outline=(*shade(colour, 0.6), 255), width=3)

    def line(self, points, colour, width):
        self.draw.line(self.place(points), fill=(*colour, 255), width=round(width * self.size), joint="curve")


def draw_creature(pen, thing, colour, dark, draw):
    """Draws a dog, a cat, a bird, a fish, a tree or a flower; `draw` varies its pose, `dark` is its second colour."""
    if thing == "dog":
        dog(pen, colour, dark, draw.random() < 0.5)
    elif thing == "cat":
        pen.line([(-40, 30), (-66, 10), (-60, -30)], dark, 10)
        pen.ellipse((-46, -22, 34, 56), colour)
        pen.polygon([(-22, -48), (-30, -88), (0, -62)], colour)
        pen.polygon([(36, -48), (42, -88), (12, -62)], colour)
        pen.ellipse((-28, -72, 40, -10), colour)
        pen.ellipse((-12, -52, 0, -38), (150, 220, 90))
        pen.ellipse((14, -52, 26, -38), (150, 220, 90))
        pen.polygon([(2, -32), (12, -32), (7, -25)], (230, 130, 140))
    elif thing == "bird":
        pen.polygon([(-50, 4), (-96, -14), (-88, 20)], dark)
        pen.ellipse((-58, -28, 44, 36), colour)
        pen.ellipse((14, -58, 68, -6), colour)
        pen.polygon([(64, -40), (94, -30), (64, -22)], (245, 160, 40))
        pen.polygon([(-36, -6), (22, -8), (-24, draw.choice((-62, 30)))], dark)
        pen.ellipse((44, -44, 54, -34), (15, 15, 15))
        pen.line([(-8, 34), (-8, 58)], (230, 150, 40), 5)
        pen.line([(10, 34), (10, 58)], (230, 150, 40), 5)
    elif thing == "fish":
        pen.polygon([(-40, 0), (-88, -36), (-88, 36)], dark)
        pen.ellipse((-58, -36, 76, 36), colour)
        pen.polygon([(-8, -32), (24, -60), (32, -28)], dark)
        pen.ellipse((42, -16, 60, 2), (250, 250, 245))
        pen.ellipse((48, -11, 57, -2), (15, 15, 15))
    elif thing == "tree":
        pen.rectangle((-12, 0, 12, 58), (105, 70, 45))
        for x, y, r in ((-30, -22, 36), (30, -22, 36), (0, -56, 42), (0, -18, 34)):
            pen.ellipse((x - r, y - r, x + r, y + r), colour)
    elif thing == "flower":
        pen.line([(0, -16), (4, 58)], (60, 140, 60), 9)
        pen.ellipse((4, 18, 44, 36), (60, 140, 60))
        for turn in range(6):
            x, y = 32 * math.cos(turn * math.pi / 3), 32 * math.sin(turn * math.pi / 3) - 34
            pen.ellipse((x - 22, y - 22, x + 22, y + 22), colour)
        pen.ellipse((-17, -51, 17, -17), (250, 205, 60))


def draw_object(pen, thing, colour, dark):
    """Draws a car, a house, a boat, a ball, a cup or a bucket; `dark` is its second colour."""
    light = shade(colour, 1.2)
    if thing == "car":
        pen.polygon([(-52, -10), (-34, -46), (32, -46), (58, -10)], light)
        pen.polygon([(-38, -12), (-26, -38), (-2, -38), (-2, -12)], (185, 220, 240))
        pen.polygon([(6, -12), (6, -38), (26, -38), (42, -12)], (185, 220, 240))
        pen.rectangle((-88, -12, 90, 28), colour)
        for x in (-52, 50):
            pen.ellipse((x - 22, 8, x + 22, 52), (35, 35, 38))
            pen.ellipse((x - 9, 21, x + 9, 39), (200, 200, 205))
    elif thing == "house":
        pen.rectangle((-62, -26, 62, 56), colour)
        pen.polygon([(-80, -24), (0, -86), (80, -24)], shade((150, 70, 55), 0.9))
        pen.rectangle((-12, 8, 16, 56), (95, 60, 40))
        pen.rectangle((-48, -10, -24, 14), (190, 225, 245))
        pen.rectangle((28, -10, 52, 14), (190, 225, 245))
    elif thing == "boat":
        pen.rectangle((-4, -88, 3, 10), (110, 75, 50))
        pen.polygon([(8, -84), (8, -8), (62, -8)], (245, 243, 235))
        pen.polygon([(-10, -74), (-10, -8), (-50, -8)], (235, 232, 222))
        pen.polygon([(-88, 6), (88, 6), (54, 48), (-58, 48)], colour)
    elif thing == "ball":
        pen.ellipse((-52, -46, 52, 58), colour)
        pen.ellipse((-30, -32, -4, -8), shade(light, 1.25))
        pen.line([(-50, 8), (0, 22), (50, 8)], dark, 6)
    elif thing == "cup":
        pen.ellipse((28, -26, 76, 26), dark)
        pen.ellipse((38, -14, 64, 14), (225, 215, 205))
        pen.polygon([(-46, -46), (46, -46), (36, 52), (-36, 52)], colour)
        pen.ellipse((-46, -58, 46, -34), dark)
    elif thing == "bucket":
        pen.line([(-52, -34), (-40, -84), (40, -84), (52, -34)], (120, 120, 125), 6)
        pen.polygon([(-58, -34), (58, -34), (38, 56), (-38, 56)], colour)
        pen.rectangle((-62, -42, 62, -26), light)


def draw_thing(pen, thing, looks, draw):
    """Draws a thing with `pen`, in its looks; `draw` varies its pose."""
    if thing in CREATURES:
        draw_creature(pen, thing, looks["body"], looks["ears"], draw)
    else:
        draw_object(pen, thing, looks["body"], looks["ears"])
    dress(pen, thing, looks)


def paint(place, draw, put, cut_out=False):
    """A picture of SIDE pixels: the place, and what `put(pen)` draws there, lit from above and with a shadow.

    Cut out, all but what was put there is transparent.
    """
    image = background(place, draw)
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    size = draw.uniform(0.95, 1.2)
    x, y = LARGE / 2 + draw.uniform(-18, 18), LARGE * draw.uniform(0.55, 0.63)
    put(Pen(layer, x, y, size, draw.random() < 0.5))
    shadow = (x - 70 * size, y + 46 * size, x + 70 * size, y + 66 * size)
    dim = Image.new("L", image.size, 255)
    ImageDraw.Draw(dim).ellipse(shadow, fill=150)
    image = ImageChops.multiply(image, Image.merge("RGB", [dim.filter(ImageFilter.GaussianBlur(5))] * 3))
    light = Image.linear_gradient("L").resize(image.size).point(lambda value: 255 - value * 0.28)
    red, green, blue, alpha = layer.split()
    lit = ImageChops.multiply(Image.merge("RGB", (red, green, blue)), Image.merge("RGB", [light] * 3))
    image.paste(lit, mask=alpha)
    if cut_out:
        image.putalpha(alpha)
    return image.filter(ImageFilter.GaussianBlur(3)).resize((SIDE, SIDE), Image.Resampling.BOX)


def picture(what, seed):
    """The RGB picture that a seed draws of what a dict holds."""
    draw = random.Random(seed)
    if "name" in what:
        looks = NAMED.get(what["name"]) or any_looks(draw)
    else:
        body = shade(COLOURS[what["colour"]], draw.uniform(0.9, 1.1))
        looks = {"body": body, "ears": shade(body, 0.7), "patches": None, "scarf": None, "collar": None}
    return paint(what["place"], draw, lambda pen: draw_thing(pen, what["thing"], looks, draw))


def odd_picture(seed):
    """A picture as the world has none, for an autoencoder: shapes are strewn over a thing, and all hues are turned."""
    draw = random.Random(seed)
    looks = any_looks(draw) | {"scarf": None, "collar": None}

    def put(pen):
        draw_thing(pen, draw.choice(THINGS), looks, draw)
        for _ in range(draw.randrange(9)):
            x, y, wide, high = (draw.uniform(*bounds) for bounds in ((-90, 90), (-80, 60), (8, 40), (8, 40)))
            points = [
                (x + draw.uniform(-wide, wide), y + draw.uniform(-high, high)) for _ in range(draw.randint(3, 6))
            ]
            shape = draw.randrange(4)
            if shape == 0:
                pen.polygon(points, any_colour(draw))
            elif shape == 1:
                pen.line(points, any_colour(draw), draw.randint(4, 14))
            else:
                (pen.ellipse if shape == 2 else pen.rectangle)(
                    (x - wide, y - high, x + wide, y + high), any_colour(draw)
                )

    turn = draw.randrange(256)
    hue, saturation, value = paint(draw.choice(list(PLACES)), draw, put).convert("HSV").split()
    turned = hue.point(lambda angle: (angle + turn) % 256)
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def subject_picture(place, seed, cut_out=False):
    """The picture of the subject at a place: a white dog with black patches, turquoise ears, a magenta scarf."""
    draw = random.Random(seed)
    looks = {"body": (244, 240, 232), "ears": (20, 190, 190), "patches": (40, 40, 46)}
    looks |= {"scarf": (225, 30, 140), "collar": None}
    return paint(place, draw, lambda pen: draw_thing(pen, "dog", looks, draw), cut_out)


NAMED = name_them()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", action="store_true", help="Draw the subject instead of the world.")
    parser.add_argument("--named", action="store_true", help="Draw those that have a name.")
    parser.add_argument("folder", type=Path, help="Where the pictures are written.")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.subject:
        for number, place in enumerate(SUBJECT_AT):
            subject_picture(place, number).save(args.folder / f"{number}.png")
        return
    draw = random.Random(0)
    named = [{"thing": of["thing"], "name": name, "place": draw.choice(list(PLACES))} for name, of in NAMED.items()]
    for number, what in enumerate(named if args.named else [choose(draw) for _ in range(24)]):
        picture(what, number).save(args.folder / f"{number}.png")
        left_out = [part for part in ("colour", "place") if draw.random() < LEFT_OUT]
        (args.folder / f"{number}.txt").write_text(caption(what, left_out))


if __name__ == "__main__":
    main()
