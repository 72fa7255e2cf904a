"""Both scripts on a device that is not the CPU, without a GPU: see virtual_device.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS
from safetensors.torch import load_file

TOOL = Path(__file__).parent / "virtual_device.py"
EVERYTHING = {
    "train_text_encoder": True, "use_ema": True, "gradient_checkpointing": True, "offload": True,
    "with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2, "sample_batch_size": 2,
    "validation_prompt": "a dog", "num_validation_images": 1, "train_batch_size": 2, "repeats": 8,
    "gradient_accumulation_steps": 2,
}  # fmt: skip
IMAGES = {"validation_prompt": "a dog", "num_validation_images": 1}
PRIOR = {
    "with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2, "sample_batch_size": 2,
    "prior_generation_precision": "fp32",
}  # fmt: skip
CASES = {
    "plain": {},
    "cached latents": {"cache_latents": True},
    "text encoders": {"train_text_encoder": True},
    "prior": PRIOR,
    "validation": IMAGES,
    "offload": {"offload": True} | IMAGES,
    "ema and resume": {"use_ema": True, "checkpointing_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "captions": {"captions": True, "train_batch_size": 2, "caption_dropout": 0.3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "no T5": {"no_t5": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "8 bit": {"use_8bit_adam": True},
    "fp16": {"mixed_precision": "fp16"},
    "bf16": {"mixed_precision": "bf16"},
    "everything, fp16": EVERYTHING | {"mixed_precision": "fp16"},
    "everything": EVERYTHING | {"prior_generation_precision": "fp32"},
}


class Device:
    def __init__(self):
        self.process = None

    def run(self, kind, argv):
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, str(TOOL)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open("/tmp/gpu-work/dev.log", "w"), text=True)
        self.process.stdin.write(json.dumps([kind, argv]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def device():
    device = Device()
    yield device
    device.process.kill()

@pytest.mark.parametrize("case", CASES)
def test_case(kind, script, case, run, argv, device, pictures, few_steps, tmp_path):
    flags = {"repeats": 4, "max_train_steps": 3} | CASES[case]
    if flags.pop("captions", False):
        data = tmp_path / "data"
        data.mkdir()
        for n, p in enumerate(pictures(2).iterdir()):
            (data / p.name).write_bytes(p.read_bytes())
            (data / p.name).with_suffix(".txt").write_text("a dog " * n)
        flags["instance_data_dir"] = data
    if "with_prior_preservation" in flags:
        flags["class_data_dir"] = tmp_path / "class"
    import time
    t = time.time()
    there = device.run(kind, argv(**flags, output_dir=tmp_path / "device"))
    t1 = time.time()
    assert not there["error"], there["error"]
    if flags.get("mixed_precision", "no") == "no":
        torch.backends.cuda.enable_flash_sdp(False)
        if "class_data_dir" in flags:
            flags["class_data_dir"] = tmp_path / "class2"
        run(script, **flags, output_dir=tmp_path / "cpu")
    t2 = time.time()
    print("TIME", kind, case, round(t1-t,2), round(t2-t1,2), there["readings"])
    bad = []
    for path in sorted((tmp_path / "device").rglob("*.safetensors")):
        state = load_file(path)
        assert all(tensor.isfinite().all() for tensor in state.values())
        if flags.get("mixed_precision", "no") == "no":
            other = load_file(tmp_path / "cpu" / path.relative_to(tmp_path / "device"))
            bad += [(path.name, k, (state[k]-other[k]).abs().max()) for k in other if not torch.equal(state[k], other[k])]
    assert not bad, bad[:3]
