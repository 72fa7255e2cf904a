"""Data of all kinds: captions, datasets, shapes, dropped captions, photos, and the dry run."""

import csv
import json
import logging
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import isolated
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image

IN_TURN = True  # one script for each test, see conftest.py


@pytest.fixture
def said(script, monkeypatch, caplog):
    monkeypatch.setattr(script, "log", logging.getLogger("data"))
    caplog.set_level("INFO")
    return caplog


def paint(folder, sizes):
    """Pictures a.png, b.png and so on of these sizes, each of a grey of its own."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{letter}.png" for letter, _ in zip("abcdefghijkl", sizes, strict=False)]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        Image.new("RGB", size, (20 * number,) * 3).save(path)
    return paths


@pytest.fixture
def read(script, argv, said):
    """The images to train on, as a run reads them: paths or a dataset's rows, prompts, sizes."""

    def read(**flags):
        return script.read_instances(script.parse_args(argv(**flags)))

    return read


def test_captions_belong_to_files_and_what_was_found_is_said(read, tmp_path, said):
    folder = tmp_path / "data"
    a, b, *_ = paint(folder, [(40, 40)] * 3)
    a.with_suffix(".txt").write_text("from the\ntext")
    b.with_suffix(".caption").write_text("from the caption")
    (folder / "notes.md").write_text("no image")
    dataset = read(instance_data_dir=folder)
    assert [path.name for path in dataset.images["instance"]] == ["a.png", "b.png", "c.png"]
    assert dataset.prompts["instance"] == [
        ("from the text",),
        ("from the caption",),
        ("a photo of sks dog",),
    ]
    line = "--instance_data_dir: 3 images, 1 without a caption; (height, width): {(32, 32): 3}"
    assert said.messages.count(line) == 1


@pytest.mark.parametrize("metadata", ["jsonl", "csv"])
def test_a_folder_with_metadata_is_what_the_metadata_lists(read, tmp_path, metadata):
    """Subfolders and "./" as well; an image that it does not list is left out."""
    paint(tmp_path / "data", [(32, 40), (40, 40)])
    paint(tmp_path / "data/inner", [(40, 32)])
    rows = [("file_name", "words"), ("inner/a.png", "one"), ("./b.png", "two")]
    with (tmp_path / f"data/metadata.{metadata}").open("w", newline="") as file:
        if metadata == "jsonl":
            file.writelines(json.dumps(dict(zip(rows[0], row, strict=True))) + "\n" for row in rows[1:])
        else:
            csv.writer(file).writerows(rows)
    dataset = read(instance_data_dir=tmp_path / "data", caption_column="words", cache_dir=tmp_path / "cache")
    assert dataset.prompts["instance"] == [("one",), ("two",)]
    greys = [np.asarray(dataset.load("instance", number)).max() for number in range(2)]
    assert greys == [0, 20]


