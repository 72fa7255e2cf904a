"""Damaged models and flags that contradict each other end in one line and exit code 2.

A damaged part of the base model is named with the cause, wherever in a run it is loaded.
"""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from conftest import in_turn, load_script
from datasets import Dataset, DatasetDict, NamedSplit

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
MODELS = (*ENCODERS, "vae", "transformer")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 4665\n"


# A base model's folder that is damaged.


@pytest.fixture
def model(checkpoints, tmp_path):
    """A pipeline whose files can be changed: copies of small ones, links to the weights."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in checkpoints().rglob("*.safetensors"):
        (folder / path.relative_to(checkpoints())).symlink_to(path)
    return folder


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = next(folder.glob("*.safetensors"))
    data = change(path.read_bytes())
    path.unlink()
    path.write_bytes(data)


def vocabulary(folder):
    return [path for path in folder.iterdir() if path.name != "tokenizer_config.json"]


LAYERS = {"vae": ("layers_per_block", 2), "transformer": ("num_layers", 3), "text_encoder_3": ("num_layers", 3)}
WIDTHS = {"vae": "block_out_channels", "transformer": "num_attention_heads", "text_encoder_3": "d_model"}


def more_layers(model, part):
    name, number = LAYERS.get(part, ("num_hidden_layers", 3))
    change_json(model / part / "config.json", **{name: number})


def fewer_layers(model, part):
    name, _ = LAYERS.get(part, ("num_hidden_layers", 3))
    change_json(model / part / "config.json", **{name: 1})


def another_width(model, part):
    change_json(model / part / "config.json", **{"latent_channels" if part == "vae" else "intermediate_size": 8})


def word_for_a_number(model, part):
    change_json(model / part / "config.json", **{WIDTHS.get(part, "hidden_size"): "many"})


def of_class(model, part, name, library=None):
    library = library or ("transformers" if part.startswith("t") and part != "transformer" else "diffusers")
    change_json(model / "model_index.json", **{part: [library, name]})


NO_FIT = "its weights do not fit its config"
# Name: what is done to a part, to which parts, and what the line says beside the part's name. A model of each library
# and a part of each kind stand for the others, which are loaded by the same lines.
DAMAGE = {
    "weights cut short": (
        lambda m, p: change_weights(m / p, lambda data: data[: len(data) // 2]),
        ("text_encoder", "transformer"),
        "",
    ),
    "weights are a git-lfs pointer": (lambda m, p: change_weights(m / p, lambda data: POINTER), ("vae",), ""),
    "no weights": (lambda m, p: next((m / p).glob("*.safetensors")).unlink(), ("text_encoder_3", "transformer"), ""),
    "a layer without weights": (more_layers, ("text_encoder", "text_encoder_3"), NO_FIT),
    "a layer more or less": (more_layers, ("vae", "transformer"), ""),  # diffusers sees to it
    "a word for a number": (word_for_a_number, ("text_encoder_2", "transformer"), ""),
    "no config": (lambda m, p: (m / p / "config.json").unlink(), ("text_encoder", "vae"), ""),
    "half a config": (
        lambda m, p: (m / p / "config.json").write_text('{"_class'),
        ("text_encoder_3", "transformer"),
        "",
    ),
    "no folder": (lambda m, p: shutil.rmtree(m / p), ("tokenizer_3", "scheduler", "text_encoder"), ""),
    "an unknown class": (
        lambda m, p: of_class(m, p, "SD3Transformer2DModelFlowMatch"),
        ("text_encoder", "tokenizer", "scheduler", "transformer"),
        "",
    ),
    "a class of another library": (lambda m, p: of_class(m, p, "X", "os"), ("tokenizer_3",), "os X"),
    "no vocabulary": (lambda m, p: [path.unlink() for path in vocabulary(m / p)], ("tokenizer", "tokenizer_3"), ""),
    "no length": (lambda m, p: (m / p / "tokenizer_config.json").unlink(), ("tokenizer_2",), "no length"),
    "a vocabulary of nonsense": (
        lambda m, p: [path.write_text('{"a": ') for path in vocabulary(m / p)],
        ("tokenizer_2",),
        "",
    ),
    "another transformer": (
        lambda m, p: of_class(m, p, "FluxTransformer2DModel"),
        ("transformer",),
        "diffusers FluxTransformer2DModel",
    ),
    "another scheduler": (lambda m, p: of_class(m, p, "DDIMScheduler"), ("scheduler",), "diffusers DDIMScheduler"),
    "a layer more than the config has": (fewer_layers, ("text_encoder_2",), NO_FIT),
    "weights of another width": (another_width, ("vae", "text_encoder"), ""),
}
ROWS = in_turn([(damage, part) for damage, (_, parts, _) in DAMAGE.items() for part in parts])


@pytest.mark.parametrize(("kind", "damage", "part"), ROWS)
def test_a_damaged_part_of_the_model_is_named(refusal, model, damage, part):
    spoil, _, cause = DAMAGE[damage]
    spoil(model, part)
    line = refusal(pretrained_model_name_or_path=model, max_train_steps=1, dry_run=part.startswith("tokenizer"))
    start, _, rest = line.partition(repr(str(model)))
    if start.startswith("--pretrained"):  # by the index alone
        start, _, rest = rest.removeprefix(" is not SD3: its ").partition(" is ")
    assert start.split(" ")[0] == part
    assert cause in rest


@pytest.mark.parametrize(
    ("kind", "name", "changes", "cause"),
    in_turn(
        [
            ("vae/config.json", {"scaling_factor": None}, "its scaling_factor is None"),
            ("vae/config.json", {"scaling_factor": 0}, "its scaling_factor is 0"),
            ("scheduler/scheduler_config.json", {"shift": -3}, "its shift is -3"),
        ]
    ),
)
def test_a_config_with_which_nothing_is_learned(refused, model, name, changes, cause):
    change_json(model / name, **changes)
    line = refused(pretrained_model_name_or_path=model, dry_run=True)
    assert line == f"the {Path(name).parent} cannot be used: {cause}"


@pytest.mark.parametrize(("kind", "part"), in_turn([("text_encoder",), ("transformer",)]))
def test_a_variant_that_is_not_there_is_named(refusal, model, part):
    """The others have it."""
    for other in MODELS:
        path = next((model / other).glob("*.safetensors"))
        if other != part:
            path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    line = refusal(pretrained_model_name_or_path=model, variant="fp16")
    assert line.startswith(f"{part} of {str(model)!r} cannot be loaded (variant: fp16) (")


@pytest.mark.parametrize(("kind", "text"), in_turn([(None,), ("{",), ("[1]",), ('{"_class_name": "FluxPipeline"}',)]))
def test_an_index_that_is_none(refused, model, text):
    (model / "model_index.json").unlink()
    if text is not None:
        (model / "model_index.json").write_text(text)
    assert refused(pretrained_model_name_or_path=model).startswith(f"--pretrained_model_name_or_path {str(model)!r}")


# Precision.


@pytest.mark.parametrize(("kind", "by", "dry_run"), in_turn([("flag", False), ("environment", True)]))
def test_fp16_on_a_cpu_is_refused(refused, monkeypatch, by, dry_run):
    if by == "environment":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    line = refused(mixed_precision="fp16" if by == "flag" else None, dry_run=dry_run)
    assert line.startswith("--mixed_precision fp16 needs a GPU")


@pytest.mark.parametrize("kind", ["full"])
def test_t5_is_not_trained_in_fp16(script, refused, monkeypatch):
    def start(args, start=script.start_accelerator):
        accelerator = start(args)
        accelerator.state._mixed_precision = "fp16"  # as on a GPU
        return accelerator

    monkeypatch.setattr(script, "start_accelerator", start)
    assert refused(train_text_encoder=True).startswith("--train_text_encoder: T5 overflows in fp16")


# Folders to write to.


@pytest.fixture
def no_folders(tmp_path):
    """Names that no folder can have, by why not."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    return {
        "a file": tmp_path / "file",
        "inside a file": tmp_path / "file/out",
        "a dangling link": tmp_path / "link",
        "too long": tmp_path / ("x" * 300),
        "read-only": "/proc/sys",
    }


