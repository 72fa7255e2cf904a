"""A resumed run is the uninterrupted one, bit for bit: losses, weights, images; or it is refused, with the reason."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, isolated

pytestmark = pytest.mark.usefixtures("few_steps")
PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 3}
DROPOUT = {"lora": {"lora_dropout": 0.1}, "full": {}}
# Five images and a batch of 1, so that 5, 6 and 7 updates are the end of an epoch, its first batch, its middle; of
# three updates an epoch with accumulation 2. Between them the cases have all that draws or keeps a state.
CASES = {
    "prior, captions, crops": {**PRIOR, "gradient_accumulation_steps": 2, "random_flip": True, "caption_dropout": 0.3},
    "encoders, prodigy": {"train_text_encoder": True, "optimizer": "prodigy", "learning_rate": 1.0},
    "cached, unseeded": {"cache_latents": True, "seed": None, "lr_scheduler": "cosine", "lr_warmup_steps": 3},
}
WORKERS = {"prior, captions, crops": (0, 2, 0), "encoders, prodigy": (0, 0, 0), "cached, unseeded": (1, 0, 0)}


@pytest.fixture(scope="module")
def captioned(pictures, tmp_path_factory):
    """Five pictures, three of them with a caption."""
    folder = tmp_path_factory.mktemp("captioned") / "pictures"
    shutil.copytree(pictures(5), folder)
    for number, path in enumerate(sorted(folder.glob("*.png"))[:3]):
        path.with_suffix(".txt").write_text(f"a photo of dog {number}")
    return folder


def read_run(folder):
    """What a run of 12 updates left: its figures by update, and the bytes of weights and images by name."""
    rows = [json.loads(line) for line in Path(folder, "logs/scalars.jsonl").read_text().splitlines()]
    figures = {row["step"]: row for row in rows if "loss" in row}
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.suffix in {".safetensors", ".png"} and "checkpoint-" not in str(path)
    }
    return figures, files


def check_same(whole, resumed, step):
    """The later updates, the final weights and every image drawn from `step` on are the same."""
    figures, files = read_run(whole)
    later, again = read_run(resumed)
    assert sorted(later) == list(range(step + 1, 13))
    assert later == {number: figures[number] for number in later}
    again = {name: data for name, data in again.items() if name not in ("loss.png", "validation.png")}
    assert {"image_0.png", "image_1.png"} <= again.keys()
    assert any(name.endswith(".safetensors") for name in again)
    assert any(name.startswith("validation/step-") for name in again)
    assert [name for name, data in again.items() if data != files[name]] == []


def flags_of(case, kind, folder, captioned):
    flags = {"instance_data_dir": captioned, "max_train_steps": 12, "checkpointing_steps": 1, "output_dir": folder}
    flags |= {"validation_prompt": "a dog in bucket", "num_validation_images": 2, "validation_epochs": 1}
    flags |= DROPOUT[kind] | CASES[case]
    return flags | ({"class_data_dir": folder.parent / "class"} if "class_prompt" in flags else {})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(script, kind, run, captioned, tmp_path, case):
    flags = flags_of(case, kind, tmp_path / "whole", captioned)
    whole = run(script, **flags)
    seed = json.loads(Path(whole, "checkpoint-1/dreambooth.json").read_text())["seed"]
    assert seed == flags.get("seed", 0) or flags["seed"] is None
    for step, workers in zip((5, 6, 7), WORKERS[case], strict=True):
        again = flags | {"output_dir": tmp_path / f"from-{step}", "dataloader_num_workers": workers}
        run(script, **again, checkpoints_total_limit=1, resume_from_checkpoint=whole / f"checkpoint-{step}")
        check_same(whole, again["output_dir"], step)


def test_a_seed_that_was_drawn_differs_from_run_to_run(script, run, captioned, tmp_path):
    """Two unseeded runs are not the same run: else the case above would show nothing."""
    losses = []
    for name in ("one", "two"):
        run(script, seed=None, max_train_steps=1, instance_data_dir=captioned, output_dir=tmp_path / name)
        losses.append(json.loads((tmp_path / name / "logs/scalars.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_on_two_processes(argv, captioned, tmp_path):
    """Whole runs and resumed ones, of both scripts, in one pair of processes."""
    cases, plan = [], []
    for kind in SCRIPTS:
        flags = flags_of("prior, captions, crops", kind, tmp_path / kind / "whole", captioned)
        flags |= {"dataloader_num_workers": 0, "validation_epochs": 2}
        plan.append((kind, flags, None))
        for step in (5, 7):
            again = {"output_dir": tmp_path / kind / f"from-{step}", "checkpointing_steps": 100}
            again["resume_from_checkpoint"] = flags["output_dir"] / f"checkpoint-{step}"
            plan.append((kind, flags | again, step))
    for kind, flags, _ in plan:
        case = {"script": kind, "argv": argv(**flags), "draw_fast": True}
        cases.append(case | {"record": str(tmp_path / f"record{len(cases)}")})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/ranks.py"), str(tmp_path / "cases.json")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {torch.load(f"{case['record']}.1", weights_only=False)["processes"] for case in cases} == {2}
    for kind, flags, step in plan:
        if step:
            check_same(tmp_path / kind / "whole", flags["output_dir"], step)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "prodigy"}, "--optimizer 'AdamW', this run has 'prodigy'"),
        ({"train_text_encoder": True}, "--train_text_encoder False, this run has True"),
        ({"pretrained_model_name_or_path": "OTHER"}, "--pretrained_model_name_or_path '"),
        ({"use_ema": True}, "--use_ema False, this run has True"),
        ({"rank": 8}, "--rank 4, this run has 8"),
        ({"lora_layers": "attn.to_q"}, "--lora_layers None, this run has 'attn.to_q'"),
        ({"lora_blocks": "0"}, "--lora_blocks None, this run has '0'"),
        ({"use_dora": True}, "--use_dora False, this run has True"),
    ],
)
def test_another_run_is_refused(script, kind, checkpoints, refusal, changed, message):
    if kind == "full" and changed.keys() & {"rank", "lora_layers", "lora_blocks", "use_dora"}:
        return
    if "OTHER" in changed.values():
        changed = {"pretrained_model_name_or_path": checkpoints(seed=1)}
    assert message in refusal(**changed)


SAVED = {}


@pytest.fixture
def refusal(script, kind, argv, run, capsys, tmp_path, tmp_path_factory):
    """The line with which a run refuses the checkpoint of another one; it loads no model."""

    def refusal(**changed):
        if kind not in SAVED:
            SAVED[kind] = run(
                script, max_train_steps=1, checkpointing_steps=1, output_dir=tmp_path_factory.mktemp("saved")
            )
        shutil.copytree(SAVED[kind], tmp_path / "out")
        before = read_run(tmp_path / "out")
        capsys.readouterr()
        with isolated(), pytest.raises(SystemExit) as end:
            script.main(script.parse_args(argv(resume_from_checkpoint="latest", **changed)))
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert (end.value.code, len(lines)) == (2, 1)
        assert f"{tmp_path / 'out/checkpoint-1'} was trained with " in lines[0]
        assert read_run(tmp_path / "out") == before
        return lines[0]

    return refusal


def test_every_way_to_name_a_checkpoint(script, run, argv, tmp_path):
    out = run(script, checkpointing_steps=1)
    elsewhere = tmp_path / "kept"
    shutil.copytree(out / "checkpoint-1", elsewhere)
    ways = ["checkpoint-1", f"{out}/checkpoint-1", f"{out}/checkpoint-1/", "checkpoint-1/", str(elsewhere)]
    for way in ways:
        args = script.parse_args(argv(resume_from_checkpoint=way))
        folder, manifest = script.choose_checkpoint(args, processes=1)
        assert manifest["step"] == 1, way
        assert folder == (elsewhere if way == str(elsewhere) else out / "checkpoint-1")
    newest, manifest = script.choose_checkpoint(script.parse_args(argv(resume_from_checkpoint="latest")), processes=1)
    assert (newest, manifest["step"]) == (out / "checkpoint-2", 2)
