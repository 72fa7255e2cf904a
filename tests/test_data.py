"""Data as people have them: captions, datasets of any kind, shapes, dropped captions, and the rehearsal of a run."""

import csv
import json
import logging
import re
import subprocess
import sys
from collections import Counter

import huggingface_hub
import pytest
import torch
from conftest import isolated
from datasets import Dataset, DatasetDict
from PIL import Image


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


def prompts_of(script, argv, **flags):
    args = script.parse_args(argv(**flags))
    images, prompts, sizes = script.read_instances(args)
    return args, images, prompts, sizes


@pytest.mark.parametrize("metadata", ["jsonl", "csv"])
def test_captions_belong_to_files_and_what_was_found_is_said(script, argv, tmp_path, said, metadata):
    folder = tmp_path / "data"
    a, b, _, d, e = paint(folder, [(40, 40)] * 5)
    a.with_suffix(".txt").write_text("from the\ntext")
    b.with_suffix(".caption").write_text("from the caption")
    d.with_suffix(".txt").write_text("hidden by the metadata")
    e.write_bytes(d.read_bytes())
    (folder / "notes.md").write_text("no image")
    rows = [{"file_name": "d.png", "words": "from the metadata"}]
    with (folder / f"metadata.{metadata}").open("w", newline="") as file:
        if metadata == "jsonl":
            file.write(json.dumps(rows[0]))
        else:
            csv.writer(file).writerows([rows[0].keys(), rows[0].values()])
    _, images, prompts, _ = prompts_of(script, argv, instance_data_dir=folder, caption_column="words")
    plain = "a photo of sks dog"
    assert [path.name for path in images] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert prompts == ["from the text", "from the caption", plain, "from the metadata", plain]
    for line in (
        f"--instance_data_dir {folder}: passed over notes.md",
        "--instance_data_dir: 5 images, 3 with a caption, 2 with --instance_prompt",
        "--instance_data_dir: 1 of the 5 images are copies of others",
    ):
        assert said.messages.count(line) == 1


@pytest.mark.parametrize("form", ["folder", "saved", "splits", "parquet", "arrow", "bytes", "paths"])
def test_datasets_of_any_kind(script, argv, tmp_path, said, form):
    folder = tmp_path / "data"
    paths = paint(folder, [(40, 32), (32, 40)])
    column = [path.read_bytes() for path in paths] if form == "bytes" else [str(path) for path in paths]
    rows = Dataset.from_dict({"image": column, "text": ["one", None]})
    if form not in ("bytes", "paths"):
        from datasets import Image as ImageFeature

        rows = rows.cast_column("image", ImageFeature())
    source = tmp_path / {"parquet": "rows.parquet", "bytes": "rows.parquet"}.get(form, "rows")
    flags = {}
    if form == "folder":
        source = folder
        (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png"}')
    elif source.suffix:
        rows.to_parquet(source)
    elif form == "splits":
        flags["dataset_split"] = "second"
        DatasetDict({"train": rows.select([0]), "second": rows}).save_to_disk(source)
    else:
        rows.save_to_disk(source)
    if form == "arrow":
        source = next(source.glob("*.arrow"))
    flags |= {"dataset_name": source, "caption_column": "text", "cache_dir": tmp_path / "cache"}
    _, images, prompts, _ = prompts_of(script, argv, **flags)
    assert prompts == ["one", "a photo of sks dog"]
    assert [script.open_image(image).size for image in images] == [(40, 32), (32, 40)]
    assert not any(isinstance(image, Image.Image) for image in images), "decoded when used"


def test_buckets(script, argv, tmp_path, said, pictures):
    """No image is lost, a batch has one size, a class image takes its partner's, and scaling up is said."""
    paint(tmp_path / "data", [(96, 32)] * 3 + [(32, 96)] * 2 + [(64, 64)] + [(20, 20)])
    flags = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "32,96;96,32;64,64", "train_batch_size": 2}
    args, images, prompts, sizes = prompts_of(script, argv, instance_data_dir=tmp_path / "data", **flags)
    assert sizes == [(32, 96)] * 3 + [(96, 32)] * 2 + [(64, 64)] * 2
    assert "--instance_data_dir: 1 images are smaller than what they are trained at and are scaled up" in said.messages
    assert "images by bucket, height x width: 3 at 32x96, 2 at 64x64, 2 at 96x32" in said.messages
    args.class_prompt = "a dog"
    dataset = script.DreamBoothDataset(args, images, prompts, sizes, sorted(pictures(9).iterdir()))
    for processes in (1, 2):
        batches = list(script.EpochSampler(dataset, 2, processes, 0))
        used = Counter(index for batch in batches for _, index, weight in batch if weight)
        assert used == Counter(range(9))  # nine class images; instance images 0 and 1 meet two of them
        for place in range(0, len(batches), processes):
            shapes = [
                script.collate([dataset[p] for p in batch])["data"].shape for batch in batches[place:][:processes]
            ]
            assert len(set(shapes)) == 1, "the processes are in step"
    for index in range(9):
        assert {example["data"].shape[1:] for example in dataset[0, index, 1.0]} == {sizes[index % 7]}


