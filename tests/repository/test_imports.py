"""A run imports only what it needs: no tracker, dataset reader or optimizer that it does not use."""

import subprocess
import sys

from conftest import ROOT

RUN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from importlib import import_module
script = import_module(sys.argv[1])
script.main(script.parse_args(sys.argv[2:]))
print(*sys.modules)
"""
UNUSED = "wandb tensorboard tensorboardX comet_ml mlflow aim datasets pandas pyarrow prodigyopt torchvision matplotlib"


def test_a_plain_run_imports_no_optional_package(lora, argv):
    """PEFT is not among them: diffusers' SD3 classes import it wherever it is installed."""
    command = [sys.executable, "-c", RUN, lora.__name__, *argv(max_train_steps=1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert {"torch", "diffusers", "safetensors"} <= imported
    assert imported & set(UNUSED.split()) == set()
