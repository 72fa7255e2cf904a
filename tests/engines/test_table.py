"""The table {one process, DDP, FSDP2} x {what can be asked for}: each row trains right, or is refused in one line.

Right is what a user would miss: all weights move; they are equal on all processes after each update; losses and
result are those of one process with the whole batch; a resumed run is the uninterrupted one; the result loads.
Each row was seen to fail where what it is of is taken out of the scripts. What it cannot see is held in
tests/training: that output preservation changes what is learned, that fused updates are AdamW's, that bfloat16
weights are rounded without bias, and that the result is the average.
"""

import functools
import hashlib
import math
import os
import shutil
from pathlib import Path

import processes
import pytest
import ranks
import tiny_sd3
import torch
import torch._dynamo
from conftest import SCRIPTS, load_script
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from test_ddp import still

pytestmark = pytest.mark.slow
# accelerate turns the last setting on where a configuration does not name it; the script has to turn it off again.
FSDP2 = processes.fsdp2_environment() | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
ENGINES = {"one process": (1, {}), "DDP": (2, {}), "FSDP2": (2, FSDP2)}
WHOLE = {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_USE_DYNAMIC": "false"}
REGIONAL = WHOLE | {"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}
BUCKETS = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "32,32;16,64"}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2, "class_data_dir": "CLASS"}
KEPT = {"output_preservation_weight": 0.5, "class_prompt": "a dog"}
BFLOAT16 = {"full_bf16": True, "mixed_precision": "bf16"}
FUSED = {"fused_backward_pass": True, "max_grad_norm": "inf"}
# Flags, and settings of accelerate.
ROWS = {
    "compiled by block": ({}, REGIONAL),
    "compiled": ({}, WHOLE),
    "8-bit Adam": ({"use_8bit_adam": True}, {}),
    "Prodigy": ({"optimizer": "prodigy", "learning_rate": 1e3}, {}),
    "average, encoders, buckets": ({"use_ema": True, "ema_decay": 0.5, "train_text_encoder": True, **BUCKETS}, {}),
    "prior preservation, buckets": ({**PRIOR, **BUCKETS}, {}),
    "output preservation": (KEPT, {}),
    "quantised base": ({"bnb_quantization_config_path": "nf4.json"}, {}),
    "bfloat16 weights": (BFLOAT16, {}),
    "fused": (FUSED, {}),
    "fused, compiled, bfloat16 weights": (FUSED | BFLOAT16, REGIONAL),
}
# Of one script alone: what the other has no flag for, and what would take long and meet the same code.
ALONE = {
    "compiled": "lora",
    "output preservation": "lora",
    "quantised base": "lora",
    "bfloat16 weights": "full",
    "fused": "full",
    "fused, compiled, bfloat16 weights": "full",
}
REFUSED = {
    ("8-bit Adam", "FSDP2"): "use_8bit_adam does not work under FSDP2",
    ("Prodigy", "FSDP2"): "prodigy does not work under FSDP2",
    ("average, encoders, buckets", "FSDP2"): "use_ema does not work under FSDP2",
    ("quantised base", "FSDP2"): "bnb_quantization_config_path does not work under FSDP2",
    ("bfloat16 weights", "FSDP2"): "full_bf16 does not work under FSDP2",
    ("fused", "DDP"): "--fused_backward_pass keeps no gradient",
    ("fused", "FSDP2"): "fused_backward_pass does not work under FSDP2",
}
TRAINED = [
    (kind, row, engine)
    for kind in SCRIPTS
    for row in ROWS
    for engine in ENGINES
    if ALONE.get(row, kind) == kind
    and (row, engine) not in REFUSED
    and row != "quantised base"  # needs a GPU: tests/training/test_quantised.py
    and (not row.startswith("fused,") or engine == "one process")
]
# How near losses and weights of two processes are to those of one; else 1e-5.
NEAR = {"8-bit Adam": 1e-3, "bfloat16 weights": 1e-2}


def digest(trained):
    """One digest of all weights, and of their averages if there are any."""
    found = hashlib.sha256()
    for parameter in [*trained.parameters, *(trained.average.shadow_params if trained.average else ())]:
        found.update(ranks.whole(parameter).float().numpy().tobytes())
    return found.hexdigest()