@pytest.mark.parametrize(
    ("kind", "flag", "why"),
    in_turn(
        [
            ("output_dir", "a file"),
            ("output_dir", "inside a file"),
            ("class_data_dir", "a dangling link"),
            ("output_dir", "too long"),
            ("class_data_dir", "read-only"),
        ]
    ),
)
def test_a_folder_that_cannot_be_written(refused, no_folders, flag, why):
    folder, flags = no_folders[why], {}
    if flag == "class_data_dir":
        flags = {"with_prior_preservation": True, "class_prompt": "a dog"}
    line = refused(**flags | {flag: folder})
    assert line.startswith(f"--{flag} {str(folder)!r} cannot be written")


@pytest.mark.parametrize("kind", ["lora"])
def test_no_output_folder_at_all(refused):
    assert refused(output_dir="").startswith("--output_dir is empty")


@pytest.mark.parametrize(
    ("kind", "flag", "spelling"),
    in_turn(
        [
            ("instance_data_dir", "{}"),
            ("class_data_dir", "{}/"),
            ("validation_data_dir", "{}/../link"),
            ("dataset_name", "{}/../out"),
        ]
    ),
)
def test_images_are_not_read_where_images_are_written(refused, tmp_path, flag, spelling):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    flags = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": tmp_path / "class"}
    folder = spelling.format(tmp_path / "out")
    line = refused(**flags | {flag: folder})
    names, _, message = line.partition(": ")
    assert f"--{flag}" in names.split(", ")
    assert message == f"--output_dir {str(tmp_path / 'out')!r} is one of them: give another"


