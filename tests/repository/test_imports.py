"""A run by the command line imports only what it needs, and its end says no word too many."""

import os
import subprocess
import sys

import pytest
from conftest import SCRIPTS

RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(*sys.modules)
"""
UNUSED = "wandb tensorboard tensorboardX comet_ml mlflow aim datasets pandas pyarrow prodigyopt torchvision matplotlib"


@pytest.mark.slow
def test_a_plain_run_imports_no_optional_package_and_ends_quietly(argv):
    """No tracker, dataset reader or optimizer that it does not use. PEFT is not among them: diffusers' SD3 classes
    import it wherever it is installed. With loader processes, which end with it."""
    flags = argv(dataloader_num_workers=2, max_train_steps=3, checkpointing_steps=2)
    command = [sys.executable, "-c", RUN, str(SCRIPTS["lora"]), *flags]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    assert [line for line in lines if "Exception ignored" in line or "FutureWarning" in line] == []
    imported = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert {"torch", "diffusers", "safetensors"} <= imported
    assert imported & set(UNUSED.split()) == set()
