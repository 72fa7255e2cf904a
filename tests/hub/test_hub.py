"""Uploads to a stand-in for the Hub, from processes of their own: what is sent, what is not, where no token is."""

import json
import os
import subprocess
import sys

import processes
import pytest
import torch
from conftest import SCRIPTS, SEVERAL
from hub_stand_in import HubStandIn
from PIL import Image
from safetensors.torch import load_file

COMMON = {"README.md", "image_0.png"}
PARTS = {
    "transformer/config.json transformer/diffusion_pytorch_model.safetensors vae/config.json",
    "vae/diffusion_pytorch_model.safetensors scheduler/scheduler_config.json",
    *(f"text_encoder{n}/config.json text_encoder{n}/model.safetensors" for n in ("", "_2", "_3")),
    *(f"tokenizer{n}/tokenizer.json tokenizer{n}/tokenizer_config.json" for n in ("", "_2", "_3")),
}
RESULT = {"full": {"model_index.json", *" ".join(PARTS).split()}, "lora": {"pytorch_lora_weights.safetensors"}}
# A script by its command line, then the program that its card prints, with the token that comes first.
PUSH_AND_LOAD = """
import os, re, runpy, sys
from pathlib import Path

token, card, *sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("====", file=sys.stderr)
os.environ["HF_TOKEN"] = token
exec(re.search(r"```py\\n(.*?)```", Path(card).read_text(), re.DOTALL)[1])
"""
STRAY = ("notes.txt", ".env", "faces/0.png", "optimizer.bin", "checkpoint-best/model.safetensors", "image_7.png")
QUICK = {"TORCHDYNAMO_DISABLE": "1"}  # nothing is compiled: a second less to import


@pytest.fixture(scope="module")
def port():
    return processes.free_port()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def hub(port):
    with HubStandIn(token="hf_SecretOfTheTest", port=port) as hub:
        yield hub


@pytest.fixture(scope="module")
def python(port, home):
    """What clients are forked from. The hub of each test listens at the same port, so that they all know it."""
    with HubStandIn(port=port) as hub:
        python = processes.ForkingPython([path.stem for path in SCRIPTS.values()], hub.environment(home) | QUICK)
    yield python
    python.close()


@pytest.fixture
def client(hub, python, home, tmp_path):
    """Runs a program of Python against the hub, with a token in the environment, and returns the process.

    It is forked from one that has imported the scripts. One that may use xet, which is decided when huggingface_hub is
    imported, is started, which takes longer.
    """

    def client(program, *words, token=None, xet=False, **more):
        environment = {**hub.environment(home, token, xet), **QUICK, **more}
        if not xet:
            return python.run(program, words, tmp_path, environment)
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, words)],
            env={**os.environ, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return client


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_push(hub, client, argv, checkpoints, tmp_path, kind):
    by_flag = kind == "lora"  # the token is given in each way once: --hub_token, HF_TOKEN
    xet = kind == "full"  # and the weights travel once as LFS objects, once by xet
    out = tmp_path / "out"
    for name in STRAY:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"mine")
    flags = argv(
        push_to_hub=True,
        hub_token=hub.token if by_flag else None,
        hub_model_id="dog" if kind == "lora" else None,
        hub_private_repo=kind == "lora",
        report_to="tensorboard",
        checkpointing_steps=1,
        validation_prompt="a dog",
        num_validation_images=1,
        validation_num_inference_steps=3,
        dataloader_num_workers=2,
    )
    # The card's program fetches what was uploaded. A local base has its folder's name there.
    (tmp_path / checkpoints().name).symlink_to(checkpoints())
    program = hub.token, out / "README.md"
    done = client(PUSH_AND_LOAD, *program, SCRIPTS[kind], *flags, token="" if by_flag else None, xet=xet)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Exception ignored" not in done.stderr
    assert "FutureWarning" not in done.stderr.partition("====")[0]
    assert bool(hub.xorbs) == xet

    repository = hub.repositories["user/dog" if kind == "lora" else "user/out"]
    here = read_files(out)
    uploaded = {name: data for name, data in repository["files"].items() if name != ".gitattributes"}
    tokenizers = {name for name in uploaded if name.startswith("tokenizer")}  # the base's own files, as they are
    assert uploaded.keys() - tokenizers == {name for name in COMMON | RESULT[kind] if not name.startswith("tokenizer")}
    assert bool(tokenizers) == (kind == "full")
    assert uploaded == {name: here[name] for name in uploaded}
    assert repository["commits"] == ["End of training"]
    assert repository["private"] == (kind == "lora")
    assert {token for _, path, token in hub.requests if not path.startswith(("/lfs", "/xet"))} == {hub.token}
    # Checkpoints with the optimizer's state, and the logs, are there, and stayed there.
    assert {"checkpoint-1/optimizer.bin", "checkpoint-2/optimizer.bin", *STRAY} <= here.keys()
    assert any("events.out.tfevents" in name for name in here)
    for name, data in here.items():
        assert hub.token.encode() not in data, name
    assert hub.token not in done.stdout + done.stderr

    assert Image.open(tmp_path / "image.png").size == (32, 32)
    fetched = {path for method, path, _ in hub.requests if method == "GET"}
    weights = "transformer/diffusion_pytorch_model" if kind == "full" else "pytorch_lora_weights"
    assert any(path.startswith("/user/") and path.endswith(f"/{weights}.safetensors") for path in fetched)


