"""Runs the scripts several times over in one set of processes, and writes down what each process did.

    torchrun --standalone --nproc_per_node 2 tests/ranks.py CASES.json

CASES.json lists {"script": "full" or "lora", "argv": [...], "record": path}, with "draw_fast" or not; the record of
rank R is path.R, a file for torch.load. One start of the processes, which takes most of the time of a tiny run, serves
all cases.
"""

import functools
import inspect
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_dreambooth_lora_sd3 as lora  # noqa: E402  before torch, as where it runs by itself
import train_dreambooth_sd3 as full  # noqa: E402

import torch  # noqa: E402  isort: skip

MODULES = {"full": full, "lora": lora}


def whole(tensor):
    """A tensor of which each process may have a part, as all of it."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Record(dict):
    """What one process did in one run: the calls that are spied on, as lists by name.

    What is called without gradients, shared work or validation, is kept apart from what trains.
    """

    def spy(self, monkeypatch, script, name, note):
        original = getattr(script, name)
        signature = inspect.signature(original)

        def spied(*args, **kwargs):
            result = original(*args, **kwargs)
            kind = name if torch.is_grad_enabled() else f"{name} without gradients"
            self.setdefault(kind, []).append(note(signature.bind(*args, **kwargs).arguments, result))
            return result

        monkeypatch.setattr(script, name, spied)

    def watch(self, monkeypatch, script):
        """Spies on a script until the patches are undone."""
        self.spy(monkeypatch, script, "draw_latents", lambda args, drawn: (args["seeds"], *map(torch.clone, drawn)))
        self.spy(monkeypatch, script, "log_update", lambda args, _: dict(args["figures"]))
        self.spy(
            monkeypatch, script, "encode_text", lambda args, _: (args["name"], tuple(args["ids"].flatten().tolist()))
        )
        self.spy(monkeypatch, script, "encode_moments", lambda args, _: args["pixels"].double().sum().item())
        self.spy(monkeypatch, script, "draw_images", lambda args, _: args["seeds"])
        self.spy(monkeypatch, script, "make_optimizer", lambda args, optimizer: self.watch_gradients(optimizer))

    def watch_gradients(self, optimizer):
        """Writes down the gradients that each step of the optimizer meets."""

        def note(optimizer, *step):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.setdefault("gradients", []).append([whole(p.grad) for p in parameters if p.grad is not None])

        optimizer.register_step_pre_hook(note)


def draw_fast(monkeypatch):
    """Has pipelines draw in three steps where nobody asks for a number: what is drawn is not what the test is of."""
    from diffusers import StableDiffusion3Pipeline

    call = functools.partialmethod(StableDiffusion3Pipeline.__call__, num_inference_steps=3)
    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", call)


def run_case(case):
    """One run of a script's main in this process; how it ended is written down too."""
    import pytest
    from accelerate.state import AcceleratorState, GradientState

    script, record = MODULES[case["script"]], Record()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *group: None)  # the next case needs it
        record.watch(monkeypatch, script)
        if case.get("draw_fast"):
            draw_fast(monkeypatch)
        try:
            script.main(script.parse_args(case["argv"]))
            state = AcceleratorState()
            record |= {"processes": state.num_processes, "engine": state.distributed_type.value}
        finally:
            torch.save(dict(record), f"{case['record']}.{os.environ.get('RANK', 0)}")
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


if __name__ == "__main__":
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case)
    torch.distributed.destroy_process_group()