@pytest.mark.parametrize(
    ("kind", "flag", "folder", "drawn"),
    in_turn(
        [
            ("instance_data_dir", "data", "data"),
            ("instance_data_dir", "data", "data/../link"),
            ("dataset_name", "data", "data/class"),
            ("validation_data_dir", "data/held out", "data"),
        ]
    ),
)
def test_class_images_are_not_drawn_among_others(refused, tmp_path, flag, folder, drawn):
    (tmp_path / "data/held out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    flags = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": tmp_path / drawn}
    line = refused(**flags | {flag: tmp_path / folder})
    assert line.startswith(f"--class_data_dir overlaps --{flag} {str(tmp_path / folder)!r}")


def test_images_of_an_earlier_run_are_neither_uploaded_nor_in_the_card(script, run, tmp_path, monkeypatch, few_steps):
    uploads = []
    monkeypatch.setattr(script, "open_repository", lambda *inputs: "user/dog")
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: uploads.append(options))
    (tmp_path / "out/validation").mkdir(parents=True)
    for name in ("image_0.png", "image_7.png", "validation/step-000001-0.png", "mine.safetensors"):
        (tmp_path / "out" / name).write_bytes(b"of before")
    out = run(script, validation_prompt="a dog", num_validation_images=1, max_train_steps=1, push_to_hub=True)
    (upload,) = uploads
    files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    sent = set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=upload["allow_patterns"]))
    assert {"README.md", "image_0.png"} < sent
    assert not sent & {"image_7.png", "validation/step-000001-0.png", "mine.safetensors", "image_grid.png"}
    card = (out / "README.md").read_text()
    assert "image_0.png" in card and "image_7" not in card
    assert (out / "image_0.png").read_bytes() != b"of before"


# Datasets.


@pytest.fixture
def dataset(pictures, tmp_path):
    """Writes a dataset of one of these kinds, most of them wrong; returns the flags that name it."""

    def dataset(kind):
        names = {"archive": "rows.tar", "brackets": "rows[1]"}
        source = tmp_path / names.get(kind, "rows")
        images = sorted(map(str, pictures().iterdir()))
        rows = [{"image": image, "text": "a dog"} for image in images]
        if kind == "urls":
            rows[1]["image"] = "https://example.com/dog.png"
        elif kind == "empty row":
            rows[1]["image"] = None
        elif kind == "absolute":
            rows = [{"file_name": image} for image in images]
        text = "\n".join(map(json.dumps, rows))
        if kind == "alone":
            Dataset.from_list(rows, split=NamedSplit("slice")).save_to_disk(source)
        elif kind == "saved":
            DatasetDict({"train": Dataset.from_list(rows), "other": Dataset.from_list(rows)}).save_to_disk(source)
        elif kind == "archive":
            source.write_text("")
        elif kind in ("brackets", "absolute", "no rows"):
            shutil.copytree(pictures(), source)
            (source / "metadata.jsonl").write_text("" if kind == "no rows" else text)
        else:
            source.mkdir()
            suffix = "xyz" if kind == "unsupported" else "jsonl"
            (source / f"rows.{suffix}").write_text(text[:-40] if kind == "broken" else text)
        return {"dataset_name": source, "caption_column": "text", "cache_dir": tmp_path / "cache"}

    return dataset


UNREADABLE = "--dataset_name '{}' cannot be read: give a Hub id or a folder without brackets in its name"


@pytest.mark.parametrize(
    ("kind", "form", "flags", "words"),
    in_turn(
        [
            ("broken", {}, [UNREADABLE]),
            ("lines", {"dataset_split": "test"}, [UNREADABLE, "test", "train"]),
            ("saved", {"dataset_split": "test"}, [UNREADABLE, "test", "train"]),
            ("alone", {}, [UNREADABLE, "saved using `save_to_disk`"]),
            ("unsupported", {}, [UNREADABLE]),
            ("lines", {"cache_dir": "/proc/cache"}, [UNREADABLE, "datasets writes to --cache_dir", "/proc/cache"]),
            (
                "urls",
                {},
                ["--dataset_name: 1 of 2 images are broken: the image https://example.com/dog.png cannot be"],
            ),
            ("empty row", {}, ["--dataset_name: 1 of 2 images are broken: the image of row 1 cannot be read ("]),
            ("archive", {}, [UNREADABLE, "Couldn't find any data file at {}"]),
            ("brackets", {}, [UNREADABLE, "doesn't contain any data files"]),
            ("absolute", {}, [UNREADABLE, "must be a relative path"]),
            ("no rows", {}, [UNREADABLE]),
        ]
    ),
)
def test_a_dataset_that_cannot_be_used(refused, dataset, form, flags, words):
    flags = dataset(form) | flags
    line = refused(**flags)
    for word in words:
        assert word.format(flags["dataset_name"]) in line