def test_base_from_the_hub(hub, client, run, full, checkpoints, argv, tmp_path):
    """A dry run reads its small files and no weights; a run ends as with the base in a folder.

    Between the two one that is not there is refused.
    """
    hub.add("someone/sd3", read_files(checkpoints()))
    flags = argv(pretrained_model_name_or_path="someone/sd3", output_dir=tmp_path / "hub", max_train_steps=1)
    runs = [[*flags, "--dry_run"], argv(pretrained_model_name_or_path="someone/gone"), flags]
    done = client(SEVERAL, SCRIPTS["full"].stem, json.dumps(runs))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "2"
    (refused,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "error: --pretrained_model_name_or_path 'someone/gone'" in refused
    asked = [path for _, path, _ in hub.requests]
    dry = asked[: next(number for number, path in enumerate(asked) if "someone/gone" in path)]
    fetched = {path.rpartition("/resolve/")[2] for path in dry if "/resolve/" in path}
    assert fetched and not any("safetensors" in path or path.endswith(".bin") for path in fetched)
    assert done.stderr.partition("====")[0].count("dry run: a run with these flags would now start") == 1

    run(full, output_dir=tmp_path / "folder", max_train_steps=1)
    results = [
        {
            f"{path.relative_to(folder)} {key}": tensor
            for path in folder.rglob("*.safetensors")
            for key, tensor in load_file(path).items()
        }
        for folder in (tmp_path / "hub", tmp_path / "folder")
    ]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_no_repository_no_training_and_a_failed_upload_leaves_the_result(hub, client, argv, tmp_path):
    """With a wrong token in the environment, and then with the right one as a flag."""
    hub.fail("/commit/", 403)
    runs = [argv(push_to_hub=True, hub_model_id="none"), argv(push_to_hub=True, hub_token=hub.token)]
    done = client(SEVERAL, SCRIPTS["lora"].stem, json.dumps(runs), token="hf_wrong")
    assert done.stdout.split() == ["2", "1"]
    refused, said, _ = done.stderr.split("====\n")
    last = refused.strip().splitlines()[-1]
    assert "error: --push_to_hub: the repository 'none' cannot be created" in last
    assert "a token that may write (`hf auth login`, HF_TOKEN), huggingface_hub 1.5" in last
    assert "401" in last
    assert "Training" not in refused
    assert "the upload failed (HfHubHTTPError: " in said
    last = said.strip().splitlines()[-1]
    assert last == f"what was trained is saved in {tmp_path / 'out'}, but the upload failed"
    for word in ("Traceback", "hf_wrong", hub.token):
        assert word not in done.stderr
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").is_file()
    assert hub.repositories.keys() == {"user/out"}
    assert hub.repositories["user/out"]["files"] == {}


def test_what_may_not_be_written_or_read_is_refused(hub, client, argv):
    """One line at the start: a repository, also somebody else's that is there already, and a base model."""
    hub.add("other/there", {})
    hub.add("user/gated", {"model_index.json": b"{}"})
    hub.fail("POST /api/repos/create", 403)
    hub.fail("auth-check/write", 403)
    hub.fail("/user/gated/", 403, "GatedRepo")
    names = ["a dog", "other/dog", "other/there", "user/gated", "user/missing", "nowhere/at/all"]
    runs = [argv(push_to_hub=True, hub_model_id=name) for name in names[:3]]
    runs += [argv(pretrained_model_name_or_path=name) for name in names[3:]]
    done = client(SEVERAL, SCRIPTS["lora"].stem, json.dumps(runs))
    assert done.stdout.split() == ["2"] * len(names), done.stderr[-3000:]
    for name, said in zip(names, done.stderr.split("====\n"), strict=False):
        (line,) = [line for line in said.splitlines() if "error: " in line]
        assert repr(name) in line
        assert ("a gated model accept its licence and run `hf auth login`" in line) == (name in names[3:])
    assert "Traceback" not in done.stderr


UNFORESEEN = """
script.read_folder = lambda *args: 1 / 0
with open(sys.argv[3]) as file:  # not on the command line, which wandb keeps
    script.main(script.parse_args(json.load(file)))
"""


@pytest.mark.slow
def test_a_failing_hub_keeps_the_weights_and_no_secret_leaks(hub, client, argv, tmp_path):
    """Whatever it answers to the commit: an error of its own, that the token is wrong, or nothing.

    Last comes an error that nobody foresaw, with the token in the flags: neither its traceback has it.
    """
    answers = {"error": 500, "wrong": 401, "silent": None}
    flags = {"push_to_hub": True, "max_train_steps": 1, "checkpointing_steps": 1, "report_to": "wandb,tensorboard"}
    runs = [argv(**flags, output_dir=tmp_path / name, hub_model_id=name) for name in answers]
    for name, status in answers.items():
        hub.fail(f"/user/{name}/commit/", status)
    last = tmp_path / "last.json"
    last.write_text(json.dumps(argv(push_to_hub=True, hub_token=hub.token, report_to="tensorboard")))
    words = SCRIPTS["lora"].stem, json.dumps(runs), last
    secrets = {"WANDB_API_KEY": "wandb_Planted" + "0" * 27}
    done = client(SEVERAL + UNFORESEEN, *words, **secrets)
    assert done.stdout.split() == ["1"] * len(runs), done.stderr[-2000:]
    assert "ZeroDivisionError" in done.stderr.splitlines()[-1]
    for name, said in zip(answers, done.stderr.split("====\n"), strict=False):
        last = said.strip().splitlines()[-1]
        assert last == f"what was trained is saved in {tmp_path / name}, but the upload failed"
        assert (tmp_path / name / "pytorch_lora_weights.safetensors").is_file()
    files = [path for name in answers for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    for secret in (hub.token, "wandb_Planted"):
        assert secret not in done.stdout + done.stderr
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
