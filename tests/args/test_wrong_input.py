"""Wrong input ends in one line and exit code 2 before a model is loaded."""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from accelerate import tracking
from conftest import in_turn
from PIL import Image

EMPTY = str(Path(tempfile.gettempdir(), "dreambooth-without-images"))
Path(EMPTY).mkdir(exist_ok=True)
NO_IMAGE = "--{} {!r} has no image: give a folder of .jpg, .jpeg, "
NEITHER = "--dataset_name, --instance_data_dir: give exactly one of the two"
NO_FIT = "these flags of the optimizer and its schedule do not fit together ("
PRIOR = {"with_prior_preservation": True, "class_data_dir": EMPTY, "class_prompt": "a dog"}


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    in_turn(
        [
            # Flags that contradict each other.
            ({"dataset_name": "d", "instance_data_dir": "i"}, "--dataset_name, --instance_data_dir: give exactly one"),
            ({"instance_data_dir": None}, NEITHER),
            ({**PRIOR, "class_data_dir": None}, "--with_prior_preservation needs --class_data_dir and --class_prompt"),
            ({**PRIOR, "class_prompt": None}, "--with_prior_preservation needs --class_data_dir and --class_prompt"),
            ({"hub_token": "hf_x", "report_to": "wandb"}, "--hub_token would be readable in wandb"),
            (
                {"hub_token": "hf_x", "report_to": "tensorboard,all"},
                "--hub_token would be readable in tensorboard,all",
            ),
            # Choices and numbers.
            ({"optimizer": "sgd"}, "argument --optimizer: invalid choice: 'sgd'"),
            ({"lr_scheduler": "step"}, f"{NO_FIT}ValueError: 'step' is not a valid SchedulerType)"),
            ({"mixed_precision": "fp8"}, "argument --mixed_precision: invalid choice: 'fp8'"),
            ({"weighting_scheme": "uniform"}, "argument --weighting_scheme: invalid choice: 'uniform'"),
            ({"prior_generation_precision": "fp8"}, "argument --prior_generation_precision: invalid choice: 'fp8'"),
            ({"prodigy_decouple": "maybe"}, "argument --prodigy_decouple: invalid boolean value: 'maybe'"),
            ({"precondition_outputs": 2}, "argument --precondition_outputs: 2 is out of range: give 0..1"),
            ({"max_sequence_length": 513}, "argument --max_sequence_length: 513 is out of range: give 1..512"),
            ({"max_sequence_length": 0}, "argument --max_sequence_length: 0 is out of range: give 1..512"),
            (
                {"resolution": 500},
                "--resolution, --aspect_ratio_buckets: 500 pixels: give multiples of 16, here up to 256",
            ),
            ({"resolution": 0}, "argument --resolution: 0 is out of range: give 16..1e9"),
            (
                {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "33,32"},
                "--resolution, --aspect_ratio_buckets: 33 pixels: give mul",
            ),
            (
                {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "0,32"},
                "--aspect_ratio_buckets '0,32': give ",
            ),
            ({"adam_beta1": 1}, f"{NO_FIT}ValueError: Invalid beta parameter at index 0: 1.0)"),
            ({"seed": -1}, "argument --seed: -1 is out of range: give 0..4294967295"),
            ({"learning_rate": "nan"}, "argument --learning_rate: nan is out of range"),
            ({"learning_rate": "inf"}, "argument --learning_rate: inf is out of range"),
            ({"logit_mean": "nan"}, "argument --logit_mean: nan is out of range"),
            ({"mode_scale": "nan"}, "argument --mode_scale: nan is out of range"),
            ({"mode_scale": -1.1}, "argument --mode_scale: -1.1 is out of range: give -1..1.75"),
            ({"mode_scale": 1.8}, "argument --mode_scale: 1.8 is out of range: give -1..1.75"),
            ({"instance_prompt": "\udcff dog"}, "argument --instance_prompt: invalid utf8 value: '\\udcff dog'"),
            ({"pretrained_model_name_or_path": "\udcff"}, "argument --pretrained_model_name_or_path: invalid utf8 "),
            # Found out by making the optimizer and its schedule.
            ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, NO_FIT),
            ({"optimizer": "prodigy", "learning_rate": 0}, NO_FIT),
            ({"no_such_flag": 1}, "unrecognized arguments: --no_such_flag 1"),
            ({"repeats": "two"}, "argument --repeats: invalid number value: 'two'"),
            # Folders and files.
            ({"instance_data_dir": "/nowhere"}, NO_IMAGE.format("instance_data_dir", "/nowhere")),
            ({"validation_data_dir": "/nowhere"}, NO_IMAGE.format("validation_data_dir", "/nowhere")),
            ({"instance_data_dir": "x" * 300}, f"--instance_data_dir {'x' * 300!r} cannot be read ("),
            ({"instance_data_dir": EMPTY}, NO_IMAGE.format("instance_data_dir", EMPTY)),
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
                "--resolution, --aspect_ratio_buckets: 272 pixels: give multiples of 16, here up to 256",
            ),
            (
                {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "16,512"},
                "--resolution, --aspect_ratio_buckets: 512 pixels: give multiples of 16, here up to 256",
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


NO_LAYER = "--lora_blocks, --lora_layers: nothing matches {}; there are 2 blocks; first: ['transformer_blocks.0."


@pytest.mark.parametrize("kind", ["lora"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rank": 0}, "argument --rank: 0 is out of range: give 1..10000"),
        ({"lora_alpha": 0}, "argument --lora_alpha: 0 is out of range: give 1e-30..1e30"),
        ({"lora_dropout": 1.1}, "argument --lora_dropout: 1.1 is out of range: give 0..1"),
        ({"lora_blocks": "0,2"}, NO_LAYER.format("transformer_blocks.2.*")),
        ({"lora_blocks": "1-0"}, NO_LAYER.format("transformer_blocks.1-0.*")),
        ({"lora_blocks": "0,x"}, NO_LAYER.format("transformer_blocks.x.*")),
        ({"lora_layers": "attn.to_q,attn.to_x"}, NO_LAYER.format("*.attn.to_x")),
        # The last block has none.
        ({"lora_blocks": "1", "lora_layers": "attn.to_add_out"}, NO_LAYER.format("*.attn.to_add_out")),
    ],
)
def test_lora_refused(refused, flags, message):
    line = refused(**flags)
    assert line.startswith(message)
    if "attn.to_x" in message:
        layers = ("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v", "ff.net.0.proj")
        assert all(f"'transformer_blocks.0.{layer}'" in line for layer in layers)


@pytest.mark.parametrize(
    ("kind", "package", "flags", "message"),
    in_turn(
        [
            ("prodigyopt", {"optimizer": "Prodigy"}, NO_FIT),
            ("bitsandbytes.optim", {"use_8bit_adam": True}, NO_FIT),
            ("datasets", {"dataset_name": "x"}, "--dataset_name 'x' cannot be read: "),
        ]
    ),
)
def test_absent_package(refused, monkeypatch, package, flags, message):
    monkeypatch.setitem(sys.modules, package, None)  # an import of it then raises ModuleNotFoundError
    line = refused(**flags)
    assert line.startswith(message)
    assert f"(ModuleNotFoundError: import of {package} halted" in line


@pytest.mark.parametrize(
    ("kind", "package", "trackers"), in_turn([("wandb", "tensorboard,wandb"), ("tensorboard", "tensorboard")])
)
def test_absent_tracker(script, refusal, monkeypatch, package, trackers):
    """accelerate passes over it. It is refused before anything is encoded."""
    present = [name for name in tracking._available_trackers if name.value != package]
    monkeypatch.setattr(tracking, "_available_trackers", present)
    monkeypatch.setattr(script.PromptTable, "fill", None)
    line = refusal(report_to=trackers)
    assert line.startswith(f"--report_to {trackers}: could not start a tracker; fix it or drop it from --report_to (")
    assert line.endswith(f": pip install {package})")


@pytest.mark.parametrize(("kind", "trackers", "name"), in_turn([("paper", "paper"), ("none,tensorboard", "none")]))
def test_a_tracker_that_accelerate_does_not_know(refused, trackers, name):
    line = refused(report_to=trackers)
    message = f"ValueError: Unsupported logging capability: {name}. Choose between ['all', "
    assert line.startswith(f"accelerate takes no --mixed_precision None with --report_to {trackers} ({message}")


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
    ("kind", "flags", "message"),
    in_turn(
        [
            (
                {"image_column": "img"},
                "['img'] not in the dataset. Current columns in the dataset: ['image', 'text', 'score']",
            ),
            ({"caption_column": "cap"}, "Column 'cap' doesn't exist."),
            ({"image_column": "text"}, "1 of 1 images are broken: the image a dog cannot be read ("),
            ({"caption_column": "score"}, "the caption of row 0 is 3: give a text or a list of texts"),
        ]
    ),
)
def test_columns_of_a_dataset(refused, table, tmp_path, flags, message):
    line = refused(dataset_name=table, cache_dir=tmp_path / "cache", **flags)
    assert message in line
    if "column" in message.lower():
        assert line.startswith(f"--dataset_name {str(table)!r} cannot be read: give a Hub id")