def test_caption_dropout(script, argv, monkeypatch, run, pictures, said):
    args, images, prompts, sizes = prompts_of(script, argv, instance_data_dir=pictures(4), caption_dropout=0.25)
    dataset = script.DreamBoothDataset(args, images, prompts, sizes)
    dataset.pixels = lambda *key: None
    drawn = Counter(dataset[epoch, index, 1.0][0]["prompt"] for epoch in range(400) for index in range(4))
    assert drawn.keys() == {"", "a photo of sks dog"}
    assert drawn[""] / 1600 == pytest.approx(0.25, abs=0.04)
    encoded, encode_text = [], script.encode_text
    monkeypatch.setattr(
        script, "encode_text", lambda n, e, ids: encoded.append((n, ids.tolist())) or encode_text(n, e, ids)
    )
    run(script, caption_dropout=0.9, max_train_steps=4)
    assert len(encoded) == 6, "two prompts by three encoders, each once"


def test_held_out_loss_is_a_curve_without_noise(script, run, pictures):
    """Weights that stand still have the same loss each time; that of the updates jumps."""
    flags = {"validation_data_dir": pictures(2, seed=7), "validation_epochs": 1, "num_train_epochs": 3}
    out = run(script, **flags, max_train_steps=None, learning_rate=0)
    rows = [json.loads(line) for line in (out / "logs/scalars.jsonl").read_text().splitlines()]
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(held_out) >= 3
    assert len(set(held_out)) == 1
    assert len({row["loss"] for row in rows if "loss" in row}) == 6
    assert not (out / script.ENCODED).exists()


def test_tensors_on_the_disk(script, argv, tmp_path):
    args = script.parse_args(argv())
    table = script.TensorFile(args)
    whole, half = torch.arange(12.0).view(1, 3, 4), torch.arange(4).bfloat16().view(1, 4)
    table["a"] = whole, half
    table["b"] = half.expand(3, 4), None
    for key, expected in (("b", (half.expand(3, 4), None)), ("a", (whole, half))):
        for ours, theirs in zip(table[key], expected, strict=True):
            assert ours is theirs or torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert all(not isinstance(place, torch.Tensor) for _, places in table.places.values() for place in places)