# Trackers.


def test_a_tracker_that_does_not_start_ends_the_run_before_it_encodes(script, refusal, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no login")

    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    monkeypatch.setattr(script.PromptTable, "fill", None)
    line = refusal(report_to="tensorboard")
    assert line.startswith("--report_to tensorboard: could not start a tracker") and "no login" in line


@pytest.mark.parametrize(
    ("kind", "flag", "name"),
    in_turn([("tracker_run_name", "../../x"), ("tracker_run_name", "a/../../../x"), ("tracker_project_name", "/x")]),
)
def test_a_run_s_name_does_not_lead_out_of_the_folder(refused, flag, name):
    line = refused(**{flag: name})
    assert line.startswith("--logging_dir, --tracker_run_name, --tracker_project_name: ")
    assert "leads out of --output_dir" in line


@pytest.mark.parametrize(("kind", "text"), in_turn([(" tensorboard,wandb,",), ("tensorboard , wandb",)]))
def test_trackers_with_spaces_and_a_trailing_comma(script, argv, text):
    assert script.split_names(script.parse_args(argv(report_to=text)).report_to) == ["tensorboard", "wandb"]


# What makes no sense is said.


PLAIN = "has no metadata file: split and columns of a dataset have no effect"


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    in_turn(
        [
            ({"caption_column": "text"}, PLAIN),
            ({"image_column": "picture"}, PLAIN),
            ({"dataset_split": "test"}, PLAIN),
            (
                {"alpha_mask": True},
                "--alpha_mask: no image is transparent in part; an invisible one teaches nothing",
            ),
            ({"cache_dir": "cache"}, None),
        ]
    ),
)
def test_what_has_no_effect_is_said(script, run, caplog, flags, said):
    run(script, **flags, dry_run=True)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (said is not None)
    assert said is None or warnings[0].endswith(said)


def test_prompts_that_are_too_long_are_counted_for_each_encoder(script, run, pictures, tmp_path, caplog):
    shutil.copytree(pictures(12), tmp_path / "data")
    for number, path in enumerate(list((tmp_path / "data").iterdir())):
        path.with_suffix(".txt").write_text(f"{path.stem} " * (1 if number < 3 else 200))
    caplog.set_level(logging.INFO)
    run(script, instance_data_dir=tmp_path / "data", max_sequence_length=512, dry_run=True)
    said = [line for line in caplog.messages if " cuts " in line]
    lengths = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 512}
    expected = [f"{name} cuts 9 of 12 prompts to {length} tokens" for name, length in lengths.items()]
    assert [line.removeprefix("[RANK 0] ") for line in said] == expected


HUGE = {"repeats": 10**9, "num_class_images": 10**6, "train_batch_size": 10**6, "dataloader_num_workers": 10**5}


@pytest.mark.parametrize(("kind", "name"), [*in_turn([(name,) for name in HUGE]), ("lora", "rank")])
def test_numbers_without_sense(script, refused, monkeypatch, name):
    monkeypatch.setattr(script, "main", lambda args: None)  # which would fill the memory with one of them
    number = HUGE.get(name, 10**6)
    assert refused(**{name: number}).startswith(f"argument --{name}: {number} is out of range: give ")


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("12-24", range(12, 25)), ("0,3", [0, 3]), ("0, 3-5 ,7,", [0, 3, 4, 5, 7]), ("4", [4]), (None, range(38))],
)
def test_blocks_are_numbers_and_ranges(text, blocks):
    transformer = torch.nn.Module()
    layers = ({"attn": torch.nn.ModuleDict({"to_q": torch.nn.Linear(1, 1)})} for _ in range(38))
    transformer.transformer_blocks = torch.nn.ModuleList(map(torch.nn.ModuleDict, layers))
    args = SimpleNamespace(lora_blocks=text, lora_layers="attn.to_q")
    chosen = load_script("lora").choose_layers(args, transformer)
    assert chosen == [f"transformer_blocks.{block}.attn.to_q" for block in blocks]
