"""FSDP2, by accelerate's own code over gloo: it trains, saves, resumes and ends as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import ranks
import torch
from conftest import SCRIPTS, isolated, start_two_processes
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
CLIPPING = 0.5
WEIGHTS = "diffusion_pytorch_model.safetensors"


def cases(home, model, images, count):
    """Four updates; then, for two processes, the last two again from the checkpoint between, and two in bfloat16."""
    for kind in SCRIPTS:
        for name in ("", "-resumed", "-bf16") if count == 2 else ("", "-bf16"):
            flags = {
                "pretrained_model_name_or_path": model,
                "instance_data_dir": images,
                "instance_prompt": "a photo of sks dog",
                "validation_prompt": "a dog",
                "validation_data_dir": images,
                "num_validation_images": 3,
                "resolution": 32,
                "train_batch_size": 2 // count,
                "max_train_steps": 4,
                "checkpointing_steps": 2,
                "learning_rate": 1e-3,
                "adam_epsilon": 1e-3,
                "max_grad_norm": CLIPPING,
                "lr_warmup_steps": 0,
                "seed": 0,
                "report_to": "none",
                "output_dir": home / f"{kind}-{count}{name}",
            }
            if name == "-bf16":
                flags |= {"mixed_precision": "bf16", "max_train_steps": 2}
            if name == "-resumed":
                flags["resume_from_checkpoint"] = home / f"{kind}-{count}/checkpoint-2"
            argv = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
            case = {"script": kind, "argv": argv, "draw_fast": True, "levels": name == "-bf16"}
            yield case | {"record": f"{flags['output_dir']}.record"}


@pytest.fixture(scope="module")
def alone(checkpoints, pictures, tmp_path_factory):
    """Folder with the outputs and records of the runs of one process."""
    home = tmp_path_factory.mktemp("alone")
    with isolated():
        for case in cases(home, checkpoints(), pictures(3), 1):
            ranks.run_case(case)
    return home


@pytest.fixture(scope="module")
def home(checkpoints, pictures, tmp_path_factory):
    """Folder with the outputs and records of the runs of two processes."""
    home = tmp_path_factory.mktemp("fsdp2")
    start_two_processes(home, list(cases(home, checkpoints(), pictures(3), 2)), **processes.fsdp2_environment())
    return home


def updates(home, name, rank=0):
    return torch.load(Path(home, f"{name}.record.{rank}"), weights_only=False)["log_update"]


def weights(folder):
    files = sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder, "transformer").glob("*.safetensors"))
    assert files
    return {f"{file.name} {key}": value for file in files for key, value in load_file(file).items()}


def test_the_model_is_split(home, kind):
    """And what is split lies in two parts in a checkpoint, the weights in one file alone."""
    for rank in (0, 1):
        record = torch.load(home / f"{kind}-2.record.{rank}", weights_only=False)
        assert (record["processes"], record["engine"]) == (2, "FSDP")
    folder = home / f"{kind}-2/checkpoint-2"
    weights = {"lora": {"pytorch_lora_weights.safetensors"}, "full": {"config.json", WEIGHTS}}[kind]
    parts = {f"{name}_{rank}.bin" for name in ("optimizer", "scheduler") for rank in (0, 1)}
    assert {path.name for path in folder.rglob("*") if path.is_file()} == weights | parts | {"dreambooth.json"}
    trained = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    sizes = [Path(folder, f"optimizer_{rank}.bin").stat().st_size for rank in (0, 1)]
    assert sum(sizes) < 2.2 * trained + 400 * 1024  # two moments; what names the tensors of a tiny model is not small


def test_one_process_alone_reads_the_model_that_is_split(home, kind):
    names = [torch.load(home / f"{kind}-2.record.{rank}", weights_only=False)["load_part"] for rank in (0, 1)]
    assert ["transformer" in loaded for loaded in names] == [True, False]


def test_the_losses_and_the_final_files_are_those_of_one_process(alone, home, kind):
    for ours, theirs in zip(updates(alone, f"{kind}-1"), updates(home, f"{kind}-2"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)
    ours, theirs = weights(alone / f"{kind}-1"), weights(home / f"{kind}-2")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-5, msg=name)
    names = [sorted(p.name for p in folder.iterdir()) for folder in (alone / f"{kind}-1", home / f"{kind}-2")]
    assert names[0] == names[1]


def test_a_resumed_run_is_the_uninterrupted_one(home, kind):
    whole, resumed = updates(home, f"{kind}-2"), updates(home, f"{kind}-2-resumed")
    assert resumed == whole[2:]
    whole, resumed = weights(home / f"{kind}-2"), weights(home / f"{kind}-2-resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("count", [1, 2])
def test_a_thousand_noise_levels_reach_the_model_in_bfloat16_too(alone, home, kind, count):
    """They are told apart: timesteps and noisy latents are float32 until the model's own layers narrow them."""
    folder = home if count == 2 else alone
    for rank in range(count):
        levels = torch.load(folder / f"{kind}-{count}-bf16.record.{rank}", weights_only=False)["levels"]
        for given in levels.values():
            assert given.dtype == torch.float32
            assert len(given.unique(dim=0)) == 1000


def test_the_losses_in_bfloat16_are_those_of_one_process(alone, home, kind):
    """But for its rounding, of one part in 256; the weights that are trained stay float32."""
    for ours, theirs in zip(updates(alone, f"{kind}-1-bf16"), updates(home, f"{kind}-2-bf16"), strict=True):
        assert theirs == pytest.approx(ours, rel=1 / 256)
    kept = weights(home / f"{kind}-2-bf16/checkpoint-2")
    assert {weight.dtype for weight in kept.values()} == {torch.float32}


def test_deepspeed_is_refused_in_one_line(kind, argv):
    environ = os.environ | {"ACCELERATE_USE_DEEPSPEED": "true"}
    command = [sys.executable, str(SCRIPTS[kind]), *argv()]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "FSDP2" in done.stderr