@pytest.mark.parametrize("kind", ["lora"])
def test_a_folder_whose_metadata_has_no_captions(refused, table, tmp_path):
    line = refused(instance_data_dir=table, caption_column="words", cache_dir=tmp_path / "cache")
    assert line.startswith(f"--instance_data_dir {str(table)!r} cannot be read: ")
    assert line.endswith(" (ValueError: Column 'words' doesn't exist.)")


@pytest.mark.parametrize("kind", ["full"])
def test_no_prompt_at_all(refused):
    line = refused(instance_prompt=None)
    assert line == "--instance_data_dir: 2 of 2 images have no caption: give --instance_prompt"


@pytest.mark.parametrize(
    ("kind", "option", "rank", "message"),
    [
        ("full", "-S", "0", NEITHER),
        ("lora", "-S", "0", NEITHER),
        ("full", "-S", "", NEITHER),
        ("lora", "-OO", "0", "transformers needs the docstrings that `python -OO` leaves out: take -O or neither"),
    ],
)
def test_wrong_flags_are_refused_before_the_heavy_imports(script_path, option, rank, message):
    """By the standard library alone: -S leaves the packages out. A launcher may set LOCAL_RANK to nothing."""
    flags = ["--pretrained_model_name_or_path", "x", "--instance_prompt", "x"]
    command = [sys.executable, "-I", option, str(script_path), *flags]
    environment = {**os.environ, "LOCAL_RANK": rank}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"{script_path.name}: error: {message}\n")
