"""Wrong input ends in one line and exit code 2 before a model is loaded."""

import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import in_turn
from PIL import Image

EMPTY = str(Path(tempfile.gettempdir(), "dreambooth-without-images"))
Path(EMPTY).mkdir(exist_ok=True)
NO_FOLDER = "--instance_data_dir '/nowhere' is not a folder: give the folder with the images"
PRIOR = {"with_prior_preservation": True, "class_data_dir": EMPTY, "class_prompt": "a dog"}


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    in_turn(
        [
            # Flags that contradict each other.
            ({"dataset_name": "d", "instance_data_dir": "i"}, "--dataset_name, --instance_data_dir: give exactly one"),
            ({"instance_data_dir": None}, "--dataset_name, --instance_data_dir: give exactly one of the two"),
            ({**PRIOR, "class_data_dir": None}, "--with_prior_preservation needs --class_data_dir"),
            ({**PRIOR, "class_prompt": None}, "--with_prior_preservation needs --class_prompt"),
            ({"hub_token": "hf_x", "report_to": "wandb"}, "--hub_token would be readable in wandb"),
            (
                {"hub_token": "hf_x", "report_to": "tensorboard,all"},
                "--hub_token would be readable in tensorboard,all",
            ),
            # Choices and numbers.
            ({"optimizer": "sgd"}, "argument --optimizer: invalid choice: 'sgd'"),
            ({"lr_scheduler": "step"}, "argument --lr_scheduler: invalid choice: 'step'"),
            ({"report_to": "paper"}, "--report_to 'paper' is unknown: choose from tensorboard, wandb,"),
            ({"mixed_precision": "fp8"}, "argument --mixed_precision: invalid choice: 'fp8'"),
            ({"weighting_scheme": "uniform"}, "argument --weighting_scheme: invalid choice: 'uniform'"),
            ({"prior_generation_precision": "fp8"}, "argument --prior_generation_precision: invalid choice: 'fp8'"),
            ({"report_to": "none,tensorboard"}, "--report_to 'none' is unknown: choose from tensorboard, wandb,"),
            ({"prodigy_decouple": "maybe"}, "argument --prodigy_decouple: invalid boolean value: 'maybe'"),
            ({"precondition_outputs": 2}, "argument --precondition_outputs: invalid choice: 2"),
            (
                {"max_sequence_length": 513},
                "argument --max_sequence_length: 513 is out of range: give 1 or more, less t",
            ),
            (
                {"max_sequence_length": 0},
                "argument --max_sequence_length: 0 is out of range: give 1 or more, less than",
            ),
            ({"resolution": 500}, "--resolution 500 is not a multiple of 16 (VAE 8, patch 2): 496 is the nearest"),
            ({"resolution": 0}, "argument --resolution: 0 is out of range: give 16 or more"),
            (
                {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "33,32"},
                "33 pixels are no side of a crop: give mul",
            ),
            (
                {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "0,32"},
                "--aspect_ratio_buckets '0,32': give ",
            ),
            ({"adam_beta1": 1}, "argument --adam_beta1: 1 is out of range: give 0.0 or more, less than 1.0"),
            ({"seed": -1}, "argument --seed: -1 is out of range: give 0 or more, less than 4294967296"),
            ({"learning_rate": "nan"}, "argument --learning_rate: nan is out of range"),
            ({"learning_rate": "inf"}, "argument --learning_rate: inf is out of range"),
            ({"logit_mean": "nan"}, "argument --logit_mean: nan is out of range"),
            ({"mode_scale": "nan"}, "argument --mode_scale: nan is out of range"),
            ({"mode_scale": -1.1}, "argument --mode_scale: -1.1 is out of range: give -1.0 or more, less than 1.752"),
            ({"mode_scale": 1.8}, "argument --mode_scale: 1.8 is out of range: give -1.0 or more, less than 1.752"),
            ({"instance_prompt": "\udcff dog"}, "argument --instance_prompt: invalid utf8 value: '\\udcff dog'"),
            # Found out by making the optimizer and its schedule.
            (
                {"lr_scheduler": "polynomial", "learning_rate": 1e-7},
                "these flags of the optimizer and its schedule do",
            ),
            ({"optimizer": "prodigy", "learning_rate": 0}, "these flags of the optimizer and its schedule do not fit"),
            ({"no_such_flag": 1}, "unrecognized arguments: --no_such_flag 1"),
            ({"repeats": "two"}, "argument --repeats: invalid int value: 'two'"),
            # Folders and files.
            (
                {"instance_data_dir": "/nowhere"},
                "--instance_data_dir '/nowhere' is not a folder: give the folder with the",
            ),
            ({"validation_data_dir": "/nowhere"}, "--validation_data_dir '/nowhere' is not a folder"),
            ({"instance_data_dir": "x" * 300}, f"--instance_data_dir {'x' * 300!r} is not a folder"),
            (
                {"instance_data_dir": EMPTY},
                "--instance_data_dir: there is no image: give a folder that directly holds",
            ),
            (
                {"logging_dir": "../logs"},
                "--logging_dir, --tracker_run_name, --tracker_project_name: '../logs/dreambooth-sd3",
            ),
            (
                {"resume_from_checkpoint": "nowhere"},
                "--resume_from_checkpoint 'nowhere': no whole checkpoint, neither",
            ),
            ({"dataset_name": "/nowhere"}, "--dataset_name '/nowhere' cannot be read: give a Hub id"),
            # What only the model's configuration can tell; no weight is read for it.
            (
                {"resolution": 272},
                "272 pixels are no side of a crop: give multiples of 16, at most this transformer's 256",
            ),
            (
                {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "16,512"},
                "512 pixels are no side of a crop: give multiples of 16, at most this transformer's 256",
            ),
        ]
    ),
)
def test_refused(refused, flags, message):
    assert refused(**flags).startswith(message)