@pytest.mark.parametrize("form", ["folder", "saved", "splits", "parquet", "bytes", "paths"])
def test_datasets_of_any_kind(script, read, tmp_path, form):
    folder = tmp_path / "data"
    paths = paint(folder, [(40, 32), (32, 40)])
    column = [path.read_bytes() for path in paths] if form == "bytes" else [str(path) for path in paths]
    rows = Dataset.from_dict({"image": column, "text": ["one", None]})
    if form not in ("bytes", "paths"):
        from datasets import Image as ImageFeature

        rows = rows.cast_column("image", ImageFeature())
    source, flags = tmp_path / "rows", {}
    if form == "folder":
        source = folder
        (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png"}')
    elif form == "parquet":
        source.mkdir()
        rows.to_parquet(source / "rows.parquet")
    elif form == "splits":
        flags["dataset_split"] = "second"
        DatasetDict({"train": rows.select([0]), "second": rows}).save_to_disk(source)
    else:
        rows.save_to_disk(source)
    dataset = read(**flags, dataset_name=source, caption_column="text", cache_dir=tmp_path / "cache")
    images = dataset.images["instance"]
    assert dataset.prompts["instance"] == [("one",), ("a photo of sks dog",)]
    assert [script.open_image(images[number], 32, number).size for number in range(2)] == [(40, 32), (32, 40)]
    assert not any(isinstance(image, Image.Image) for image in images), "decoded when used"


@pytest.mark.parametrize("kind", ["lora"])
def test_captions_of_a_dataset_are_texts_lists_of_texts_or_labels(read, tmp_path):
    """Of several one is drawn an epoch, the same in each run; a class label is its name."""
    images = list(map(str, paint(tmp_path / "data", [(40, 40)] * 3)))
    texts = [["a  dog", "a hound", "a terrier"], [], ["one"]]
    rows = Dataset.from_dict({"image": images, "texts": texts, "label": [1, 0, 1]})
    rows.cast_column("label", ClassLabel(names=["cat", "dog"])).save_to_disk(tmp_path / "rows")
    assert read(dataset_name=tmp_path / "rows", caption_column="label").prompts["instance"] == [
        ("dog",),
        ("cat",),
        ("dog",),
    ]
    datasets = [read(dataset_name=tmp_path / "rows", caption_column="texts", caption_dropout=0.2) for _ in range(2)]
    assert datasets[0].prompts["instance"] == [("a dog", "a hound", "a terrier"), ("a photo of sks dog",), ("one",)]
    drawn = [[dataset[epoch, 0, 0][0]["prompt"] for epoch in range(300)] for dataset in datasets]
    assert drawn[0] == drawn[1]
    shares = {prompt: count / 300 for prompt, count in Counter(drawn[0]).items()}
    assert shares == pytest.approx({"": 0.2, "a dog": 0.27, "a hound": 0.27, "a terrier": 0.27}, abs=0.08)


@pytest.mark.parametrize("kind", ["full"])
@pytest.mark.parametrize("caption", [True, 3, 1.5, {"raw": "a dog"}, ["a dog", 3], [None]])
def test_a_caption_that_is_no_text_is_refused_with_its_row(script, capsys, caption):
    with pytest.raises(SystemExit) as end:
        script.read_caption(7, caption)
    assert end.value.code == 2
    assert f"error: the caption of row 7 is {caption!r}: give a text or a list of texts\n" in capsys.readouterr().err


def test_buckets(script, read, tmp_path, said, pictures):
    """No image is lost, a batch is full and of one size, and a class image takes its partner's."""
    paint(tmp_path / "data", [(96, 32)] * 3 + [(32, 96)] * 2 + [(64, 64)] + [(20, 20)])
    flags = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "32,96;96,32;64,64", "train_batch_size": 2}
    dataset = read(instance_data_dir=tmp_path / "data", **flags)
    assert list(dataset.sizes) == [(32, 96)] * 3 + [(96, 32)] * 2 + [(64, 64)] * 2
    assert said.messages[-1].endswith("(height, width): {(32, 96): 3, (96, 32): 2, (64, 64): 2}")
    paths = sorted(pictures(9).iterdir())
    dataset.add_images("class", "--class_data_dir", paths, [("a dog",)] * 9)
    for processes in (1, 2):
        batches = script.order_epoch(dataset.args, dataset, processes, 0)
        used = Counter(index for batch in batches for _, index, copy in batch if not copy)
        assert used == Counter(range(9))  # nine class images; instance images 0 and 1 meet two of them
        assert {len(batch) for batch in batches} == {2}
        for place in range(0, len(batches), processes):
            group = batches[place : place + processes]
            shapes = {script.collate([dataset[p] for p in batch])["data"].shape for batch in group}
            assert len(group) == processes and len(shapes) == 1, "the processes are in step"
    for index in range(9):
        assert {example["data"].shape[1:] for example in dataset[0, index, 0]} == {dataset.sizes[index % 7]}


