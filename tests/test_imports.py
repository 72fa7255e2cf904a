"""A run imports what it needs: no tracker, no reader of datasets, no optimizer that it does not use."""

import re
import subprocess
import sys

import pytest
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


@pytest.mark.parametrize("flags", [[], ["--use_8bit_adam"]])
def test_bitsandbytes_is_imported_for_a_flag_alone(script, argv, flags):
    command = [sys.executable, "-X", "importtime", script.__file__, *argv(), "--dry_run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert bool(re.search(r"\| +bitsandbytes\.functional$", done.stderr, re.MULTILINE)) == bool(flags)


def test_a_base_that_may_be_quantised_needs_bitsandbytes(script, argv, tmp_path):
    args = script.parse_args(argv())
    assert not script.needs_bitsandbytes(args)
    args.pretrained_model_name_or_path = "someone/sd3"
    assert script.needs_bitsandbytes(args)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    args.pretrained_model_name_or_path = str(tmp_path)
    assert script.needs_bitsandbytes(args)
