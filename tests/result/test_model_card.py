"""The model card: what it says of base model and run, that its program runs, and that a person's card is kept."""

import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState
from conftest import SCRIPTS, isolated
from PIL import Image


def read_card(path):
    """The card's header as a dict, its text and its program."""
    _, header, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(header), text, re.search(r"```py\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture
def write(script, argv, tmp_path):
    """Writes the card of a run with some flags, and returns its path."""

    def write(images=(), **flags):
        out = tmp_path / "dog"
        out.mkdir(exist_ok=True)
        with isolated():
            PartialState(cpu=True)  # for what is logged
            args = script.parse_args(argv(output_dir=out, **flags))
            parts = script.read_pipeline(args)
            history = [{"seconds_per_update": 2.0, "memory_gb": 3.0}] * 7  # of a run that resumed after two
            state = script.Progress({}, {}, 9, 9, True, history=history)
            script.write_card(args, parts, "user/dog", state, [out / name for name in images])
        return out / "README.md"

    return write


@pytest.mark.parametrize("model", ["stabilityai/stable-diffusion-3.5-large", "me/my-sd3"])
def test_base_model(script, kind, write, monkeypatch, model):
    monkeypatch.setattr(script, "read_pipeline", lambda args: dict.fromkeys(["text_encoder_3", "tokenizer_3"]))
    header, text, program = read_card(write(pretrained_model_name_or_path=model))
    assert header["base_model"] == model
    assert header["license"] == "other"
    assert header["license_name"] == "stabilityai-ai-community"
    assert header["license_link"] == script.LICENCE
    assert {"sd3", "sd3-diffusers", "text-to-image"} <= set(header["tags"])
    assert ("lora" in header["tags"]) == (kind == "lora")
    assert header["library_name"] == "diffusers"
    assert header["instance_prompt"] == "a photo of sks dog"
    assert f"DreamBooth weights for {model}, trained for 9 updates: 7 updates in 14 s (2.00 s each), at most" in text
    assert f"[licence]({script.LICENCE})" in text
    assert "widget" not in header
    assert "<Gallery />" not in text
    assert "'user/dog'" in program
    assert (repr(model) in program) == (kind == "lora")


def test_gallery_and_odd_prompts(write):
    prompt, images = 'a "dog": it\'s\na cat # no', ["image_0.png", "image_1.png"]
    header, text, program = read_card(write(images, validation_prompt=prompt, instance_prompt=None))
    assert header["widget"] == [{"text": prompt, "output": {"url": name}} for name in images]
    assert "<Gallery />" in text
    assert "base_model" not in header  # a folder here is no model on the Hub, which refuses such a card
    assert "None" not in text
    compile(program, "card", "exec")
    assert repr(prompt) in program


def test_a_card_has_neither_secrets_nor_folders(write, checkpoints, pictures):
    text = write(hub_token="hf_secret", push_to_hub=True).read_text()
    assert checkpoints().name in text
    for absent in ("hf_secret", str(pictures()), str(checkpoints())):
        assert absent not in text, absent


def test_a_card_that_nobody_has_changed_is_replaced(write):
    path = write()
    text = path.read_text()
    assert write().read_text() == text
    assert write(instance_prompt="a photo of another dog").read_text() != text
    assert [path.name for path in path.parent.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n## Notes\n\nFrom my garden.\n",
        lambda text: text.replace("DreamBooth weights", "Rex is two years old. DreamBooth weights"),
        lambda text: text.replace("license: other\n", "license: other\nlanguage: en\n"),
        lambda text: "# Rex\n\nMy dog.\n",
        lambda text: text[: len(text) // 2],
    ],
    ids=["added at the end", "added inside", "header changed", "a person's own", "cut off"],
)
def test_a_card_that_a_person_changed_is_put_aside(write, caplog, change):
    path = write()
    text = path.read_text()
    path.write_text(change(text))
    assert write().read_text() == text
    (aside,) = path.parent.glob("README.*.md")
    assert aside.read_text() == change(text)
    assert aside.name in caplog.text


@pytest.mark.parametrize(
    ("kind", "model", "flags"),
    [
        *((kind, {}, {"max_sequence_length": 96, "validation_prompt": None}) for kind in SCRIPTS),
        *((kind, {"t5": False}, {}) for kind in SCRIPTS),
        *((kind, {}, {"no_t5": True, "train_text_encoder": True}) for kind in SCRIPTS),
        ("full", {"variant": "fp16"}, {"variant": "fp16"}),  # a program for adapters does not name it
    ],
)
def test_program_runs_as_printed(script, run, few_steps, checkpoints, tmp_path, monkeypatch, model, flags):
    base = checkpoints(**model)
    out = run(script, pretrained_model_name_or_path=base, max_train_steps=1, **flags)
    _, _, program = read_card(out / "README.md")
    (tmp_path / base.name).symlink_to(base)  # the card does not say what lies above it
    monkeypatch.chdir(tmp_path)
    names = {}
    with isolated():
        exec(program, names)
    assert Image.open("image.png").size == (32, 32)
    assert f'"max_sequence_length": {flags.get("max_sequence_length", 77)}' in program
    pipeline = names["pipeline"]
    assert pipeline.transformer.dtype == torch.bfloat16
    assert (pipeline.text_encoder_3 is None) == (model == {"t5": False} or "no_t5" in flags)
    if "lora" in script.__name__:
        assert pipeline.get_list_adapters().keys() >= {"transformer"}


def test_the_token_is_in_nothing_that_is_kept(script, argv):
    """What goes into checkpoints and trackers comes from describe_run."""
    token = "hf_SecretOfTheTest"
    args = script.parse_args(argv(hub_token=token, push_to_hub=True, report_to="tensorboard"))
    kept = script.describe_run(args, SimpleNamespace(num_processes=1))
    assert token not in repr(kept)
    assert vars(args).keys() - kept.keys() == {"hub_token"}


def test_a_card_does_not_publish_where_the_run_wrote(script, run, tmp_path):
    out = run(script, max_train_steps=1, output_dir=tmp_path / "dog-of-mine")
    text = (out / "README.md").read_text()
    assert str(tmp_path) not in text
    assert " - dog-of-mine\n" in text
