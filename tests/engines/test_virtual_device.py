"""Both scripts on a simulated CUDA card, without a GPU: see virtual_device.py.

Each row of CASES runs on it and, in float32, also on the CPU: the files have to be equal bit for bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS
from packaging.version import Version
from safetensors.torch import load_file

TESTED = "2.13"  # of PyTorch; the device leans on private parts, so run these tests before another is named here
pytestmark = pytest.mark.skipif(
    Version(torch.__version__).release[:2] != Version(TESTED).release,
    reason=f"the virtual device is made for PyTorch {TESTED}, this is {torch.__version__}",
)
TOOL = ROOT / "tests/support/virtual_device.py"
IMAGES = {"validation_prompt": "a dog", "num_validation_images": 1}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2, "sample_batch_size": 2}
ALL = IMAGES | PRIOR | {"train_text_encoder": True, "use_ema": True, "gradient_checkpointing": True}
CAPTIONS = {"captions": True, "train_batch_size": 2, "caption_dropout": 0.3}
ALL |= CAPTIONS | {"gradient_accumulation_steps": 2}
FP16 = {"mixed_precision": "fp16", "waits": 2}  # the scaler asks by itself whether to step
FUSED = {"fused_backward_pass": True, "max_grad_norm": "inf", "waits": 2}  # whether all is finite is asked before
BF16_WEIGHTS = {"full_bf16": True, "mixed_precision": "bf16"}
ENCODERS, DECODING = {"CLIPTextModelWithProjection", "T5EncoderModel"}, {"SD3Transformer2DModel while decoding"}
OFFLOADED = {"offload": True, "away": ENCODERS | DECODING}
SMALL = IMAGES | {"gradient_checkpointing": True, "offload": True, "away": DECODING, "train_text_encoder": True}
# Flags that a row leaves out: float32, two updates of one picture each. "runs" gives the lengths of the run and of
# those that go on from its checkpoint; "waits" how often an update waits for the device where that is not once;
# "within" how close the weights are where that is not 0; "free" how much memory the device says it has left; "away"
# which models wait on the CPU.
CASES = {
    "plain": {},
    "prior, class images drawn, cached latents, no T5": PRIOR | {"cache_latents": True, "no_t5": True},
    "text encoders, gradient checkpointing": {"train_text_encoder": True, "gradient_checkpointing": True},
    "offload, validation": IMAGES | OFFLOADED,
    "nothing fits": IMAGES | PRIOR | {"free": 0, "away": ENCODERS | DECODING | {"SD3Transformer2DModel"}},
    "blocks in RAM, validation": IMAGES | {"blocks_to_swap": 2, "gradient_checkpointing": True, "use_dora": True},
    "captions, accumulation": CAPTIONS | {"gradient_accumulation_steps": 2},
    "Prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "waits": 200},  # asks for the norm of each weight's sum
    "8 bit": {"use_8bit_adam": True, "runs": (2, 3), "within": 1e-6},  # for small weights a kernel of another order
    "everything, EMA, resume": ALL | OFFLOADED | {"alpha_mask": True, "runs": (2, 3)},
    "everything, bf16": ALL | {"mixed_precision": "bf16"},
    "everything, fp16": ALL | FP16 | {"cache_latents": True, "alpha_mask": True, "no_t5": True, "runs": (2, 3)},
    "fused": FUSED | {"use_ema": True, "runs": (2, 4)},
    "fused, 8 bit": FUSED | {"use_8bit_adam": True, "train_text_encoder": True, "runs": (2, 3), "within": 1e-6},
    "bf16 weights": BF16_WEIGHTS | {"use_ema": True, "runs": (2, 3)},
    "fused, bf16 weights": BF16_WEIGHTS | FUSED | SMALL | {"use_8bit_adam": True, "runs": (2, 3)},
}
# Of one script alone: what the other has no flag for, and where the lines that run are the same text in both.
ALONE = {
    "plain": "lora",
    "prior, class images drawn, cached latents, no T5": "full",
    "offload, validation": "lora",
    "nothing fits": "full",
    "blocks in RAM, validation": "lora",
    "captions, accumulation": "lora",
    "Prodigy": "full",
    "8 bit": "lora",
    "everything, EMA, resume": "full",
    "everything, bf16": "lora",
    "everything, fp16": "lora",
    "fused": "full",
    "fused, 8 bit": "full",
    "bf16 weights": "full",
    "fused, bf16 weights": "full",
}
ROWS = [
    pytest.param(kind, case, id=f"{kind}-{case}")
    for kind in SCRIPTS
    for case in CASES
    if ALONE.get(case, kind) == kind
]
SMALL_STATES = {"full": {}, "lora": {"rank": 256}}  # below 4096 elements bitsandbytes keeps them in float32


class VirtualDevice:
    """A process with the virtual device, which runs scripts there one after another."""

    def __init__(self, log):
        self.log, pipe = log, subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, TOOL], stdin=pipe, stdout=pipe, stderr=log.open("w"), text=True, env=os.environ
        )
        self.greeting = self.read()

    def read(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else f"the process ended: {self.log.read_text()[-2000:]}"

    def run(self, path, argv=(), free=2**34):
        """Error of a run, or "", and how often the host waited for the device in each update from the second on."""
        print(json.dumps([free, str(path), *argv]), file=self.process.stdin, flush=True)
        answer = self.read()
        assert isinstance(answer, dict), answer
        waits, self.away = answer["waits"], set(answer["away"])
        return answer["error"], [after - before for before, after in zip(waits, waits[1:], strict=False)]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    device = VirtualDevice(tmp_path_factory.mktemp("device") / "log.txt")
    if device.greeting != "ready":
        pytest.fail(f"it does not work with PyTorch {torch.__version__}: {device.greeting}", pytrace=False)
    yield device
    device.close()


@pytest.fixture
def plain_attention():
    """The CPU's fused attention, which the device has not, is left out."""
    torch.backends.cuda.enable_flash_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(True)


