"""Data of all kinds: captions, datasets, shapes, dropped captions, photos, and the dry run."""

import ast
import csv
import json
import logging
import time
from collections import Counter

import numpy as np
import pytest
import torch
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
    line = "--instance_data_dir: 3 images, 1 without a caption; (height, width): {(32, 32)}"
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


@pytest.mark.parametrize("form", ["folder", "splits", "parquet", "bytes", "paths", "arrays"])
def test_datasets_of_any_kind(script, read, tmp_path, form):
    folder = tmp_path / "data"
    paths = paint(folder, [(40, 32), (32, 40)])
    column = list(map(str, paths))
    if form == "bytes":
        column = [path.read_bytes() for path in paths]
    elif form == "arrays":
        column = [np.asarray(Image.open(path)).tolist() for path in paths]
    rows = Dataset.from_dict({"image": column, "text": ["one", None]})
    if form not in ("bytes", "paths", "arrays"):
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
        DatasetDict({"train": rows}).save_to_disk(source)
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
    rows = rows.cast_column("label", ClassLabel(names=["cat", "dog"]))
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "rows")
    assert read(dataset_name=tmp_path / "rows", caption_column="label").prompts["instance"] == [
        ("dog",),
        ("cat",),
        ("dog",),
    ]
    datasets = [read(dataset_name=tmp_path / "rows", caption_column="texts", caption_dropout=0.2) for _ in range(2)]
    assert datasets[0].prompts["instance"] == [("a dog", "a hound", "a terrier"), ("a photo of sks dog",), ("one",)]
    drawn = [[dataset[epoch, 0, 0][0][1] for epoch in range(300)] for dataset in datasets]
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
    line, _, sizes = said.messages[-1].partition("; (height, width): ")
    assert line == "--instance_data_dir: 7 images, 7 without a caption"
    assert ast.literal_eval(sizes) == {(32, 96), (96, 32), (64, 64)}
    paths = sorted(pictures(9).iterdir())
    dataset.add_images("class", "--class_data_dir", paths, [("a dog",)] * 9)
    for processes in (1, 2):
        batches = script.order_epoch(dataset.args, dataset, processes, 0)
        used = Counter(index for batch in batches for _, index, copy in batch if not copy)
        assert used == Counter(range(9))  # nine class images; instance images 0 and 1 meet two of them
        assert {len(batch) for batch in batches} == {2}
        for place in range(0, len(batches), processes):
            group = batches[place : place + processes]
            shapes = {script.collate([dataset[p] for p in batch])[0].shape for batch in group}
            assert len(group) == processes and len(shapes) == 1, "the processes are in step"
    for index in range(9):
        assert {data.shape[1:] for data, _, _ in dataset[0, index, 0]} == {dataset.sizes[index % 7]}


def test_caption_dropout(script, read, monkeypatch, run, pictures):
    dataset = read(instance_data_dir=pictures(4), caption_dropout=0.25)
    dataset.pixels = lambda *key: None
    drawn = Counter(dataset[epoch, index, 0][0][1] for epoch in range(400) for index in range(4))
    assert drawn.keys() == {"", "a photo of sks dog"}
    assert drawn[""] / 1600 == pytest.approx(0.25, abs=0.04)
    encoded, encode = [], script.PromptTable.encode
    monkeypatch.setattr(
        script.PromptTable, "encode", lambda *inputs, **kw: encoded.append(inputs[-1]) or encode(*inputs, **kw)
    )
    run(script, caption_dropout=0.9, max_train_steps=4)
    assert sorted(sum(encoded, [])) == [""] * 3 + ["a photo of sks dog"] * 3, "by each encoder once"


def test_held_out_loss_is_a_curve_without_noise(script, run, pictures, monkeypatch):
    """Weights that stand still have the same loss each time; that of the updates jumps."""
    rows = []
    monkeypatch.setattr(script, "log_figures", lambda accelerator, state, figures: rows.append(dict(figures)))
    flags = {"validation_data_dir": pictures(2, seed=7), "validation_epochs": 1, "num_train_epochs": 3}
    run(script, **flags, max_train_steps=None, learning_rate=0)
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(held_out) == 3
    assert len(set(held_out)) == 1
    assert len({row["loss"] for row in rows if "loss" in row}) == 6


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


@pytest.mark.parametrize(("more", "opened"), [(-1, 1), (0, 2)])
def test_photos_stay_in_memory_as_long_as_there_is_room(script, read, photo, monkeypatch, tmp_path, more, opened):
    """So that no epoch after the first decodes them; what it gives is the same."""
    calls, open_image = [], script.open_image
    monkeypatch.setattr(script, "open_image", lambda *inputs: calls.append(inputs[0]) or open_image(*inputs))
    script.DreamBoothDataset.load.cache_clear()
    dataset = read(instance_data_dir=photo.parent, resolution=256)
    crops = [dataset[epoch, 0, 0][0][0] for epoch in range(2)]
    dataset.images["other"] = paint(tmp_path / "other", [(16, 16)]) * (script.KEPT + more)
    for number in range(script.KEPT + more):
        dataset.load("other", number)
    del dataset.images["other"]
    crops += [dataset[epoch, 0, 0][0][0] for epoch in range(2, 4)]
    assert calls.count(photo) == opened
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
    assert crop.shape == (1, 512, 512) and time.perf_counter() - began < 10


def test_dry_run(script, run, monkeypatch, tmp_path, said):
    """Everything is read but the weights, and nothing is created."""
    paint(tmp_path / "data", [(64, 64), (64, 32), (32, 64)])
    (tmp_path / "data/a.txt").write_text("a photo of sks dog " * 30)
    flags = {"instance_data_dir": tmp_path / "data", "train_text_encoder": True, "push_to_hub": True}
    flags |= {"class_data_dir": tmp_path / "none", "class_prompt": "a dog", "with_prior_preservation": True}
    for name in ("open_repository", "start_trackers", "add_class_images", "load_frozen", "load_trained"):
        monkeypatch.setattr(script, name, None)
    out = run(script, **flags, report_to="tensorboard", dry_run=True)
    assert list(out.iterdir()) == list((tmp_path / "none").iterdir()) == []
    cut = [f"{name} cuts 1 of 3 prompts to 77 tokens" for name in script.TOKENIZERS]
    assert said.messages[1:] == [*cut, "dry run: a run with these flags would now start"]
