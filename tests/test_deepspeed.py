"""DeepSpeed ZeRO-2 and ZeRO-3, by accelerate's own code over gloo, where the deepspeed package is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, SCRIPTS
from test_fsdp import cases, updates, weights

pytestmark = pytest.mark.slow
needed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is absent: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)


def environment(stage):
    """What `accelerate launch --config_file` would set for DeepSpeed, and the shim that lets it run without a GPU."""
    section = yaml.safe_load((ROOT / f"demo/accelerate/zero{stage}.yaml").read_text())["deepspeed_config"]
    flags = {
        "ZERO_STAGE": section["zero_stage"],
        "OFFLOAD_OPTIMIZER_DEVICE": section["offload_optimizer_device"],
        "OFFLOAD_PARAM_DEVICE": section["offload_param_device"],
        "ZERO3_INIT": str(section["zero3_init_flag"]).lower(),
        "ZERO3_SAVE_16BIT_MODEL": str(section.get("zero3_save_16bit_model", False)).lower(),
    }
    flags = {f"ACCELERATE_DEEPSPEED_{name}": str(value) for name, value in flags.items()}
    flags |= {"ACCELERATE_GRADIENT_CLIPPING": "0.5", "ACCELERATE_USE_DEEPSPEED": "true"}
    paths = [str(ROOT / "tests/engines"), *filter(None, [os.environ.get("PYTHONPATH")])]
    shim = {"PYTHONPATH": os.pathsep.join(paths), "ENGINE": "deepspeed", "DS_ACCELERATOR": "cpu"}
    return os.environ | flags | shim | {"ACCELERATE_USE_CPU": "false"}


@pytest.fixture(scope="module", params=[2, 3])
def home(request, checkpoints, pictures, tmp_path_factory):
    """Folder with the outputs and records of all runs at one stage."""
    home = tmp_path_factory.mktemp(f"zero{request.param}")
    path = home / "cases.json"
    path.write_text(json.dumps(list(cases(home, checkpoints(), pictures(3), 2))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/ranks.py"), str(path)],
        env=environment(request.param),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return home


@needed
def test_it_trains_and_resumes_exactly(home, kind):
    record = torch.load(home / f"{kind}-2.record.1", weights_only=False)
    assert (record["processes"], record["engine"]) == (2, "DEEPSPEED")
    whole, resumed = updates(home, f"{kind}-2"), updates(home, f"{kind}-2-resumed")
    assert resumed == whole[2:]
    assert whole[0]["loss"] > whole[-1]["loss"]
    whole, resumed = weights(home / f"{kind}-2"), weights(home / f"{kind}-2-resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_without_the_package_the_error_is_one_line(kind, argv):
    environ = os.environ | {"ACCELERATE_USE_DEEPSPEED": "true"}
    command = [sys.executable, str(SCRIPTS[kind]), *argv()]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install deepspeed" in done.stderr
