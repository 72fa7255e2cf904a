"""Validation images and log points: when, how, and where they go."""

import io
import json
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trackers import wandb_records

IN_TURN = True  # one script for each test, see conftest.py

PROMPT, SIZE, LENGTH, IMAGES = "a photo of sks dog in a bucket", 48, 154, 2
PROJECTS = {"full": "dreambooth-sd3", "lora": "dreambooth-sd3-lora"}
ENCODERS = {"full": ("text_encoder", "text_encoder_2", "text_encoder_3"), "lora": ("text_encoder", "text_encoder_2")}
# Two pictures make an epoch of two updates: epochs 0 and 2 end after updates 2 and 6.
SETTINGS = {
    "validation_prompt": PROMPT,
    "num_validation_images": IMAGES,
    "validation_epochs": 2,
    "resolution": SIZE,
    "max_sequence_length": LENGTH,
    "max_train_steps": None,
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "seed": 11,
}


@pytest.fixture
def events(monkeypatch):
    """Gives a list of what a run does, in order: parts loaded, updates, images drawn."""

    def events(script):
        found, trained = [], {}
        load_part, load_trained, save_weights = script.load_part, script.load_trained, script.save_weights
        draw_images, flow_losses = script.draw_images, script.flow_losses

        def load(parts, name, *checkpoint, **kwargs):
            found.append(("load", name))
            return load_part(parts, name, *checkpoint, **kwargs)

        def train(*inputs):
            trained.update(load_trained(*inputs))
            found.append(("trained", list(trained)))
            return dict(trained)

        def save(*inputs, **options):
            save_weights(*inputs, **options)
            found.append(("saved", None))

        def draw(args, transformer, frozen, prompt, seeds, **options):
            modes = [model.training for model in (*trained.values(), frozen.vae)]
            assert not any(modes) and not torch.is_grad_enabled()
            assert frozen.embed([prompt])[0].shape[1] == 77 + LENGTH
            images = draw_images(args, transformer, frozen, prompt, seeds, **options)
            assert all(image.size == (SIZE, SIZE) for image in images)
            found.append(("draw", tuple(seeds)))
            return images

        def losses(*inputs, **options):
            assert all(model.training for model in trained.values()), "validation leaves the models as it found them"
            found.append(("update", None))
            return flow_losses(*inputs, **options)

        for name, watched in (("load_part", load), ("load_trained", train), ("save_weights", save)):
            monkeypatch.setattr(script, name, watched)
        monkeypatch.setattr(script, "draw_images", draw)
        monkeypatch.setattr(script, "flow_losses", losses)
        return found

    return events


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("train_text_encoder", [False, True], ids=["frozen", "trained"])
def test_validation(script, kind, run, events, train_text_encoder):
    found = events(script)
    dropout = {"lora_dropout": 0.5} if hasattr(script, "LORA_LAYERS") else {}
    flags = {"train_text_encoder": train_text_encoder, "report_to": "tensorboard"} | dropout
    output = run(script, **SETTINGS, **flags)

    # When, and from which seeds.
    updates, drawn = 0, Counter()
    for what, value in found:
        updates += what == "update"
        if what == "draw":
            drawn[updates, *value] += 1
    seeds = [11, 12]
    assert drawn == {(step, seed): 1 for step in (2, 6) for seed in seeds}, "the last epoch's are those of the end"

    # Each part is loaded once, none for an image.
    names = [what for what, _ in found]
    before, after = found[: names.index("trained")], found[names.index("saved") :]
    assert Counter(value for what, value in before if what == "load").most_common(1)[0][1] == 1
    during = found[names.index("update") : len(names) - 1 - names[::-1].index("update")]
    assert not [value for what, value in during + after if what == "load"]

    # Files.
    files = {path.name for path in (output / "validation").iterdir() if not path.name.endswith("grid.png")}
    assert len(list(output.glob("**/*grid.png"))) == 2
    assert files == {f"step-000002-{number}.png" for number in range(IMAGES)}
    final = [pixels(output / f"image_{number}.png") for number in range(IMAGES)]
    first = [pixels(output / "validation" / f"step-000002-{number}.png") for number in range(IMAGES)]
    for row, images in (("image_grid.png", final), ("validation/step-000002-grid.png", first)):
        assert np.array_equal(pixels(output / row), np.concatenate(images, axis=1))
    assert not np.array_equal(first, final), "the weights have moved"

    # TensorBoard: images in a row, as drawn, and one log point an update.
    board = EventAccumulator(str(output / "logs" / PROJECTS[kind])).Reload()
    assert sorted(board.Tags()["images"]) == ["test", "validation"]
    for tag, steps in (("validation", [2]), ("test", [6])):
        assert [image.step for image in board.Images(tag)] == steps
    shown = np.asarray(Image.open(io.BytesIO(board.Images("test")[0].encoded_image_string)))
    for image in final:
        places = [shown[top:, left:][:SIZE, :SIZE] for top in range(0, len(shown), 2) for left in range(0, 200, 2)]
        assert any(place.shape == image.shape and np.array_equal(place, image) for place in places)
    rates = {"lr"} | {f"lr_{name}" for name in ENCODERS[kind] if train_text_encoder}
    assert (
        set(board.Tags()["scalars"])
        == {"loss", "loss_average", "grad_norm", "seconds_per_update", "memory_gb"} | rates
    )
    for tag in board.Tags()["scalars"]:
        assert [point.step for point in board.Scalars(tag)] == list(range(1, 7))
        assert all(np.isfinite(point.value) for point in board.Scalars(tag))


