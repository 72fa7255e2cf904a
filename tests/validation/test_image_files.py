"""The image files that a run writes."""

from PIL import Image, ImageChops

FLAGS = {"validation_prompt": "a photo of sks dog in a bucket", "validation_epochs": 1, "num_validation_images": 3}


def same(image, other):
    return ImageChops.difference(image.convert("RGB"), other.convert("RGB")).getbbox() is None


def test_files_of_a_run(lora, run, few_steps):
    """Two images are two updates an epoch; those of the last epoch are the final ones, drawn once."""
    output = run(lora, max_train_steps=4, **FLAGS)
    drawn = {str(path.relative_to(output)) for path in output.rglob("*.png")}
    assert drawn == {
        f"{name}{part}.png" for name in ("validation/step-000002-", "image_") for part in (0, 1, 2, "grid")
    }
    for name in ("validation/step-000002-", "image_"):
        grid = Image.open(output / f"{name}grid.png")
        assert grid.size == (3 * 32, 32)
        for number in range(3):
            assert same(grid.crop((32 * number, 0, 32 * number + 32, 32)), Image.open(output / f"{name}{number}.png"))
    before, after = (Image.open(output / name) for name in ("validation/step-000002-0.png", "image_0.png"))
    assert not same(before, after)
