"""The model card: what it says of the base model, and that its program runs as printed."""

import re
from types import SimpleNamespace

import pytest
import yaml
from conftest import isolated
from PIL import Image

PAGE = "https://huggingface.co/stabilityai/stable-diffusion-{}/blob/main/LICENSE.md"
SD3 = {"qk_norm": None, "dual_attention_layers": []}
MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}
LARGE = {"qk_norm": "rms_norm", "dual_attention_layers": []}


def read_card(path):
    """The card's header as a dict, its text and its program."""
    _, header, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(header), text, re.search(r"```py\n(.*?)```", text, re.DOTALL)[1]


def write_card(script, args, images):
    with isolated():
        script.write_card(args, script.start_accelerator(args), "user/dog", 2, images)


@pytest.mark.parametrize(
    ("config", "model", "family", "page", "version"),
    [
        (SD3, "stabilityai/stable-diffusion-3-medium-diffusers", "Stable Diffusion 3 Medium", "3-medium", "sd3"),
        ({}, "me/my-sd3", "Stable Diffusion 3 Medium", "3-medium", "sd3"),
        (MEDIUM, "stabilityai/stable-diffusion-3.5-medium", "Stable Diffusion 3.5 Medium", "3.5-medium", "sd3.5"),
        (MEDIUM, "me/medium-turbo", "Stable Diffusion 3.5 Medium", "3.5-medium", "sd3.5"),
        (MEDIUM, "me/not-so-large", "Stable Diffusion 3.5 Medium", "3.5-medium", "sd3.5"),
        (LARGE, "stabilityai/stable-diffusion-3.5-large", "Stable Diffusion 3.5 Large", "3.5-large", "sd3.5"),
        (LARGE, "me/mine", "Stable Diffusion 3.5 Large", "3.5-large", "sd3.5"),
        (
            LARGE,
            "stabilityai/stable-diffusion-3.5-large-turbo",
            "Stable Diffusion 3.5 Large Turbo",
            "3.5-large-turbo",
            "sd3.5",
        ),
    ],
)
def test_base_model(script, argv, tmp_path, monkeypatch, config, model, family, page, version):
    monkeypatch.setattr(script, "read_transformer_config", lambda args: config)
    monkeypatch.setattr(script, "read_pipeline", lambda args: dict.fromkeys(["text_encoder_3", "tokenizer_3"]))
    args = script.parse_args(argv(pretrained_model_name_or_path=model, output_dir=tmp_path))
    write_card(script, args, [])
    header, text, program = read_card(tmp_path / "README.md")
    assert header["base_model"] == model
    assert header["license"] == "other"
    assert header["license_name"] == "stabilityai-ai-community"
    assert header["license_link"] == PAGE.format(page)
    assert {version, f"{version}-diffusers"} <= set(header["tags"])
    assert ("lora" in header["tags"]) == ("lora" in script.__name__)
    assert header["library_name"] == "diffusers"
    assert header["instance_prompt"] == "a photo of sks dog"
    assert f"DreamBooth weights for {model} ({family})" in text
    assert f"[licence]({PAGE.format(page)})" in text
    assert "Write `a photo of sks dog` in a prompt" in text
    assert "widget" not in header
    assert "<Gallery />" not in text
    assert "'user/dog'" in program


def test_gallery_and_odd_prompts(script, argv, tmp_path):
    prompt = 'a "dog": it\'s\na cat # no'
    args = script.parse_args(argv(validation_prompt=prompt, instance_prompt=None, output_dir=tmp_path))
    write_card(script, args, [tmp_path / "image_0.png", tmp_path / "image_1.png"])
    header, text, program = read_card(tmp_path / "README.md")
    images = ["image_0.png", "image_1.png"]
    assert header["widget"] == [{"text": prompt, "output": {"url": name}} for name in images]
    assert "<Gallery />" in text
    assert "base_model" not in header  # a folder here is no model on the Hub, which refuses such a card
    assert "None" not in text
    compile(program, "card", "exec")
    assert repr(prompt) in program


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        pytest.param({}, {"max_sequence_length": 96, "validation_prompt": None}, id="plain"),
        pytest.param({"t5": False}, {}, id="model without T5"),
        pytest.param({}, {"no_t5": True, "train_text_encoder": True}, id="no_t5, encoders trained"),
        pytest.param({"variant": "fp16"}, {"variant": "fp16"}, id="variant"),
    ],
)
def test_program_runs_as_printed(script, run, checkpoints, tmp_path, monkeypatch, model, flags):
    base = checkpoints(**model)
    out = run(script, pretrained_model_name_or_path=base, max_train_steps=1, **flags)
    header, text, program = read_card(out / "README.md")
    assert "base_model" not in header
    assert ("with text_encoder and" in text or "with text_encoder, " in text) == ("train_text_encoder" in flags)
    monkeypatch.chdir(tmp_path)
    names = {}
    with isolated():
        exec(program, names)
    assert Image.open("image.png").size == (32, 32)
    assert f"max_sequence_length={flags.get('max_sequence_length', 77)}" in program
    pipeline = names["pipeline"]
    assert pipeline.transformer.dtype == names["dtype"]
    assert (pipeline.text_encoder_3 is None) == (model == {"t5": False} or "no_t5" in flags)
    if "lora" in script.__name__:
        assert pipeline.get_list_adapters().keys() >= {"transformer"}


def test_the_token_is_no_flag_of_a_run(script, argv):
    """What goes into checkpoints and trackers comes from public_flags."""
    token = "hf_SecretOfTheTest"
    args = script.parse_args(argv(hub_token=token, push_to_hub=True, report_to="tensorboard"))
    assert token not in repr(script.public_flags(args))
    assert vars(args).keys() - script.public_flags(args).keys() == {"hub_token"}
    started = []
    accelerator = SimpleNamespace(
        is_main_process=False, trackers=[], init_trackers=lambda *names, **config: started.append((names, config))
    )
    script.start_trackers(args, accelerator, 0)
    assert len(started) == 1
    assert token not in repr(started)
