"""Runs the scripts several times in one set of processes, and records what each process did.

A case is {"script": "full" or "lora", "argv": [...], "record": path}. Optional are "draw_fast"; "exit", the
expected exit code; "tell", {"name", "call", "rank"}: that rank gets SIGTERM in that call of that function; "levels":
record which of a thousand noise levels reach the model. The record of rank R is path.R, a file for torch.load.
"""

import contextlib
import gc
import inspect
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_dreambooth_lora_sd3 as lora  # noqa: E402  before torch, as where it runs by itself
import train_dreambooth_sd3 as full  # noqa: E402

import torch  # noqa: E402  isort: skip

MODULES = {"full": full, "lora": lora}


MEASURED = {"loss_average", "seconds_per_update", "memory_gb"}  # of this process: no two runs have the same


def note_update(args, _):
    """Step and figures of a call of log_update, less what is measured."""
    figures = {name: value for name, value in args["figures"].items() if name not in MEASURED}
    return {"step": args["state"].step, **figures}


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
        self.spy(
            monkeypatch, script, "draw_latents", lambda args, drawn: (args["seeds"], *map(torch.clone, drawn[:3]))
        )
        self.spy(monkeypatch, script, "log_update", note_update)
        self.spy(monkeypatch, script.PromptTable, "encode", lambda args, _: (args["name"], str(args["prompts"])))
        self.spy(monkeypatch, script, "load_part", lambda args, _: args["name"])
        self.spy(monkeypatch, script, "encode_moments", lambda args, _: args["pixels"].double().sum().item())
        self.spy(monkeypatch, script, "draw_images", lambda args, _: args["seeds"])
        self.spy(monkeypatch, script, "make_optimizer", lambda args, optimizer: self.watch_gradients(optimizer))

    def watch_gradients(self, optimizer):
        """Writes down the gradients that each step of the optimizer meets."""

        def note(optimizer, *step):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.setdefault("gradients", []).append([whole(p.grad) for p in parameters if p.grad is not None])

        optimizer.register_step_pre_hook(note)


@contextlib.contextmanager
def watch_updates(script):
    """The figures of each update that a script makes in a with block, its step among them."""
    import pytest

    record = Record()
    with pytest.MonkeyPatch.context() as monkeypatch:
        record.spy(monkeypatch, script, "log_update", note_update)
        yield record.setdefault("log_update", [])


def read_files(folder):
    """The bytes of what a run has left, weights and images, by name; checkpoints are left out."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix in {".safetensors", ".png"}]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if "checkpoint-" not in str(p)}


def tell(monkeypatch, script, name, call, number=signal.SIGTERM):
    """Sends this process a signal at the n-th call of a function of the script."""
    original, calls = getattr(script, name), []

    def told(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(script, name, told)


def watch_levels(monkeypatch, script, record):
    """Before the first update: the noisy latents and the timesteps of a thousand levels as they reach the layers."""
    original = script.flow_losses

    def watched(*given, **options):
        if "levels" not in record and torch.is_grad_enabled():
            args, transformer, scheduler, (latents, noise, _, _), text, *_ = given
            layers = {"latents": transformer.pos_embed, "timesteps": transformer.time_text_embed}
            record["levels"] = {}
            hooks = [
                layer.register_forward_pre_hook(
                    lambda _, inputs, name=name: record["levels"].update({name: inputs[0]})
                )
                for name, layer in layers.items()
            ]
            latents, noise, *text = (one[:1].expand(1000, *one.shape[1:]) for one in (latents, noise, *text))
            with torch.no_grad():
                drawn = latents, noise, torch.arange(0.5, 1000) / 1000, None
                original(args, transformer, scheduler, drawn, text)
            for hook in hooks:
                hook.remove()
        return original(*given, **options)

    monkeypatch.setattr(script, "flow_losses", watched)


def draw_fast(monkeypatch):
    """Has pipelines draw in three steps where nobody asks for a number: what is drawn is not what the test is of."""
    from diffusers import StableDiffusion3Pipeline

    call = StableDiffusion3Pipeline.__call__

    def draw(self, *inputs, num_inference_steps=28, **options):
        steps = 3 if num_inference_steps == 28 else num_inference_steps
        return call(self, *inputs, num_inference_steps=steps, **options)

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", draw)


def run_case(case):
    """One run of a script's main in this process; how it ended is written down too."""
    import pytest
    from accelerate.state import AcceleratorState, GradientState

    script, record = MODULES[case["script"]], Record()
    gc.freeze()  # what the libraries have made: else each collection of a run looks through it
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *group: None)  # the next case needs it
        record.watch(monkeypatch, script)
        if case.get("draw_fast"):
            draw_fast(monkeypatch)
        if case.get("levels"):
            watch_levels(monkeypatch, script, record)
        if case.get("tell") and str(case["tell"]["rank"]) == os.environ["RANK"]:
            tell(monkeypatch, script, case["tell"]["name"], case["tell"]["call"])
        try:
            script.main(script.parse_args(case["argv"]))
        except SystemExit as end:
            record["exit"] = end.code
            if end.code != case.get("exit"):
                raise
        finally:
            state = AcceleratorState._shared_state  # empty where the flags were refused
            if state:
                record |= {"processes": state["num_processes"], "engine": state["distributed_type"].value}
            if group := torch.distributed.group.WORLD:
                record["timeout"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            torch.save(dict(record), f"{case['record']}.{os.environ.get('RANK', 0)}")
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