def test_validation_changes_no_update(script, kind, run, tmp_path):
    """The losses of a run are the same with and without images, as no draw depends on another.

    Up to rounding: a prompt that is encoded beside another one differs in its last bit.
    """
    curves = []
    for number, prompt in enumerate([PROMPT, None]):
        flags = SETTINGS | {"validation_prompt": prompt, "validation_epochs": 1, "num_validation_images": 1}
        flags |= {"num_train_epochs": 2, "report_to": "tensorboard", "output_dir": tmp_path / str(number)}
        output = run(script, **flags)
        board = EventAccumulator(str(output / "logs" / PROJECTS[kind])).Reload()
        curves.append([point.value for point in board.Scalars("loss")])
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_no_prompt_no_images(script, run, events):
    found = events(script)
    output = run(script, max_train_steps=1)
    assert "draw" not in dict(found)
    assert not list(output.glob("image_*.png")) and not (output / "validation").exists()


def test_wandb_offline(script, run):
    """Images and scalars are in the run's own file, and TensorBoard beside it has its own."""
    flags = {"num_train_epochs": 2, "validation_epochs": 1, "report_to": "wandb,tensorboard"}
    output = run(script, **SETTINGS | flags)
    (path,) = (output / "logs").rglob("run-*.wandb")
    rows, patience = [], time.monotonic() + 30
    while sum("loss" in row for row in rows) < 4 and time.monotonic() < patience:  # another process writes the file
        records = [record for record in wandb_records(path) if record.WhichOneof("record_type") == "history"]
        rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records]
    logged = {key: value for row in rows for key, value in row.items()}
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and all(np.isfinite(losses))
    assert {"lr", "grad_norm"} <= logged.keys()
    images = sorted((path.parent / "files" / "media" / "images").glob("*.png"))
    assert Counter(image.name.split("_")[0] for image in images) == {"validation": 2, "test": 2}
    drawn = {(output / f"image_{number}.png") for number in range(2)}
    sent = [pixels(image) for image in images if image.name.startswith("test")]
    assert all(any(np.array_equal(pixels(one), other) for other in sent) for one in drawn)


def test_bars(script, run, capfd, pictures, tmp_path):
    """One for training, with loss, rate and updates a second; one each for encoding, caching and generating."""
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a dog"}
    flags = {"max_train_steps": 3, "cache_latents": True, "num_class_images": 1, "instance_data_dir": pictures(5)}
    run(script, **prior, **flags, gradient_accumulation_steps=2)
    written = capfd.readouterr().err
    for name in ("Encoding text with text_encoder_3", "Encoding images", "Drawing class images", "Training"):
        assert f"{name}: 100%" in written, name
    last = written.split("Training: 100%")[-1].split("\r")[0]
    assert "3/3" in last and "it/s" in last and "loss=" in last and "lr=" in last
