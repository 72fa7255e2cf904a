"""FSDP2, by accelerate's own code over gloo: trains, saves and resumes, and its result is that of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import yaml
from conftest import ROOT, SCRIPTS, isolated
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def environment(engine, name):
    """What `accelerate launch --config_file` would set for FSDP, and the shim that lets it run without a GPU."""
    section = yaml.safe_load((ROOT / f"demo/accelerate/{name}.yaml").read_text())["fsdp_config"]
    section["fsdp_transformer_cls_to_wrap"] = section.pop("fsdp_transformer_layer_cls_to_wrap")
    flags = {
        key.upper(): str(value).lower() if isinstance(value, bool) else str(value) for key, value in section.items()
    }
    paths = {"PYTHONPATH": str(ROOT / "tests/engines")}
    return (
        os.environ | flags | paths | {"ENGINE": engine, "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "false"}
    )


def cases(home, model, images, processes):
    """Four updates; then, for two processes, the last two again from the checkpoint between."""
    for kind in SCRIPTS:
        for again in range(processes):
            flags = {
                "pretrained_model_name_or_path": model,
                "instance_data_dir": images,
                "instance_prompt": "a photo of sks dog",
                "validation_prompt": "a dog",
                "validation_data_dir": images,
                "num_validation_images": 3,
                "resolution": 32,
                "train_batch_size": 2 // processes,
                "max_train_steps": 4,
                "checkpointing_steps": 2,
                "learning_rate": 1e-3,
                "adam_epsilon": 1e-3,
                "max_grad_norm": 0.5,
                "lr_warmup_steps": 0,
                "seed": 0,
                "report_to": "none",
                "output_dir": home / f"{kind}-{processes}{'-resumed' * again}",
            }
            if again:
                flags["resume_from_checkpoint"] = home / f"{kind}-{processes}/checkpoint-2"
            argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
            yield {"script": kind, "argv": argv, "record": f"{flags['output_dir']}.record"}


@pytest.fixture(scope="module")
def home(checkpoints, pictures, tmp_path_factory):
    """Folder with the outputs and records of all runs."""
    home = tmp_path_factory.mktemp("fsdp")
    with isolated():
        for case in cases(home, checkpoints(), pictures(3), 1):
            ranks.run_case(case)
    path = home / "cases.json"
    path.write_text(json.dumps(list(cases(home, checkpoints(), pictures(3), 2))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/ranks.py"), str(path)],
        env=environment("fsdp", "fsdp2"),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return home


def updates(home, name, rank=0):
    return torch.load(Path(home, f"{name}.record.{rank}"), weights_only=False)["log_update"]


def weights(folder):
    files = sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder, "transformer").glob("*.safetensors"))
    assert files
    return {f"{file.name} {key}": value for file in files for key, value in load_file(file).items()}


def test_the_weights_are_split_over_two_processes(home, kind):
    for rank in (0, 1):
        record = torch.load(home / f"{kind}-2.record.{rank}", weights_only=False)
        assert (record["processes"], record["engine"]) == (2, "FSDP")
        assert list(home.glob(f"{kind}-2/checkpoint-2/*/__{rank}_0.distcp"))


def test_the_losses_and_the_final_files_are_those_of_one_process(home, kind):
    for ours, theirs in zip(updates(home, f"{kind}-1"), updates(home, f"{kind}-2"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)
    ours, theirs = weights(home / f"{kind}-1"), weights(home / f"{kind}-2")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-5, msg=name)
    names = [sorted(p.name for p in Path(home, f"{kind}-{n}").iterdir()) for n in (1, 2)]
    assert names[0] == names[1]


def test_a_resumed_run_is_the_uninterrupted_one(home, kind):
    whole, resumed = updates(home, f"{kind}-2"), updates(home, f"{kind}-2-resumed")
    assert resumed == whole[2:]
    whole, resumed = weights(home / f"{kind}-2"), weights(home / f"{kind}-2-resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