@pytest.fixture
def captioned(pictures, tmp_path):
    """A folder of pictures, half of them with a caption."""
    for number, path in enumerate(sorted(pictures(2).iterdir())):
        Path(tmp_path, path.name).write_bytes(path.read_bytes())
        if number:
            Path(tmp_path, path.stem).with_suffix(".txt").write_text("sks dog in the yarn bucket")
    return tmp_path


def tensors(folder):
    files = sorted(path for path in folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)}: {key}": value for path in files for key, value in load_file(path).items()}


def test_torch_has_what_the_device_leans_on():
    import virtual_device  # here, because another PyTorch may not even import it

    lost = virtual_device.missing()
    if lost:
        pytest.fail(f"PyTorch {torch.__version__} has no torch.{', torch.'.join(lost)}: see PRIVATE", pytrace=False)


@pytest.mark.usefixtures("few_steps", "plain_attention")
@pytest.mark.parametrize(("kind", "case"), ROWS)
def test_runs(kind, script, script_path, run, argv, device, captioned, tmp_path, case):
    flags = {"repeats": 8, "prior_generation_precision": "fp32"} | CASES[case]
    runs, allowed, within = flags.pop("runs", (2,)), flags.pop("waits", 1), flags.pop("within", 0)
    free, away = flags.pop("free", 2**34), flags.pop("away", set())
    if flags.pop("captions", False):
        flags["instance_data_dir"] = captioned
    if flags.get("use_8bit_adam"):
        flags |= SMALL_STATES[kind]
    results = {}
    for place in ("device", "cpu") if "mixed_precision" not in flags else ("device",):
        for length in runs:
            flags |= {"output_dir": tmp_path / place, "max_train_steps": length, "checkpointing_steps": runs[0]}
            flags |= (
                {"class_data_dir": tmp_path.with_name(f"{tmp_path.name}-{place}-class")}
                if "class_prompt" in flags
                else {}
            )
            flags |= {"resume_from_checkpoint": "latest"} if length > runs[0] else {}
            if place == "cpu":
                run(script, **flags | {"blocks_to_swap": None})  # it needs a card
            else:
                error, waits = device.run(script_path, argv(**flags), free)
                assert not error, error
                assert device.away == away or length > runs[0]
                assert (length == runs[0]) <= max(waits, default=0) <= allowed, waits
        flags.pop("resume_from_checkpoint", None)
        results[place] = tensors(tmp_path / place)
    assert results["device"] and all(tensor.isfinite().all() for tensor in results["device"].values())
    for name, tensor in results.get("cpu", {}).items():
        torch.testing.assert_close(results["device"][name], tensor, rtol=0, atol=within, msg=name)


REFUSED = {
    "a matrix of the CPU": ("torch.ones(2, 2, device='cuda') @ torch.ones(2, 2)", "on the same device"),
    "rows of the CPU beside others": (
        "torch.cat([torch.ones(2, device='cuda'), torch.ones(2)])",
        "on the same device",
    ),
    "indices of the device into the CPU": ("torch.ones(3)[torch.tensor([0], device='cuda')]", "on the same device"),
    "a generator of the CPU": ("torch.randn(2, device='cuda', generator=torch.Generator())", "'cuda' device type"),
    "a generator of the device": ("torch.randn(2, generator=torch.Generator('cuda'))", "'cpu' device type"),
    "a second card": ("torch.ones(2, device='cuda:1')", "invalid device ordinal"),
    "an array": ("torch.ones(2, device='cuda').numpy()", "can't convert cuda"),
    "weights of the CPU": ("torch.nn.Linear(2, 2)(torch.ones(2, device='cuda'))", "on the same device"),
    "pinning what is there": ("torch.empty(2, device='cuda', pin_memory=True)", "can be pinned"),
}
TAKEN = {
    "a number of the CPU": "torch.ones(2, device='cuda') * torch.tensor(2.0)",
    "indices of the CPU": "torch.ones(3, device='cuda')[torch.tensor([0])]",
    "a state dict of the CPU": "torch.nn.Linear(2, 2).cuda().load_state_dict(torch.nn.Linear(2, 2).state_dict())",
    "a copy": "torch.ones(2).copy_(torch.ones(2, device='cuda', dtype=torch.bfloat16))",
}


@pytest.mark.parametrize("case", [*REFUSED, *TAKEN])
def test_what_cuda_refuses_and_takes(device, tmp_path, case):
    program, words = REFUSED.get(case) or (TAKEN[case], "")
    Path(tmp_path, "program.py").write_text(f"import torch\n{program}\n")
    error, _ = device.run(tmp_path / "program.py")
    assert words in error and bool(words) == bool(error)


@pytest.mark.parametrize("line", ["input_ids.to(self.device)", "shifted.sigmas.to(accelerator.device)"])
def test_a_mistake_of_a_script_is_found(device, script_path, argv, tmp_path, line):
    """A tensor that stays on the CPU ends the run, in CUDA's words."""
    text = script_path.read_text()
    assert line in text, "the script has changed: take another line"
    broken = Path(tmp_path, script_path.name)
    broken.write_text(text.replace(line, line.partition(".to(")[0]))
    error, _ = device.run(broken, argv())
    assert "on the same device" in error
