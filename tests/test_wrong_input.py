"""Wrong input ends in one line and exit code 2 before a model is loaded, and what has no effect is said."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import SCRIPTS, isolated
from hub_stand_in import HubStandIn
from PIL import Image

EMPTY = str(Path(tempfile.gettempdir(), "dreambooth-without-images"))
Path(EMPTY).mkdir(exist_ok=True)
PRIOR = {"with_prior_preservation": True, "class_data_dir": EMPTY, "class_prompt": "a dog"}


@pytest.fixture
def refused(script, argv, capsys, monkeypatch):
    """Runs a script that must refuse, with no model loaded, and gives the one line it ends with, less the name."""

    def refused(**flags):
        def load(*args, **kwargs):
            raise AssertionError("a model is loaded")

        monkeypatch.setattr(script, "load_frozen", load)
        monkeypatch.setattr(script, "load_trained", load)
        monkeypatch.setattr(sys, "argv", ["script.py"])
        with isolated(), pytest.raises(SystemExit) as end:
            script.main(script.parse_args(argv(**flags)))
        assert end.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("script.py: error: ")]
        assert len(lines) == 1
        return lines[0].removeprefix("script.py: error: ")

    return refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # Flags that contradict each other.
        ({"dataset_name": "d", "instance_data_dir": "i"}, "--dataset_name, --instance_data_dir: 'd' and 'i' given"),
        ({"instance_data_dir": None}, "--dataset_name, --instance_data_dir: neither of them given, give exactly one"),
        ({**PRIOR, "class_data_dir": None}, "--with_prior_preservation needs --class_data_dir"),
        ({**PRIOR, "class_prompt": None}, "--with_prior_preservation needs --class_prompt"),
        ({"aspect_ratio_buckets": "32,32"}, "--aspect_ratio_buckets needs --use_aspect_ratio_buckets"),
        ({"hub_token": "hf_x", "report_to": "wandb"}, "--hub_token would be readable in wandb"),
        ({"hub_token": "hf_x", "report_to": "tensorboard,all"}, "--hub_token would be readable in all"),
        # Choices and numbers.
        ({"optimizer": "sgd"}, "argument --optimizer: 'sgd' is no optimizer here; choose AdamW or prodigy"),
        ({"lr_scheduler": "step"}, "--lr_scheduler 'step' is unknown: choose from linear, cosine,"),
        ({"report_to": "paper"}, "--report_to 'paper' is unknown: choose from tensorboard, wandb,"),
        ({"mixed_precision": "fp8"}, "argument --mixed_precision: invalid choice: 'fp8'"),
        ({"weighting_scheme": "none"}, "argument --weighting_scheme: invalid choice: 'none'"),
        ({"prior_generation_precision": "fp8"}, "argument --prior_generation_precision: invalid choice: 'fp8'"),
        ({"prodigy_decouple": "maybe"}, "argument --prodigy_decouple: 'maybe' is neither true nor false"),
        ({"precondition_outputs": 2}, "--precondition_outputs 2 is out of range: give 0 or 1"),
        ({"max_sequence_length": 513}, "--max_sequence_length 513 is out of range: give 1 to 512"),
        ({"max_sequence_length": 0}, "--max_sequence_length 0 is out of range: give 1 to 512"),
        ({"resolution": 500}, "--resolution 500 is not a multiple of 16 (VAE 8, patch 2): 496 is the nearest"),
        ({"resolution": 0}, "--resolution 0 is not a multiple of 16 (VAE 8, patch 2): 16 is the nearest"),
        ({"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "33,32"}, "--aspect_ratio_buckets: '33,32' is no"),
        ({"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "0,32"}, "--aspect_ratio_buckets: '0,32' is no"),
        ({"adam_beta1": 1}, "--adam_beta1 1.0 is out of range: give 0 or greater, below 1"),
        ({"seed": -1}, "--seed -1 is out of range: give 0 to 4294967295"),
        ({"learning_rate": "nan"}, "--learning_rate nan is out of range"),
        ({"mode_scale": "inf"}, "--mode_scale inf is out of range: give a finite number"),
        ({"no_such_flag": 1}, "unrecognized arguments: --no_such_flag 1"),
        ({"repeats": "two"}, "argument --repeats: invalid int value: 'two'"),
        # Folders and files.
        (
            {"instance_data_dir": "/nowhere"},
            "--instance_data_dir '/nowhere' is not a folder: give the folder with the",
        ),
        ({"validation_data_dir": "/nowhere"}, "--validation_data_dir '/nowhere' is not a folder"),
        (
            {"instance_data_dir": EMPTY},
            f"--instance_data_dir {EMPTY!r} holds no image: give a folder with .avif, .bmp",
        ),
        ({"output_dir": __file__}, f"--output_dir {__file__!r} is a file: give a folder"),
        ({**PRIOR, "class_data_dir": __file__}, f"--class_data_dir {__file__!r} is a file: give a folder"),
        ({"logging_dir": "../logs"}, "--logging_dir '../logs' is not inside --output_dir"),
        ({"logging_dir": "."}, "--logging_dir '.' is not inside --output_dir"),
        (
            {"resume_from_checkpoint": "nowhere"},
            "--resume_from_checkpoint 'nowhere' is no folder, neither here nor in",
        ),
        ({"dataset_name": "/nowhere"}, "--dataset_name '/nowhere' cannot be read: "),
        # What only the model's configuration can tell; no weight is read for it.
        (
            {"resolution": 272},
            "--resolution: 272x272 is too large: the transformer has positions for 256 pixels a side",
        ),
        (
            {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "16,512"},
            "--aspect_ratio_buckets: 16x512 is too large: the transformer has positions for 256 pixels a side",
        ),
    ],
)
def test_refused(refused, flags, message):
    assert refused(**flags).startswith(message)


POSITIVE = """repeats num_class_images sample_batch_size train_batch_size num_train_epochs max_train_steps
    gradient_accumulation_steps max_grad_norm lr_num_cycles adam_epsilon num_validation_images validation_epochs
    checkpointing_steps checkpoints_total_limit logit_std"""


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", POSITIVE.split())
def test_zero_where_it_makes_no_sense(refused, name, value):
    assert refused(**{name: value}).endswith("is out of range: give a number greater than 0")


NOT_NEGATIVE = """dataloader_num_workers prior_loss_weight learning_rate text_encoder_lr lr_warmup_steps lr_power
    adam_weight_decay adam_weight_decay_text_encoder"""


@pytest.mark.parametrize("name", NOT_NEGATIVE.split())
def test_zero_where_it_makes_sense(script, refused, argv, name):
    assert getattr(script.parse_args(argv(**{name: 0})), name) == 0
    assert refused(**{name: -1}).endswith("is out of range: give a number 0 or greater")


@pytest.mark.parametrize("kind", ["lora"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rank": 0}, "--rank 0 is out of range: give a number greater than 0"),
        ({"lora_alpha": 0}, "--lora_alpha 0.0 is out of range: give a number greater than 0"),
        ({"lora_dropout": 1}, "--lora_dropout 1.0 is out of range: give 0 or greater, below 1"),
        ({"lora_blocks": "0,2"}, "--lora_blocks: '2' is no block; the transformer has blocks 0 to 1"),
        ({"lora_blocks": "0,x"}, "--lora_blocks: 'x' is no block; the transformer has blocks 0 to 1"),
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
    ("package", "flags", "message"),
    [
        ("prodigyopt", {"optimizer": "Prodigy"}, "--optimizer prodigy needs the prodigyopt package"),
        ("bitsandbytes", {"use_8bit_adam": True}, "--use_8bit_adam needs the bitsandbytes package"),
        ("datasets", {"dataset_name": "x"}, "--dataset_name needs the datasets package"),
        ("wandb", {"report_to": "tensorboard,wandb"}, "--report_to wandb needs the wandb package"),
        ("tensorboard", {"report_to": "tensorboard"}, "--report_to tensorboard needs the tensorboard package"),
        ("comet_ml", {"report_to": "comet_ml"}, "--report_to comet_ml needs the comet_ml package"),
    ],
)
def test_absent_package(refused, monkeypatch, package, flags, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    assert refused(**flags) == f"{message}: pip install {package}"


def test_unreadable_image(refused, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not an image")
    line = refused(instance_data_dir=tmp_path)
    assert line.startswith(f"--instance_data_dir: the image {str(tmp_path / 'a.png')!r} cannot be read (")
    assert line.endswith("): repair it or take it away")


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
        ({"image_column": "img"}, "--image_column 'img' is not in the dataset: its columns are image, text, score"),
        (
            {"caption_column": "cap"},
            "--caption_column 'cap' is not in the dataset: its columns are image, text, score",
        ),
        ({"caption_column": "score"}, "--caption_column 'score' holds '3': a caption is a string"),
        ({"image_column": "text"}, "--dataset_name: the image 'a dog' cannot be read"),
        ({"dataset_split": "test"}, "--dataset_name"),
    ],
)
def test_columns_of_a_dataset(refused, table, tmp_path, flags, message):
    line = refused(dataset_name=table, cache_dir=tmp_path / "cache", **flags)
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"file_name": "0.png", "prompt": "x"}',
            "a row has the columns file_name, prompt; it needs file_name and text",
        ),
        ("{", "cannot be read: "),
    ],
)
def test_metadata_of_a_folder(refused, tmp_path, text, message):
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    line = refused(instance_data_dir=tmp_path)
    assert line.startswith(f"{tmp_path / 'metadata.jsonl'}")
    assert message in line


def test_no_prompt_at_all(refused):
    line = refused(instance_prompt=None)
    assert line == "--instance_data_dir: 2 of 2 images have no caption: give --instance_prompt for them"


def test_captions_without_an_image_are_named(script, argv, tmp_path, caplog):
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a dog")
    (tmp_path / "1.txt").write_text("a cat")
    rows = [{"file_name": "0.png", "text": "a dog"}, {"file_name": "7.png", "text": "a cat"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with isolated():
        args = script.parse_args(argv(instance_data_dir=tmp_path))
        script.start_accelerator(args)
        caplog.set_level("INFO")
        _, prompts, _ = script.read_instances(args)
    assert prompts == ["a dog"]
    assert f"--instance_data_dir {tmp_path}: passed over 1.txt" in caplog.text
    assert f"{tmp_path}: the metadata has captions for images that are not there: 7.png" in caplog.text


def spoil(folder, name, text=None):
    """Takes a file or folder of a copied checkpoint away, or writes another text into it."""
    if text is not None:
        (folder / name).write_text(text)
    elif (folder / name).is_dir():
        (folder / name).rename(folder / f"not_{name}")
    else:
        (folder / name).unlink()


OTHER = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
NO_JSON = "has no model_index.json that can be read ("


@pytest.mark.parametrize(
    ("name", "text", "flags", "message"),
    [
        ("model_index.json", None, {}, NO_JSON),
        ("model_index.json", "{", {}, NO_JSON),
        ("vae", None, {}, "is no whole SD3 pipeline: no vae"),
        ("text_encoder_3", None, {}, "is no whole SD3 pipeline: no text_encoder_3"),
        ("transformer/config.json", None, {}, "is no whole SD3 pipeline: no transformer"),
        ("vae/diffusion_pytorch_model.safetensors", None, {}, "is no whole SD3 pipeline: no vae"),
        ("tokenizer_2", None, {}, "is no whole SD3 pipeline: no tokenizer_2"),
        ("scheduler/scheduler_config.json", None, {}, "is no whole SD3 pipeline: no scheduler"),
        ("model_index.json", "{}", {}, "is no whole SD3 pipeline: no scheduler, text_encoder, text_encoder_2, tok"),
        ("model_index.json", OTHER, {}, "is no SD3 pipeline: it has a FluxTransformer2DModel"),
        ("model_index.json", "", {"variant": "fp16"}, NO_JSON),
        ("README.md", "", {"variant": "fp16"}, "is no whole SD3 pipeline: no text_encoder, text_encoder_2, text_en"),
    ],
)
def test_folder_without_the_parts_of_a_pipeline(refused, checkpoints, tmp_path, name, text, flags, message):
    folder = tmp_path / "model"
    for path in checkpoints().rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(checkpoints())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    if text is not None and (folder / name).exists():
        (folder / name).unlink()
    if isinstance(text, dict):
        text = json.dumps(json.loads((checkpoints() / name).read_text()) | text)
    spoil(folder, name, text)
    line = refused(pretrained_model_name_or_path=folder, **flags)
    assert line.startswith(f"--pretrained_model_name_or_path {str(folder)!r} {message}")


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
ACCESS = "for a gated one accept its licence at https://huggingface.co/{} and run `hf auth login`"


@pytest.mark.parametrize("offline", [False, True], ids=["hub", "offline"])
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
    causes = ("(403 ", "(404 ", "Repo id must be in the form")
    for line, model, cause in zip(lines, models, causes, strict=True):
        start = f"--pretrained_model_name_or_path {model!r} has no model_index.json that can be read ("
        assert line.startswith(f"-c: error: {start}")
        assert line.endswith(ACCESS.format(model))
        assert offline or cause in line
    assert "Traceback" not in done.stderr


def idle(script, argv, capsys, monkeypatch, **flags):
    """What a script says on stderr of flags without effect."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    script.parse_args(argv(**flags))
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"class_data_dir": EMPTY}, "--class_data_dir has no effect without --with_prior_preservation"),
        (
            {"class_data_dir": EMPTY, "class_prompt": "a dog"},
            "--class_data_dir, --class_prompt have no effect without --with_prior_preservation",
        ),
        ({"sample_batch_size": 2}, "--sample_batch_size has no effect without --with_prior_preservation"),
        ({"text_encoder_lr": 1e-5}, "--text_encoder_lr has no effect without --train_text_encoder"),
        ({"optimizer": "prodigy", "use_8bit_adam": True}, "--use_8bit_adam has no effect with --optimizer prodigy"),
        (
            {"optimizer": "prodigy", "train_text_encoder": True, "text_encoder_lr": 0},
            "--text_encoder_lr has no effect with --optimizer prodigy",
        ),
        ({"prodigy_decouple": "false"}, "--prodigy_decouple has no effect with --optimizer AdamW"),
        ({"prodigy_beta3": 0.9}, "--prodigy_beta3 has no effect with --optimizer AdamW"),
        ({"lr_warmup_steps": 10}, "--lr_warmup_steps has no effect with --lr_scheduler constant"),
        ({"lr_power": 2}, "--lr_power has no effect with --lr_scheduler constant"),
        ({"lr_num_cycles": 2}, "--lr_num_cycles has no effect with --lr_scheduler constant"),
        ({"mode_scale": 1}, "--mode_scale has no effect with --weighting_scheme logit_normal"),
        (
            {"weighting_scheme": "mode", "logit_std": 2},
            "--logit_std has no effect with --weighting_scheme mode",
        ),
        ({"ema_decay": 0.9}, "--ema_decay has no effect without --use_ema"),
        ({"image_column": "img"}, "--image_column has no effect without --dataset_name"),
        ({"num_validation_images": 2}, "--num_validation_images has no effect without --validation_prompt"),
        ({"hub_model_id": "user/dog"}, "--hub_model_id has no effect without --push_to_hub"),
        ({"revision": "main"}, "--revision has no effect on a folder"),
        (
            {"caption_column": "words"},
            "--caption_column has no effect without --dataset_name or a metadata file in the folder",
        ),
        ({"num_train_epochs": 3}, "--num_train_epochs has no effect with --max_train_steps 2"),
        ({"num_class_images": 100}, "--num_class_images has no effect without --with_prior_preservation"),  # default
    ],
)
def test_flags_without_effect_are_said(script, argv, capsys, monkeypatch, flags, line):
    assert idle(script, argv, capsys, monkeypatch, **flags) == [f"script.py: {line}"]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        PRIOR | {"num_class_images": 3, "sample_batch_size": 2, "prior_loss_weight": 0.5},
        {"train_text_encoder": True, "text_encoder_lr": 1e-5, "use_8bit_adam": True},
        {"optimizer": "prodigy", "prodigy_decouple": "false", "learning_rate": 1, "lr_scheduler": "constant"},
        {"lr_scheduler": "polynomial", "lr_power": 2, "lr_warmup_steps": 10},
        {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
        {"weighting_scheme": "mode", "mode_scale": 1},
        {"push_to_hub": True, "hub_model_id": "user/dog"},
        {"max_train_steps": None, "num_train_epochs": 3},
    ],
)
def test_nothing_is_said_of_flags_with_an_effect(script, argv, capsys, monkeypatch, flags):
    assert idle(script, argv, capsys, monkeypatch, **flags) == []


def test_one_process_speaks_of_idle_flags(script, argv, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert idle(script, argv, capsys, monkeypatch, lr_power=2) == []


def test_wrong_flags_are_refused_before_the_heavy_imports(script_path):
    """By the standard library alone: -S leaves the packages out."""
    flags = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "/nowhere", "--instance_prompt", "x"]
    command = [sys.executable, "-I", "-S", str(script_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    message = "error: --instance_data_dir '/nowhere' is not a folder: give the folder with the images"
    assert done.stderr == f"{script_path.name}: {message}\n"