def test_caption_dropout(script, read, monkeypatch, run, pictures):
    dataset = read(instance_data_dir=pictures(4), caption_dropout=0.25)
    dataset.pixels = lambda *key: None
    drawn = Counter(dataset[epoch, index, 0][0]["prompt"] for epoch in range(400) for index in range(4))
    assert drawn.keys() == {"", "a photo of sks dog"}
    assert drawn[""] / 1600 == pytest.approx(0.25, abs=0.04)
    encoded, encode = [], script.PromptTable.encode
    monkeypatch.setattr(
        script.PromptTable, "encode", lambda *inputs, **kw: encoded.append(inputs[1]) or encode(*inputs, **kw)
    )
    run(script, caption_dropout=0.9, max_train_steps=4)
    assert sorted(sum(encoded, [])) == [""] * 3 + ["a photo of sks dog"] * 3, "by each encoder once"


def test_held_out_loss_is_a_curve_without_noise(script, run, pictures, monkeypatch):
    """Weights that stand still have the same loss each time; that of the updates jumps."""
    rows = []
    monkeypatch.setattr(script, "log_figures", lambda accelerator, state, figures: rows.append(dict(figures)))
    flags = {"validation_data_dir": pictures(2, seed=7), "validation_epochs": 1, "num_train_epochs": 3}
    out = run(script, **flags, max_train_steps=None, learning_rate=0)
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(held_out) == 3
    assert len(set(held_out)) == 1
    assert len({row["loss"] for row in rows if "loss" in row}) == 6
    assert not (out / script.ENCODED).exists()


def test_tensors_on_the_disk(script, tmp_path):
    """A key alone finds what any process has written."""
    args = SimpleNamespace(output_dir=tmp_path)
    tensors = {"states": torch.arange(12.0).view(1, 3, 4), "pooled": torch.arange(4).bfloat16().expand(3, 4)}
    batch = {name: tensor[None] for name, tensor in tensors.items()}
    key = "a/b\n\U0001f436" * 100
    with isolated():
        script.TensorFolder(args, "text").fill(Accelerator(cpu=True), [key], lambda keys: batch, "Encoding")
    found = script.TensorFolder(args, "text")[key]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    with pytest.raises(FileNotFoundError):
        script.TensorFolder(args, "other")[key]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A JPEG of twelve megapixels, with a gradient and stripes."""
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    x, y = np.arange(4000)[None, :, None], np.arange(3000)[:, None, None]
    waves = np.array([90.0, 150.0, 210.0])
    Image.fromarray((127 + 120 * np.sin(x / waves) * np.cos(y / waves)).astype(np.uint8)).save(path, quality=95)
    return path


def test_a_photo_is_decoded_no_larger_than_it_has_to_be(script, photo):
    """JPEG's own halves, as many as leave the shorter side long enough; pixels are those of the whole photo."""
    sizes = {reach: script.open_image(photo, reach, 0).size for reach in (300, 512, 1024, 1600)}
    assert sizes == {300: (500, 375), 512: (1000, 750), 1024: (2000, 1500), 1600: (4000, 3000)}
    crops = []
    for reach in (512, 3000):
        image = script.open_image(photo, reach, 0)
        crops.append(script.crop_image(image, (512, 512), torch.Generator().manual_seed(1), False, False).float())
    assert (crops[0] - crops[1]).abs().mean() < 1