def test_dry_run(script, run, argv, monkeypatch, capsys, tmp_path, said):
    """Everything is read but the weights, and the sizes are those that a run then has."""
    paint(tmp_path / "data", [(64, 64), (64, 32), (32, 64)])
    (tmp_path / "data/a.txt").write_text("a photo of sks dog " * 30)
    flags = {"instance_data_dir": tmp_path / "data", "num_train_epochs": 4, "max_train_steps": None}
    flags |= {"checkpointing_steps": 12, "train_batch_size": 2, "train_text_encoder": True}
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_frozen", None)
        patch.setattr(script, "load_trained", None)
        class_images = {"class_data_dir": tmp_path / "none", "class_prompt": "a dog", "num_class_images": 5}
        run(script, **flags, **class_images, with_prior_preservation=True, dry_run=True)
        assert "updates: 12, which is 4.0 epochs of 3\n" in capsys.readouterr().out
        assert not (tmp_path / "none").exists()
        flags["max_train_steps"] = 12
        out = run(script, **flags, dry_run=True)
    text = capsys.readouterr().out
    assert any(line.endswith("2 different prompts, 1 of them cut") for line in said.messages)
    assert {path.name for path in out.iterdir()} <= {"dry_run.png", ".encoded"}
    assert "3 of 3 pictures, cropped as in the first epoch" in text
    pixels = Image.open(out / "dry_run.png").convert("RGB")
    assert {pixels.getpixel((104 + 208 * column, 190)) for column in (0, 1)} == {(0, 0, 0), (20, 20, 20)}
    counts, make_optimizer = [], script.make_optimizer

    def counted(args, accelerator, trained):
        counts.append(sum(p.numel() for model in trained.values() for p in script.trained_parameters(model)))
        return make_optimizer(args, accelerator, trained)

    monkeypatch.setattr(script, "make_optimizer", counted)
    run(script, **flags)
    assert f"trained: {counts[0]:,} parameters of transformer, text_encoder, text_encoder_2" in text
    found = re.search(r"written: ([\d.]+) (.)B at the end, ([\d.]+) (.)B a checkpoint \(1 of", text).groups()
    end, each = (float(found[n]) * {"k": 1e3, "M": 1e6}[found[n + 1]] for n in (0, 2))
    files = {path.relative_to(out): path.stat().st_size for path in out.rglob("*") if path.is_file()}
    saved = sum(size for path, size in files.items() if path.parts[0] == "checkpoint-12")
    result = sum(s for path, s in files.items() if path.suffix == ".safetensors" and path.parts[0] != "checkpoint-12")
    assert 0.9 * end < result < 3 * end
    assert 0.9 * each < saved < 3 * each


def test_a_dry_run_makes_no_repository(script, argv, monkeypatch, refused_repository):
    args = script.parse_args(argv(push_to_hub=True, hub_model_id="group/dog", dry_run=True))
    with isolated():
        accelerator = script.start_accelerator(args)
        assert script.open_repository(args, accelerator) == "group/dog"
        args.hub_model_id = "stranger/dog"
        with pytest.raises(SystemExit, match="2"):
            script.open_repository(args, accelerator)


@pytest.fixture
def refused_repository(monkeypatch):
    user = {"name": "user", "orgs": [{"name": "group"}]}
    monkeypatch.setattr(huggingface_hub, "whoami", lambda **_: user)
    monkeypatch.setattr(huggingface_hub, "repo_exists", lambda *_, **__: False)
    monkeypatch.setattr(huggingface_hub, "create_repo", None)


@pytest.mark.slow
def test_estimate_of_peak_memory(script, script_path, argv):
    words = argv(train_batch_size=2)
    dry = subprocess.run(
        [sys.executable, script_path, *words, "--dry_run"], capture_output=True, text=True, check=True
    )
    code = "import pathlib, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
    code += "print(pathlib.Path('/proc/self/status').read_text())"  # ru_maxrss would begin with this process's memory
    done = subprocess.run(
        [sys.executable, "-c", code, script_path, *words], capture_output=True, text=True, check=True
    )
    measured = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024
    number, scale = re.search(r"memory:  about ([\d.]+) (.)B", dry.stdout).groups()
    estimate = float(number) * {"M": 1e6, "G": 1e9}[scale]
    assert estimate == pytest.approx(measured, rel=0.2)
