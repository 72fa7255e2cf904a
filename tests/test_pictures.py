"""The pictures that a run leaves on disk: grids, the strip over time, the curves."""

import json

import pytest
from PIL import Image, ImageChops

FLAGS = {"validation_prompt": "a photo of sks dog in a bucket", "validation_epochs": 1, "num_validation_images": 3}


def same(image, other):
    return ImageChops.difference(image.convert("RGB"), other.convert("RGB")).getbbox() is None


def test_files_of_a_run(lora, run, pictures):
    output = run(lora, max_train_steps=4, validation_data_dir=pictures(), **FLAGS)  # two images: two updates an epoch
    names = {path.name for path in (output / "validation").iterdir()}
    assert names == {f"step-00000{n}-{part}.png" for n in (2, 4) for part in (0, 1, 2, "grid")}
    assert {path.name for path in output.glob("*.png")} == {
        *(f"image_{n}.png" for n in range(3)), "image_grid.png", "validation.png", "loss.png",
    }  # fmt: skip
    grid = Image.open(output / "validation" / "step-000002-grid.png")
    for number, place in enumerate([(0, 0), (32, 0), (0, 32)]):
        single = Image.open(output / "validation" / f"step-000002-{number}.png")
        assert same(grid.crop((*place, place[0] + 32, place[1] + 32)), single)
    text = grid.crop((0, 64, *grid.size))
    other = Image.open(output / "validation" / "step-000004-grid.png").crop((0, 64, *grid.size))
    assert text.convert("L").getextrema() == (0, 255)  # black on white
    assert not same(text, other)  # another update
    strip = Image.open(output / "validation.png")
    first = Image.open(output / "validation" / "step-000002-0.png").resize((256, 256))
    last = Image.open(output / "image_0.png").resize((256, 256))
    assert strip.width == 2 * 256
    assert same(strip.crop((0, 0, 256, 256)), first)
    assert same(strip.crop((256, 0, 512, 256)), last)
    assert "](validation.png)" in (output / "README.md").read_text()
    assert "](loss.png)" in (output / "README.md").read_text()


def colors(image):
    return {color for _, color in image.convert("RGB").getcolors(maxcolors=2**20)}


def test_curves(lora, argv, tmp_path):
    args = lora.parse_args(argv())
    lora.scalars_file(args).parent.mkdir(parents=True)
    red = (0xD1, 0x49, 0x5B)
    for held_out in (False, True):
        rows = [{"step": n, "loss": 3 / n, "lr": 0.1} for n in range(1, 60)]
        rows += [{"step": 30, "loss": float("nan")}]
        rows += [{"step": n, "validation_loss": 2 + n / 100} for n in (20, 40)] * held_out
        lora.scalars_file(args).write_text("".join(json.dumps(row) + "\n" for row in rows))
        lora.draw_curves(args)
        image = Image.open(tmp_path / "out" / "loss.png")
        assert image.size == (800, 450)
        assert (red in colors(image)) is held_out
    # the highest loss is at the upper left, the lowest at the lower right: x of 140 to 1540, y of 80 to 800, halved
    pixels = {(x, y): image.getpixel((x, y)) for x in range(800) for y in range(40, 450)}
    blue = [place for place, (r, _, b) in pixels.items() if b - r > 90]  # the running mean
    assert min(blue)[0] == pytest.approx((140 + 1400 / 59) / 2, abs=4)
    assert max(blue)[0] == pytest.approx(770, abs=4)
    assert min(blue)[1] < 60


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": float("nan")}], [{"step": 1, "loss": 0.0}]])
def test_curves_of_little(rows, lora, argv, tmp_path):
    args = lora.parse_args(argv())
    lora.scalars_file(args).parent.mkdir(parents=True)
    lora.scalars_file(args).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora.draw_curves(args)
    assert (tmp_path / "out" / "loss.png").exists() is (rows == [{"step": 1, "loss": 0.0}])


def test_strip_keeps_twelve_from_first_to_last(lora, argv, tmp_path):
    args = lora.parse_args(argv(validation_prompt="a dog"))
    lora.scalars_file(args).parent.mkdir(parents=True)
    for n in range(30):
        Image.new("RGB", (8, 8), (8 * n, 0, 0)).save(tmp_path / "out" / f"{n}.png")
        lora.append_row(args, {"step": n, "drawn": f"{n}.png"})
    lora.draw_strip(args, 29)
    strip = Image.open(tmp_path / "out" / "validation.png")
    reds = [strip.getpixel((256 * n + 99, 99))[0] // 8 for n in range(12)]
    assert strip.width == 12 * 256
    assert reds == sorted(set(reds))
    assert (reds[0], reds[-1]) == (0, 29)
