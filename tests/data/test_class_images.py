"""Class images: the base model draws the missing ones, each once."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

IN_TURN = True  # one script for each test, see conftest.py

pytestmark = pytest.mark.usefixtures("few_steps")
PROMPT, LENGTH, SIZE = "a photo of a dog", 154, 48


@pytest.fixture
def settings(tmp_path):
    return {
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": PROMPT,
        "num_class_images": 4,
        "sample_batch_size": 3,
        "resolution": SIZE,
        "max_sequence_length": LENGTH,
        "max_train_steps": 1,
        "seed": 7,
    }


@pytest.fixture
def drawn(monkeypatch):
    """Gives the sizes of the batches that are drawn, and the precision that each part is loaded in."""

    def drawn(script):
        batches, dtypes = [], []
        draw_images, load_part = script.draw_images, script.load_part

        def count(*inputs):
            batches.append(len(inputs[-1]))
            return draw_images(*inputs)

        def keep(parts, name, *checkpoint, **options):
            if "torch_dtype" in options:  # a model
                dtypes.append((name, options["torch_dtype"]))
            return load_part(parts, name, *checkpoint, **options)

        monkeypatch.setattr(script, "draw_images", count)
        monkeypatch.setattr(script, "load_part", keep)
        return batches, dtypes

    return drawn


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_missing_images_are_what_the_base_model_draws(script, run, settings, drawn, checkpoints, capfd):
    batches, _ = drawn(script)
    run(script, **settings)
    assert batches == [3, 1]
    assert "Drawing class images: 100%" in capfd.readouterr().err
    paths = sorted(settings["class_data_dir"].iterdir())
    assert [path.name.split("-")[0] for path in paths] == ["0", "1", "2", "3"]
    assert {path.suffix for path in paths} == {".png"}

    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoints())
    pipeline.set_progress_bar_config(disable=True)
    for number, path in enumerate(paths):
        image = Image.open(path)
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (SIZE, SIZE))
        generator = torch.Generator().manual_seed(script.derive_seed(7, "class drawing", number))
        size = {"height": SIZE, "width": SIZE, "max_sequence_length": LENGTH}
        expected = pipeline(PROMPT, generator=generator, **size).images[0]
        assert np.abs(np.subtract(image, expected, dtype=np.int16)).max() <= 1


def test_a_second_run_draws_none(script, run, settings, drawn, capfd):
    run(script, **settings)
    before = contents(settings["class_data_dir"])
    capfd.readouterr()
    batches, dtypes = drawn(script)
    run(script, **settings)
    assert batches == []
    assert contents(settings["class_data_dir"]) == before
    assert "Drawing class images" not in capfd.readouterr().err
    assert [name for name, _ in dtypes].count("text_encoder") == 1, "for training alone"


def test_only_image_files_count(script, run, settings, drawn, pictures):
    """A picture of the user's is one of the four; notes, folders and hidden files are none."""
    folder = settings["class_data_dir"]
    (folder / "5.png").mkdir(parents=True)
    own = sorted(pictures(2).iterdir())[0].read_bytes()
    for name in ("0-holiday.png", ".hidden.png"):
        (folder / name).write_bytes(own)
    for name in ("notes.txt", "Thumbs.db", "metadata.jsonl"):
        (folder / name).write_text("{}")
    batches, _ = drawn(script)
    run(script, **settings)
    assert batches == [3]
    images = script.list_images(folder)
    assert len(images) == 4
    assert len({path.read_bytes() for path in images}) == 4, "each is another"
    assert (folder / "0-holiday.png").read_bytes() == own


def test_a_gap_is_filled(script, run, settings, drawn):
    """What was taken away is drawn again, and nothing else: not the last one a second time."""
    run(script, **settings)
    folder = settings["class_data_dir"]
    whole = contents(folder)
    (gap,) = folder.glob("1-*.png")
    gap.unlink()
    batches, _ = drawn(script)
    run(script, **settings)
    assert batches == [1]
    assert contents(folder) == whole


def test_more_than_enough(script, run, settings, drawn, pictures):
    """The first num_class_images are used; nothing is drawn or taken away."""
    batches, _ = drawn(script)
    folder = pictures(6, seed=4)
    before = contents(folder)
    run(script, **settings | {"class_data_dir": folder})
    assert batches == [] and contents(folder) == before


@pytest.mark.parametrize(
    ("kind", "precision", "dtype"),
    [
        ("full", None, torch.float32),
        ("lora", "fp32", torch.float32),
        ("full", "no", torch.float32),
        ("full", "fp16", torch.float16),
        ("lora", "fp16", torch.float16),
        ("lora", "bf16", torch.bfloat16),
    ],
)
def test_precision(script, run, settings, drawn, precision, dtype):
    """Unset is float32 on a CPU. The VAE is float32 whatever is asked for."""
    _, dtypes = drawn(script)
    run(script, **settings | {"num_class_images": 1, "prior_generation_precision": precision})
    parts = ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer"]
    assert dtypes[:5] == [*((name, dtype) for name in parts), ("vae", torch.float32)]
    (path,) = settings["class_data_dir"].iterdir()
    assert np.asarray(Image.open(path)).std() > 1, "not black, as an overflow would be"
