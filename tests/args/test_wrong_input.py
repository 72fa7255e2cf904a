"""Wrong input ends in one line and exit code 2 before a model is loaded."""

import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import SCRIPTS
from hub_stand_in import HubStandIn
from PIL import Image

EMPTY = str(Path(tempfile.gettempdir(), "dreambooth-without-images"))
Path(EMPTY).mkdir(exist_ok=True)
PRIOR = {"with_prior_preservation": True, "class_data_dir": EMPTY, "class_prompt": "a dog"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # Flags that contradict each other.
        ({"dataset_name": "d", "instance_data_dir": "i"}, "--dataset_name, --instance_data_dir: give exactly one"),
        ({"instance_data_dir": None}, "--dataset_name, --instance_data_dir: give exactly one of the two"),
        ({**PRIOR, "class_data_dir": None}, "--with_prior_preservation needs --class_data_dir"),
        ({**PRIOR, "class_prompt": None}, "--with_prior_preservation needs --class_prompt"),
        ({"hub_token": "hf_x", "report_to": "wandb"}, "--hub_token would be readable in wandb"),
        ({"hub_token": "hf_x", "report_to": "tensorboard,all"}, "--hub_token would be readable in tensorboard,all"),
        # Choices and numbers.
        ({"optimizer": "sgd"}, "argument --optimizer: invalid choice: 'sgd'"),
        ({"lr_scheduler": "step"}, "argument --lr_scheduler: invalid choice: 'step'"),
        ({"report_to": "paper"}, "--report_to 'paper' is unknown: choose from tensorboard, wandb,"),
        ({"mixed_precision": "fp8"}, "argument --mixed_precision: invalid choice: 'fp8'"),
        ({"weighting_scheme": "uniform"}, "argument --weighting_scheme: invalid choice: 'uniform'"),
        ({"prior_generation_precision": "fp8"}, "argument --prior_generation_precision: invalid choice: 'fp8'"),
        ({"prodigy_decouple": "maybe"}, "argument --prodigy_decouple: 'maybe' is neither true nor false"),
        ({"precondition_outputs": 2}, "argument --precondition_outputs: invalid choice: 2"),
        ({"max_sequence_length": 513}, "argument --max_sequence_length: 513 is out of range: give 1 or more, less t"),
        ({"max_sequence_length": 0}, "argument --max_sequence_length: 0 is out of range: give 1 or more, less than"),
        ({"resolution": 500}, "--resolution 500 is not a multiple of 16 (VAE 8, patch 2): 496 is the nearest"),
        ({"resolution": 0}, "argument --resolution: 0 is out of range: give 16 or more"),
        (
            {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "33,32"},
            "33 pixels are no side of a crop: give mul",
        ),
        (
            {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "0,32"},
            "--aspect_ratio_buckets '0,32': give heigh",
        ),
        ({"adam_beta1": 1}, "argument --adam_beta1: 1 is out of range: give 0.0 or more, less than 1.0"),
        ({"seed": -1}, "argument --seed: -1 is out of range: give 0 or more, less than 4294967296"),
        ({"learning_rate": "nan"}, "argument --learning_rate: nan is out of range"),
        ({"learning_rate": "inf"}, "argument --learning_rate: inf is out of range"),
        ({"no_such_flag": 1}, "unrecognized arguments: --no_such_flag 1"),
        ({"repeats": "two"}, "argument --repeats: invalid int value: 'two'"),
        # Folders and files.
        (
            {"instance_data_dir": "/nowhere"},
            "--instance_data_dir '/nowhere' is not a folder: give the folder with the",
        ),
        ({"validation_data_dir": "/nowhere"}, "--validation_data_dir '/nowhere' is not a folder"),
        ({"instance_data_dir": EMPTY}, f"--instance_data_dir {EMPTY!r}: there is no image in it: give a folder that"),
        ({"logging_dir": "../logs"}, "--logging_dir '../logs' leads out of --output_dir"),
        ({"logging_dir": "."}, "--logging_dir '.' leads out of --output_dir"),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint 'nowhere': no whole checkpoint, neither"),
        ({"dataset_name": "/nowhere"}, "--dataset_name '/nowhere' cannot be read ("),
        # What only the model's configuration can tell; no weight is read for it.
        (
            {"resolution": 272},
            "272 pixels are no side of a crop: give multiples of 16, at most this transformer's 256",
        ),
        (
            {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "16,512"},
            "512 pixels are no side of a crop: give multiples of 16, at most this transformer's 256",
        ),
    ],
)
def test_refused(refused, flags, message):
    assert refused(**flags).startswith(message)


