"""What of a model card survives the next run, what the card says of the run, and a private repository."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import SCRIPTS
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard


@pytest.fixture
def write(lora, argv, tmp_path):
    """Writes the card of a run and returns its text."""

    def write(**flags):
        args = lora.parse_args(argv(**flags))
        accelerator = SimpleNamespace(device=lora.torch.device("cpu"), num_processes=2)
        path = tmp_path / "out" / "README.md"
        path.parent.mkdir(exist_ok=True)
        lora.write_card(args, accelerator, "user/dog", 7, [])
        return path.read_text()

    return write


def test_a_second_run_changes_nothing_by_itself(write):
    cards = {re.sub(r"after \d+ minutes|line \(\w+\)", "", write()) for _ in range(2)}
    assert len(cards) == 1


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("$", "\n\n## Notes\n\nFrom my garden.\n", "From my garden."),  # at the end, where the line says it stays
        ("## Training", "Rex is two years old.\n\n## Training", "Rex is two years old."),  # inside
        ("tags:\n", "tags:\n- rex\n", "- rex"),
        ("license: other\n", "license: other\nlanguage: en\n", "language: en"),
    ],
)
def test_what_a_person_added_stays(before, after, words, write, tmp_path):
    path = tmp_path / "out" / "README.md"
    text = write()
    path.write_text(text + after if before == "$" else text.replace(before, after, 1))
    for steps in (3, 4):
        text = write(max_train_steps=steps)
        assert text.count(words) == 1
        assert f"--max_train_steps {steps}" in text.split("<!--")[0]


def test_a_card_that_a_person_wrote_stays(write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Rex\n\nMy dog.\n")
    text = write()
    assert "# Rex\n\nMy dog.\n" in text
    assert text.index("## Training") < text.index("# Rex")


def test_how_it_was_trained(write, pictures):
    text = write(hub_token="hf_secret", push_to_hub=True, hub_model_id="user/dog", learning_rate=0.5, random_flip=True)
    assert "Update 7, after " in text
    assert "2 x CPU" in text
    assert "diffusers 0." in text
    assert "--learning_rate 0.5" in text
    assert "--random_flip" in text
    assert f"--instance_data_dir {pictures().name} " in text
    for absent in ("hf_secret", "--rank", str(pictures())):
        assert absent not in text


def test_relation_to_the_base_model(write, monkeypatch, lora):
    monkeypatch.setattr(lora, "read_pipeline", lambda args: dict.fromkeys(["text_encoder_3", "tokenizer_3"]))
    monkeypatch.setattr(lora, "name_base_model", lambda args: ("Stable Diffusion 3 Medium", "x", "https://x"))
    data = ModelCard(write(pretrained_model_name_or_path="someone/sd3")).data
    assert (data.base_model, data.base_model_relation) == ("someone/sd3", "adapter")


def push(tmp_path, argv, hub, **flags):
    command = [sys.executable, SCRIPTS["lora"], *argv(push_to_hub=True, max_train_steps=1, **flags)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **hub.environment(tmp_path / "home")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_private_repository(tmp_path, argv):
    with HubStandIn() as hub:
        done = push(tmp_path, argv, hub, hub_private_repo=True, hub_model_id="dog")
        assert done.returncode == 0, done.stderr
        assert hub.repositories["user/dog"]["private"]


@pytest.mark.parametrize(
    ("name", "pattern", "status"),
    [("a dog", None, None), ("other/dog", "POST /api/repos/create", 403), ("other/there", "auth-check/write", 403)],
)
def test_repository_that_may_not_be_written(name, pattern, status, tmp_path, argv):
    """One line at the start, also for a repository of somebody else that is there already."""
    with HubStandIn() as hub:
        hub.add("other/there", {})
        if pattern:
            hub.fail(pattern, status)
        done = push(tmp_path, argv, hub, hub_model_id=name)
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2
    assert len(lines) == 1
    assert repr(name) in lines[0]
    assert "Traceback" not in done.stderr