def train(kind, argv, record):
    """A run of main, with its figures, and the digest of the weights after each update, in a file for torch.load."""
    script = load_script(kind)
    seen = ranks.Record()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *group: None)  # the next run needs it
        seen.spy(monkeypatch, script, "log_update", ranks.note_update)
        seen.spy(monkeypatch, script, "update_weights", lambda args, _: digest(args["trained"]))
        seen.spy(monkeypatch, script, "load_part", lambda args, _: args["name"])
        ranks.draw_fast(monkeypatch)
        script.main(script.parse_args(argv))
    seen["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.save(dict(seen), record)


class Outcome:
    """What the processes of a row have left: their exit codes, what they printed, what was written down."""

    def __init__(self, base, output, codes):
        self.base = base
        self.output = output
        self.codes = codes
        self.said = [Path(f"{output}.log.{rank}").read_text() for rank in range(len(codes))]

    def records(self, name=""):
        return [torch.load(f"{self.output}{name}.{rank}", weights_only=False) for rank in range(len(self.codes))]


def warm_up_dynamo(base):
    """Compiles once here: processes that are forked find what takes dynamo two seconds the first time."""
    model = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    text = torch.zeros(1, 8, model.config.joint_attention_dim), torch.zeros(1, model.config.pooled_projection_dim)
    torch.compile(model, backend="eager")(torch.zeros(1, 16, 4, 4), *text, torch.zeros(1)).sample.sum().backward()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Runs a row's two runs, the whole one and the one from its checkpoint, where that has not been done before."""
    home = tmp_path_factory.mktemp("table")
    base = still(tiny_sd3.build(home / "model", transformer_width=64))  # wide enough for 8-bit states
    images = home / "images"
    tiny_sd3.images(images, 3, size=(64, 64))
    tiny_sd3.images(home / "wide", 1, size=(96, 32))[0].rename(images / "wide.png")
    shutil.copytree(images, home / "class")
    warm_up_dynamo(base)

    @functools.cache
    def outcome(kind, row, engine):
        flags, settings = ROWS[row]
        count, environment = ENGINES[engine]
        output = home / f"{kind} {row} {engine}"
        flags = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": images,
            "instance_prompt": "a photo of sks dog",
            "resolution": 32,
            "train_batch_size": 2 // count,
            "max_train_steps": 3,
            "checkpointing_steps": 2,
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-3,  # Adam magnifies the rounding of a gradient that is all but zero
            "lr_warmup_steps": 0,
            "lr_scheduler": "linear",
            "seed": 0,
            "report_to": "none",
            "output_dir": output,
            **flags,
        }
        if kind == "lora" and row == "8-bit Adam":
            flags["rank"] = 64  # smaller states stay float32
        again = flags | {"output_dir": f"{output} again", "resume_from_checkpoint": output / "checkpoint-2"}

        def work():
            rank = os.environ.get("RANK", "0")
            train(kind, words(flags, home), f"{output}.{rank}")
            train(kind, words(again, home), f"{output} again.{rank}")

        environment = environment | settings | {"ACCELERATE_MIXED_PRECISION": "no"}
        children = processes.start(work, count, f"{output}.log", **environment)
        return Outcome(base, output, processes.watch(children))

    return outcome


def words(flags, home):
    """Flags as on a command line."""
    flags = {name: home / "class" if value == "CLASS" else value for name, value in flags.items()}
    given = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in flags.items()]
    return sum(given, [])


def weights(folder):
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("t*/*.safetensors")])
    return {f"{file.relative_to(folder)} {key}": weight for file in files for key, weight in load_file(file).items()}


@pytest.mark.parametrize(("kind", "row", "engine"), TRAINED)
def test_it_trains_right(outcome, kind, row, engine):
    found = outcome(kind, row, engine)
    assert set(found.codes) == {0}, "\n".join(found.said)[-3000:]
    records = found.records()
    assert [len(record["update_weights"]) for record in records] == [3] * len(records)
    for first, *others in zip(*(record["update_weights"] for record in records), strict=True):
        assert others == [first] * len(others)
    assert len(set(records[0]["update_weights"])) == 3
    assert all(0 < figures["grad_norm"] < math.inf for figures in records[0]["log_update"])
    assert bool(records[0]["graphs"]) == ("compiled" in row)

    again = found.records(" again")
    assert again[0]["log_update"] == records[0]["log_update"][2:]
    assert again[0]["update_weights"] == records[0]["update_weights"][2:]
    result = weights(found.output)
    assert result.keys() == weights(Path(f"{found.output} again")).keys()
    for name, weight in weights(Path(f"{found.output} again")).items():
        assert torch.equal(weight, result[name]), name
        assert weight.isfinite().all(), name

    pipeline = StableDiffusion3Pipeline.from_pretrained(found.output if kind == "full" else found.base)
    if kind == "lora":
        pipeline.load_lora_weights(found.output)
        assert pipeline.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize(("kind", "row", "engine"), [case for case in TRAINED if case[2] != "one process"])
def test_it_is_the_run_of_one_process(outcome, kind, row, engine):
    alone, together = outcome(kind, row, "one process"), outcome(kind, row, engine)
    near = NEAR.get(row, 1e-5)
    ours, theirs = (found.records()[0]["log_update"] for found in (alone, together))
    for one, two in zip(ours, theirs, strict=True):
        assert two == pytest.approx(one, rel=near, abs=near)
    ours, theirs = weights(alone.output), weights(together.output)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=near, msg=name)


@pytest.mark.parametrize(("row", "engine"), REFUSED)
def test_it_is_refused_in_one_line(outcome, row, engine):
    """Before anything is loaded; the launcher ends the other process before it says the same."""
    found = outcome(ALONE.get(row, "full"), row, engine)
    assert found.codes[0] == 2
    assert [line for said in found.said for line in said.splitlines() if ": error: " in line] == [
        line for line in found.said[0].splitlines() if REFUSED[row, engine] in line
    ]
    assert len(found.said[0].splitlines()) == 1
    assert not list(found.output.glob("[!.]*"))
