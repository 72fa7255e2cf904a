"""A resumed run equals the uninterrupted one bit for bit (losses, weights, images), or is refused with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, isolated, load_script
from ranks import read_files, watch_updates

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


def check_same(whole, resumed, updates, later, step):
    """The later updates, the final weights and every image drawn from `step` on are the same."""
    assert [update["step"] for update in later] == list(range(step + 1, 12))
    assert later == updates[step:]
    files, again = read_files(whole), read_files(resumed)
    assert {"image_0.png", "image_1.png"} <= again.keys()
    assert any(name.endswith(".safetensors") for name in again)
    assert any(name.startswith("validation/step-") for name in again)
    assert [name for name, data in again.items() if data != files[name]] == []


def flags_of(case, kind, folder, captioned):
    flags = {"instance_data_dir": captioned, "max_train_steps": 11, "checkpointing_steps": 1, "output_dir": folder}
    flags |= {"validation_prompt": "a dog in bucket", "num_validation_images": 2, "validation_epochs": 1}
    flags |= DROPOUT[kind] | CASES[case]
    return flags | ({"class_data_dir": folder.parent / "class"} if "class_prompt" in flags else {})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(script, kind, run, captioned, tmp_path, case):
    flags = flags_of(case, kind, tmp_path / "whole", captioned)
    with watch_updates(script) as updates:
        whole = run(script, **flags)
    seed = json.loads(Path(whole, "checkpoint-1/dreambooth.json").read_text())["seed"]
    assert seed == flags.get("seed", 0) or flags["seed"] is None
    for step, workers in zip((5, 6, 7), WORKERS[case], strict=True):
        again = flags | {"output_dir": tmp_path / f"from-{step}", "dataloader_num_workers": workers}
        again["checkpointing_steps"] = 100
        with watch_updates(script) as later:
            run(script, **again, resume_from_checkpoint=whole / f"checkpoint-{step}")
        check_same(whole, again["output_dir"], updates, later, step)


def test_a_seed_that_was_drawn_differs_from_run_to_run(script, run, captioned, tmp_path):
    """Two unseeded runs are not the same run: else the case above would show nothing."""
    losses = []
    for name in ("one", "two"):
        with watch_updates(script) as updates:
            run(script, seed=None, max_train_steps=1, instance_data_dir=captioned, output_dir=tmp_path / name)
        losses.append(updates[0]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_on_two_processes(argv, captioned, tmp_path, in_two_processes):
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
    in_two_processes(cases)
    records = [torch.load(f"{case['record']}.1", weights_only=False) for case in cases]
    assert {record["processes"] for record in records} == {2}
    for (kind, flags, step), record in zip(plan, records, strict=True):
        if step is None:
            updates = record["log_update"]
        else:
            check_same(tmp_path / kind / "whole", flags["output_dir"], updates, record["log_update"], step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, checkpoints, pictures):
    """Folders of one update with a checkpoint, by script. Do not write to them."""
    folders = {}
    for kind in SCRIPTS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        flags = {"pretrained_model_name_or_path": checkpoints(), "instance_data_dir": pictures()}
        flags |= {"instance_prompt": "a photo of sks dog", "resolution": 32, "train_batch_size": 1, "seed": 0}
        flags |= {"max_train_steps": 1, "checkpointing_steps": 1, "lr_warmup_steps": 0, "report_to": "none"}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        with isolated():
            script = load_script(kind)
            script.main(script.parse_args([*words, "--output_dir", str(folders[kind])]))
    return folders


def compare(script, argv, **flags):
    """Goes as far as a run that resumes compares itself with the checkpoint: a dry run says what it would do."""
    with isolated():
        script.main(script.parse_args(argv(dry_run=True, **flags)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "prodigy"}, "optimizer 'adamw', not 'prodigy'"),
        ({"train_text_encoder": True}, "train_text_encoder False, not True"),
        ({"pretrained_model_name_or_path": "OTHER"}, "pretrained_model_name_or_path '"),
        ({"use_ema": True}, "use_ema False, not True"),
        ({"rank": 8}, "rank 4, not 8"),
        ({"lora_layers": "attn.to_q"}, "lora_layers None, not 'attn.to_q'"),
        ({"lora_blocks": "0"}, "lora_blocks None, not '0'"),
        ({"use_dora": True}, "use_dora False, not True"),
    ],
)
def test_another_run_is_refused(script, kind, argv, checkpoints, saved, capsys, changed, message):
    if kind == "full" and changed.keys() & {"rank", "lora_layers", "lora_blocks", "use_dora"}:
        return
    if "OTHER" in changed.values():
        changed = {"pretrained_model_name_or_path": checkpoints(seed=1)}
    checkpoint = saved[kind] / "checkpoint-1"
    with pytest.raises(SystemExit) as end:
        compare(script, argv, resume_from_checkpoint=checkpoint, **changed)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (end.value.code, len(lines)) == (2, 1)
    assert f"{checkpoint} was trained with {message}" in lines[0]
    assert lines[0].endswith(": give the same")


def test_a_checkpoint_of_the_other_script_is_refused(script, kind, argv, saved, capsys):
    (other,) = SCRIPTS.keys() - {kind}
    with pytest.raises(SystemExit) as end:
        compare(script, argv, resume_from_checkpoint=saved[other] / "checkpoint-1")
    names = {"full": "'dreambooth-sd3'", "lora": "'dreambooth-sd3-lora'"}
    assert end.value.code == 2
    assert f"was trained with method {names[other]}, not {names[kind]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-3}, "learning_rate 0.0001 -> 0.001"),
        ({"instance_prompt": "a cat"}, "instance_prompt 'a photo of sks dog' -> 'a cat'"),
        ({"ema_decay": 0.5}, "ema_decay 0.9999 -> 0.5"),
        ({"train_batch_size": 2}, "train_batch_size 1 -> 2"),
        ({"max_train_steps": 9, "logging_dir": "other"}, "logging_dir 'logs' -> 'other', max_train_steps 1 -> 9"),
    ],
)
def test_what_has_changed_since_is_said(script, kind, argv, saved, caplog, changed, said):
    """In one line."""
    checkpoint = saved[kind] / "checkpoint-1"
    compare(script, argv, resume_from_checkpoint=checkpoint, **changed)
    (line,) = [line for line in caplog.messages if "with changed flags" in line]
    assert f"resuming {checkpoint} with changed flags: " in line
    assert said in line
    assert "resume_from_checkpoint" not in line


def test_a_run_goes_on_with_its_updates_shared_out_otherwise(lora, run, pictures, tmp_path):
    """Two images at once, or one after the other: the losses stay those of the run that began."""
    flags = {"instance_data_dir": pictures(5), "max_train_steps": 5}  # of three updates an epoch
    with watch_updates(lora) as updates:
        whole = run(lora, **flags, train_batch_size=2, checkpointing_steps=2)
    again = {"gradient_accumulation_steps": 2, "resume_from_checkpoint": whole / "checkpoint-2"}
    with watch_updates(lora) as later:
        run(lora, **flags, **again, output_dir=tmp_path / "again")
    assert [update["step"] for update in later] == [3, 4, 5]
    for ours, theirs in zip(updates[2:], later, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)


def test_fewer_updates_than_the_checkpoint_has_are_none(script, run):
    out = run(script, checkpointing_steps=2)
    before = read_files(out)
    with watch_updates(script) as updates:
        run(script, max_train_steps=1, resume_from_checkpoint="latest")
    assert updates == []
    assert read_files(out) == before


@pytest.mark.parametrize("way", ["checkpoint-1", "checkpoint-1/", "{}/checkpoint-1", "{}/checkpoint-1/", "{}/kept"])
def test_every_way_to_name_a_checkpoint(lora, argv, saved, tmp_path, way):
    for name in ("checkpoint-1", "kept"):
        shutil.copytree(saved["lora"] / "checkpoint-1", tmp_path / "out" / name)
    shutil.copytree(saved["lora"] / "checkpoint-1", tmp_path / "out/checkpoint-2")
    folder, manifest = lora.find_checkpoint(lora.parse_args(argv(resume_from_checkpoint=way.format(tmp_path / "out"))))
    assert (folder, manifest["step"]) == (tmp_path / "out" / Path(way).name, 1)
    folder, _ = lora.find_checkpoint(lora.parse_args(argv(resume_from_checkpoint="latest")))
    assert folder == tmp_path / "out/checkpoint-2"