POSITIVE = """repeats num_class_images sample_batch_size train_batch_size num_train_epochs max_train_steps
    gradient_accumulation_steps max_grad_norm lr_num_cycles adam_epsilon num_validation_images validation_epochs
    checkpointing_steps checkpoints_total_limit logit_std"""


@pytest.mark.parametrize("name", POSITIVE.split())
def test_zero_where_it_makes_no_sense(refused, name):
    for value in (0, -1):
        assert refused(**{name: value}).startswith(f"argument --{name}: {value} is out of range: give 1")


NOT_NEGATIVE = """dataloader_num_workers prior_loss_weight learning_rate text_encoder_lr lr_warmup_steps lr_power
    adam_weight_decay adam_weight_decay_text_encoder"""


@pytest.mark.parametrize("name", NOT_NEGATIVE.split())
def test_zero_where_it_makes_sense(script, refused, argv, name):
    assert getattr(script.parse_args(argv(**{name: 0})), name) == 0
    assert refused(**{name: -1}).startswith(f"argument --{name}: -1 is out of range: give 0")


@pytest.mark.parametrize("kind", ["lora"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rank": 0}, "argument --rank: 0 is out of range: give 1 or more"),
        ({"lora_alpha": 0}, "argument --lora_alpha: 0 is out of range: give 1e-30 or more"),
        ({"lora_dropout": 1}, "argument --lora_dropout: 1 is out of range: give 0.0 or more, less than 1.0"),
        ({"lora_blocks": "0,2"}, "--lora_blocks: '2' is not a block; the transformer has blocks 0 to 1"),
        ({"lora_blocks": "0-2"}, "--lora_blocks: '0-2' is not a block; the transformer has blocks 0 to 1"),
        ({"lora_blocks": "1-0"}, "--lora_blocks: '1-0' is not a block; the transformer has blocks 0 to 1"),
        ({"lora_blocks": "0,x"}, "--lora_blocks: 'x' is not a block; the transformer has blocks 0 to 1"),
        (
            {"lora_layers": "attn.to_q,attn.to_x"},
            "--lora_layers: no layer is named 'attn.to_x'; there are attn.add_k_",
        ),
        (
            {"lora_blocks": "1", "lora_layers": "attn.to_add_out"},  # the last block has none
            "--lora_layers: no layer is named 'attn.to_add_out'; there are attn.add_k_proj",
        ),
    ],
)
def test_lora_refused(refused, flags, message):
    line = refused(**flags)
    assert line.startswith(message)
    if "attn.to_x" in message:
        assert "attn.to_k, attn.to_out.0, attn.to_q, attn.to_v, ff.net.0.proj" in line


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("prodigyopt", {"optimizer": "Prodigy"}),
        ("bitsandbytes", {"use_8bit_adam": True}),
        ("datasets", {"dataset_name": "x"}),
        ("wandb", {"report_to": "tensorboard,wandb"}),
        ("tensorboard", {"report_to": "tensorboard"}),
        ("comet_ml", {"report_to": "comet_ml"}),
    ],
)
def test_absent_package(refused, monkeypatch, package, flags):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    assert refused(**flags) == f"these flags need the {package} package: pip install {package}"