POSITIVE = """repeats num_class_images sample_batch_size train_batch_size num_train_epochs max_train_steps
    gradient_accumulation_steps max_grad_norm lr_num_cycles adam_epsilon num_validation_images validation_epochs
    checkpointing_steps checkpoints_total_limit logit_std"""


def test_zero_where_it_makes_no_sense(lora, argv, capsys):
    for name in POSITIVE.split():
        for value in (0, -1):
            with pytest.raises(SystemExit) as end:
                lora.parse_args(argv(**{name: value}))
            assert end.value.code == 2
            assert f": error: argument --{name}: {value} is out of range: give 1" in capsys.readouterr().err


NOT_NEGATIVE = """dataloader_num_workers prior_loss_weight learning_rate text_encoder_lr lr_warmup_steps lr_power
    adam_weight_decay adam_weight_decay_text_encoder"""


def test_zero_where_it_makes_sense(lora, argv, capsys):
    for name in NOT_NEGATIVE.split():
        assert getattr(lora.parse_args(argv(**{name: 0})), name) == 0
        with pytest.raises(SystemExit) as end:
            lora.parse_args(argv(**{name: -1}))
        assert end.value.code == 2
        assert f": error: argument --{name}: -1 is out of range: give 0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lora"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rank": 0}, "argument --rank: 0 is out of range: give 1 or more"),
        ({"lora_alpha": 0}, "argument --lora_alpha: 0 is out of range: give 1e-30 or more"),
        ({"lora_dropout": 1}, "argument --lora_dropout: 1 is out of range: give 0.0 or more, less than 1.0"),
        ({"lora_blocks": "0,2"}, "--lora_blocks: '2' is not a block; the transformer has blocks 0 to 1"),
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
    ("kind", "package", "flags"),
    in_turn(
        [
            ("prodigyopt", {"optimizer": "Prodigy"}),
            ("bitsandbytes", {"use_8bit_adam": True}),
            ("datasets", {"dataset_name": "x"}),
            ("wandb", {"report_to": "tensorboard,wandb"}),
            ("tensorboard", {"report_to": "tensorboard"}),
        ]
    ),
)
def test_absent_package(refused, monkeypatch, package, flags):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    assert refused(**flags) == f"these flags need the {package} package: pip install {package}"


@pytest.fixture
def table(tmp_path):
    """A dataset of one picture with a column of text and one of numbers."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "0.png")
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text", "score"], ["0.png", "a dog", 3]])
    return folder


COLUMNS = "but image, text, score"


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    in_turn(
        [
            ({"image_column": "img"}, f"has no column img, {COLUMNS}"),
            ({"caption_column": "cap"}, f"has no column cap, {COLUMNS}"),
            ({"image_column": "text"}, "1 of 1 images are broken: the image 'a dog' cannot be read ("),
            ({"caption_column": "score"}, "the caption of row 0 is 3: give a text or a list of texts"),
        ]
    ),
)
def test_columns_of_a_dataset(refused, table, tmp_path, flags, message):
    assert message in refused(dataset_name=table, cache_dir=tmp_path / "cache", **flags)


@pytest.mark.parametrize("kind", ["lora"])
def test_a_folder_whose_metadata_has_no_captions(refused, table, tmp_path):
    line = refused(instance_data_dir=table, caption_column="words", cache_dir=tmp_path / "cache")
    assert line == f"--instance_data_dir {str(table)!r} has no column words, {COLUMNS}"


@pytest.mark.parametrize("kind", ["full"])
def test_no_prompt_at_all(refused):
    line = refused(instance_prompt=None)
    assert line == "--instance_data_dir: 2 of 2 images have no caption: give --instance_prompt"


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    in_turn(
        [
            ({"class_data_dir": EMPTY, "class_prompt": "a dog"}, ["class_data_dir", "class_prompt"]),
            (PRIOR, []),
        ]
    ),
)
def test_class_flags_without_effect_are_said(script, argv, capsys, flags, said):
    script.parse_args(argv(**flags))
    lines = [f"--{name} has no effect without --with_prior_preservation" for name in said]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(
    ("kind", "option", "rank", "message"),
    [
        ("full", "-S", "0", NO_FOLDER),
        ("lora", "-S", "0", NO_FOLDER),
        ("full", "-S", "", NO_FOLDER),
        ("lora", "-OO", "0", "transformers needs the docstrings that `python -OO` leaves out: take -O or neither"),
    ],
)
def test_wrong_flags_are_refused_before_the_heavy_imports(script_path, option, rank, message):
    """By the standard library alone: -S leaves the packages out. A launcher may set LOCAL_RANK to nothing."""
    flags = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "/nowhere", "--instance_prompt", "x"]
    command = [sys.executable, "-I", option, str(script_path), *flags]
    environment = {**os.environ, "LOCAL_RANK": rank}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"{script_path.name}: error: {message}\n")