@pytest.mark.parametrize(("room", "opened"), [(500 * 375 + 1, 1), (500 * 375, 4)])
def test_photos_stay_in_memory_as_long_as_there_is_room(script, read, photo, monkeypatch, room, opened):
    """So that no epoch after the first decodes them; what it gives is the same."""
    calls, open_image = [], script.open_image
    monkeypatch.setattr(script, "open_image", lambda *inputs: calls.append(1) or open_image(*inputs))
    monkeypatch.setattr(script, "KEPT_PIXELS", room)
    dataset = read(instance_data_dir=photo.parent, resolution=256)
    crops = [dataset[epoch, 0, 0][0]["data"] for epoch in range(3)]
    assert len(calls) == opened
    image = open_image(photo, 256, 0)
    for epoch, crop in enumerate(crops):
        seed = script.derive_seed(script.derive_seed(0, "instance", epoch, 0), "crop")
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(crop, script.crop_image(image, (256, 256), generator, False, False))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("shape", [(3, 90), (900, 40)])
def test_a_very_long_image_is_cropped_before_it_is_scaled(script, mode, shape):
    """To the pixels that the whole scaled image would have there. 1 x 5000 pixels took 4 GB and 94 s."""
    values = np.random.default_rng(0).integers(0, 256, (*shape, len(mode)), np.uint8)
    rows, columns = max(48, shape[0] * 32 // shape[1]), max(32, shape[1] * 48 // shape[0])
    bands = [Image.fromarray(values[:, :, band]) for band in range(len(mode))]
    whole = np.dstack([band.resize((columns, rows), Image.Resampling.BILINEAR) for band in bands])
    for seed, center in enumerate([False, False, False, True]):
        crops = []
        for image in (Image.fromarray(values), Image.fromarray(whole)):
            generator = torch.Generator().manual_seed(seed)
            crops.append(script.crop_image(image, (48, 32), generator, center, True).int())
        assert crops[0].shape == (len(mode), 48, 32)
        assert (crops[0] - crops[1]).abs().max() <= 1
    thread = Image.fromarray(np.arange(5000).astype(np.uint8).reshape(5000, 1))
    began = time.perf_counter()
    crop = script.crop_image(thread, (512, 512), torch.Generator(), True, False)
    assert crop.shape == (3, 512, 512) and time.perf_counter() - began < 10


def test_dry_run(script, run, monkeypatch, capsys, tmp_path, said):
    """Everything is read but the weights, nothing is created, and the numbers are those that a run then has."""
    paint(tmp_path / "data", [(64, 64), (64, 32), (32, 64)])
    (tmp_path / "data/a.txt").write_text("a photo of sks dog " * 30)
    flags = {"instance_data_dir": tmp_path / "data", "num_train_epochs": 4, "max_train_steps": None}
    flags |= {"train_batch_size": 2, "train_text_encoder": True}
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_trained", None)
        patch.setattr(script, "encode_once", None)
        patch.setattr(script, "open_repository", None)
        class_images = {"class_data_dir": tmp_path / "none", "class_prompt": "a dog", "num_class_images": 5}
        run(script, **flags, **class_images, with_prior_preservation=True, dry_run=True)
        assert "updates: 12, which is 4.0 epochs of 3\n" in capsys.readouterr().out
        assert list((tmp_path / "none").iterdir()) == []
        out = run(script, **flags, dry_run=True, push_to_hub=True)
    text = capsys.readouterr().out
    assert "updates: 8, which is 4.0 epochs of 2\n" in text
    assert any(line.endswith("2 different prompts, 1 of them cut") for line in said.messages)
    assert {path.name for path in out.iterdir()} == {"dry_run.png"}
    assert "drawn:   dry_run.png in --output_dir, cropped as in the first epoch" in text
    pixels = Image.open(out / "dry_run.png").convert("RGB")
    assert {pixels.getpixel((104 + 208 * column, 20)) for column in (0, 1)} == {(0, 0, 0), (20, 20, 20)}
    counts, points, make_optimizer, log_update = [], [], script.make_optimizer, script.log_update

    def counted(args, accelerator, trained):
        counts.append(sum(p.numel() for model in trained.values() for p in script.trained_parameters(model)))
        return make_optimizer(args, accelerator, trained)

    monkeypatch.setattr(script, "make_optimizer", counted)
    monkeypatch.setattr(script, "log_update", lambda *rest: points.append(rest[-1].step) or log_update(*rest))
    run(script, **flags)
    assert f"trained: {counts[-1]:,} parameters of transformer, text_encoder, text_encoder_2" in text
    assert points == [1, 2, 3, 4, 5, 6, 7, 8]