def test_unreadable_image(refused, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not an image")
    line = refused(instance_data_dir=tmp_path)
    assert line.startswith(f"--instance_data_dir (ValueError: the image {str(tmp_path / 'a.png')!r} cannot be read (")
    assert line.endswith("): repair or remove it)")


@pytest.fixture
def table(tmp_path):
    """A dataset of one picture with a column of text and one of numbers."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "0.png")
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text", "score"], ["0.png", "a dog", 3]])
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_column": "img"}, "--image_column 'img' is not in --dataset_name: its columns are image, text, score"),
        ({"caption_column": "cap"}, "--caption_column 'cap' is not in --dataset_name: its columns are image, text, s"),
        ({"image_column": "text"}, "--dataset_name (ValueError: the image 'a dog' cannot be read"),
    ],
)
def test_columns_of_a_dataset(refused, table, tmp_path, flags, message):
    line = refused(dataset_name=table, cache_dir=tmp_path / "cache", **flags)
    assert line.startswith(message)


def test_a_folder_whose_metadata_has_no_captions(refused, table, tmp_path):
    line = refused(instance_data_dir=table, caption_column="words", cache_dir=tmp_path / "cache")
    assert line == "--caption_column 'words' is not in --instance_data_dir: its columns are image, text, score"


def test_no_prompt_at_all(refused):
    line = refused(instance_prompt=None)
    assert line == "--instance_data_dir: 2 of 2 images have no caption: give --instance_prompt"


READ = """
import contextlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
for model in ("user/gated", "user/missing", "nowhere/at/all"):
    flags = ["--pretrained_model_name_or_path", model, "--instance_data_dir", ".", "--instance_prompt", "x"]
    try:
        script.main(script.parse_args([*flags, "--report_to", "none"]))
    except SystemExit as end:
        print(end.code)
"""
ACCESS = "give a diffusers folder or a Hub id; for a gated model accept its licence and run `hf auth login`"


@pytest.mark.parametrize(("kind", "offline"), [("full", False), ("lora", True)], ids=["hub", "offline"])
def test_hub_model_that_cannot_be_had(kind, tmp_path, offline):
    with HubStandIn() as hub:
        hub.add("user/gated", {"model_index.json": b"{}"})
        hub.fail("/user/gated/", 403, "GatedRepo")
        environment = {**os.environ, **hub.environment(tmp_path), "HF_HUB_OFFLINE": str(int(offline))}
        command = [sys.executable, "-c", READ, str(SCRIPTS[kind])]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2", "2", "2"], done.stderr
    lines = [line for line in done.stderr.splitlines() if " error: " in line]
    assert len(lines) == 3
    models = ("user/gated", "user/missing", "nowhere/at/all")
    for line, model in zip(lines, models, strict=True):
        start = f"--pretrained_model_name_or_path {model!r}: no model_index.json can be read: {ACCESS} ("
        assert line.startswith(f"-c: error: {start}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"class_data_dir": EMPTY}, ["class_data_dir"]),
        ({"class_data_dir": EMPTY, "class_prompt": "a dog"}, ["class_data_dir", "class_prompt"]),
        (PRIOR, []),
        ({}, []),
    ],
)
def test_class_flags_without_effect_are_said(script, argv, capsys, flags, said):
    script.parse_args(argv(**flags))
    lines = [f"--{name} has no effect without --with_prior_preservation" for name in said]
    assert capsys.readouterr().err.splitlines() == lines


def test_wrong_flags_are_refused_before_the_heavy_imports(script_path):
    """By the standard library alone: -S leaves the packages out."""
    flags = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "/nowhere", "--instance_prompt", "x"]
    command = [sys.executable, "-I", "-S", str(script_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    message = "error: --instance_data_dir '/nowhere' is not a folder: give the folder with the images"
    assert done.stderr == f"{script_path.name}: {message}\n"
