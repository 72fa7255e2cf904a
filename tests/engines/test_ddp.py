"""Two processes under DDP equal one process with twice the batch: losses, gradients, weights and learning rates."""

import ast
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny_sd3
import torch
from conftest import SCRIPTS, isolated, start_two_processes
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
# Flags by the name of the case. There are five images in two shapes: the last group of an epoch is not full.
CASES = {
    "accumulation": {
        "num_train_epochs": 2,
        "checkpointing_steps": 2,
        "gradient_accumulation_steps": 2,
        "random_flip": True,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 1,
        "validation_prompt": "a photo of sks dog in the bucket",
        "num_validation_images": 3,
        "validation_data_dir": "IMAGES",
    },
    "cached prior": {
        "max_train_steps": 4,
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "num_class_images": 3,
        "class_data_dir": "CLASS",
        "sample_batch_size": 1,
        "caption_dropout": 0.3,
        "cache_latents": True,
        "alpha_mask": True,
    },
    "encoders in buckets": {
        "num_train_epochs": 1,
        "train_text_encoder": True,
        "text_encoder_lr": 1e-3,
        "use_aspect_ratio_buckets": True,
        "aspect_ratio_buckets": "32,32;48,32",
    },
}
UPDATES = {"accumulation": 4, "cached prior": 4, "encoders in buckets": 3}  # in all, as with one process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images of two shapes, each with its own caption."""
    folder = tmp_path_factory.mktemp("uneven")
    tiny_sd3.images(folder, 3, size=(64, 64))
    for path in tiny_sd3.images(folder / "tall", 2, size=(48, 72), seed=1):
        path.rename(folder / f"tall-{path.name}")
    (folder / "tall").rmdir()
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        path.with_suffix(".txt").write_text(f"a photo of sks dog {'in the bucket ' * number}")
    return folder


@pytest.fixture(scope="module")
def records(folder, checkpoints, tmp_path_factory):
    """{(script, case, processes): [record of each rank]}, and the output folders under "output"."""
    home, cases, found = tmp_path_factory.mktemp("ddp"), {1: [], 2: []}, {}
    model = still(shutil.copytree(checkpoints(), home / "model"))
    for kind in SCRIPTS:
        for name, changes in CASES.items():
            for processes in cases:
                output = home / f"{kind}-{name}-{processes}"
                flags = {
                    "pretrained_model_name_or_path": model,
                    "instance_data_dir": folder,
                    "instance_prompt": "a photo of sks dog",
                    "resolution": 32,
                    "train_batch_size": 2 // processes,
                    "learning_rate": 1e-3,
                    "adam_epsilon": 1e-3,  # Adam magnifies the rounding of a gradient that is all but zero
                    "max_grad_norm": "inf",
                    "lr_warmup_steps": 0,
                    "seed": 0,
                    "report_to": "none",
                    "output_dir": output,
                    **changes,
                }
                named = {"CLASS": home / f"class-{kind}-{processes}", "IMAGES": folder}
                flags = {name: named.get(value, value) for name, value in flags.items()}
                words = [
                    [f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in flags.items()
                ]
                case = {"script": kind, "argv": sum(words, []), "record": f"{output}.record", "draw_fast": True}
                cases[processes].append(case)
                found[kind, name, processes] = output
    for kind in SCRIPTS:  # what one process has begun is ended by two, with updates of the same size and of twice that
        whole = next(case for case in cases[1] if case["record"] == f"{home}/{kind}-accumulation-1.record")
        for name, batch in (("resumed", 1), ("resumed larger", 2)):
            output = home / f"{kind}-{name}"
            later = [str(output) if word == str(home / f"{kind}-accumulation-1") else word for word in whole["argv"]]
            later[later.index("--train_batch_size") + 1] = str(batch)
            later[later.index("--num_train_epochs") + 1] = str(2 * batch)  # as many updates, of twice the size
            later += ["--resume_from_checkpoint", str(home / f"{kind}-accumulation-1/checkpoint-2")]
            cases[2].append(whole | {"argv": later, "record": f"{output}.record"})
            found[kind, name, 2] = output
    with isolated():
        for case in cases[1]:
            ranks.run_case(case)
    start_two_processes(home, cases[2])
    return {key: Runs(output, key[2]) for key, output in found.items()}


def still(model):
    """The checkpoint without T5's dropout, whose draws belong to a batch and not to an image."""
    path = model / "text_encoder_3/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout_rate": 0.0}))
    return model


class Runs:
    def __init__(self, output, processes):
        self.output = output
        self.ranks = [torch.load(f"{output}.record.{rank}", weights_only=False) for rank in range(processes)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_twice_the_batch(records, kind, case):
    one, two = records[kind, case, 1], records[kind, case, 2]
    assert [record["processes"] for record in two.ranks] == [2, 2]
    updates = one.ranks[0]["log_update"]
    assert len(updates) == UPDATES[case]
    for ours, theirs in zip(updates, two.ranks[0]["log_update"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)
    for ours, theirs in zip(one.ranks[0]["gradients"], two.ranks[0]["gradients"], strict=True):
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    files = sorted(path.relative_to(one.output) for path in one.output.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(two.output) for path in two.output.rglob("*.safetensors")) != []
    for file in files:
        ours, theirs = load_file(one.output / file), load_file(two.output / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=f"{file}: {name}")


def test_two_processes_go_on_as_the_one_that_began(records, kind):
    """Its losses, rates and weights, where processes x batch x accumulation is what it was."""
    whole, resumed = records[kind, "accumulation", 1], records[kind, "resumed", 2]
    updates, later = whole.ranks[0]["log_update"][2:], resumed.ranks[0]["log_update"]
    assert [update["step"] for update in later] == [3, 4]
    for ours, theirs in zip(updates, later, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-6)
    for path in resumed.output.glob("**/*.safetensors"):
        ours, theirs = load_file(whole.output / path.relative_to(resumed.output)), load_file(path)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


def test_another_size_of_update_is_said(records, kind):
    """And so is another share of it where the size is the same."""
    log = Path(records[kind, "resumed", 2].output.parent, "log.0").read_text()
    said = [line for line in log.splitlines() if "with changed flags: " in line]
    assert len(said) == 2 * len(SCRIPTS)
    assert all("processes 1 -> 2" in line for line in said)
    assert ["train_batch_size 2 -> 1" in line for line in said] == [True, False] * len(SCRIPTS)
    updates = records[kind, "resumed larger", 2].ranks[0]["log_update"]
    assert [update["step"] for update in updates] == [3, 4]


@pytest.mark.parametrize("case", CASES)
def test_images_and_draws_differ_between_the_processes(records, kind, case):
    """At each update the processes have other images, and each image has the noise that it has on one process."""
    one, two = records[kind, case, 1].ranks[0], records[kind, case, 2].ranks
    alone = {
        seed: (noise, u)
        for seeds, _, noises, us in one["draw_latents"]
        for seed, noise, u in zip(seeds, noises, us, strict=True)
    }
    for ours, theirs in zip(two[0]["draw_latents"], two[1]["draw_latents"], strict=True):
        for seeds, _, noises, us in (ours, theirs):
            for seed, noise, u in zip(seeds, noises, us, strict=True):
                assert torch.equal(noise, alone[seed][0]) and torch.equal(u, alone[seed][1])
    common = [
        set(ours[0]) & set(theirs[0])
        for ours, theirs in zip(two[0]["draw_latents"], two[1]["draw_latents"], strict=True)
    ]
    assert sum(map(bool, common)) < len(common) / 2  # the odd image of an epoch is filled up with a copy
    assert not torch.equal(two[0]["draw_latents"][0][2], two[1]["draw_latents"][0][2])


def items(calls):
    """What a function was called with, as text: each prompt by itself, because text encoders get many at once."""
    for call in calls:
        if isinstance(call, list | tuple) and str(call[-1]).startswith("["):
            yield from (f"{call[0]} {prompt}" for prompt in ast.literal_eval(call[-1]))
        else:
            yield str(call)


@pytest.mark.parametrize("case", ["accumulation", "cached prior"])
def test_drawing_is_shared_and_each_item_encoded_once_by_each_process(records, kind, case):
    one, two = records[kind, case, 1].ranks[0], records[kind, case, 2].ranks
    for name in ("encode", "encode_moments", "draw_images"):
        if name == "encode_moments" and case == "accumulation":
            continue  # without a cache the images are encoded again at each step
        name += " without gradients" if name != "encode_moments" else ""
        alone, ours, theirs = (Counter(items(record.get(name, []))) for record in (one, *two))
        assert alone
        if name == "encode_moments":  # sums of pixels, of class images too, see the next test
            for sums in (ours, theirs):
                found, expected = (sorted(map(float, one.elements())) for one in (sums, alone))
                np.testing.assert_allclose(found, expected, atol=8)
        elif name.startswith("encode"):
            assert ours == theirs == alone
        elif case == "accumulation":  # three images twice: an odd one has no partner
            assert ours.keys() | theirs.keys() == alone.keys()
            assert [ours.total(), theirs.total(), alone.total()] == [4, 4, 6]
        else:
            assert ours + theirs == alone
            assert abs(ours.total() - theirs.total()) <= 1


def test_class_and_validation_images_are_those_of_one_process(records, kind):
    one, two = records[kind, "cached prior", 1].output.parent, records[kind, "accumulation", 2]
    classes = [sorted(path.name for path in Path(one, f"class-{kind}-{n}").iterdir()) for n in (1, 2)]
    assert [name.split("-")[0] for name in classes[0]] == [name.split("-")[0] for name in classes[1]]
    assert len({name.split("-")[1] for name in classes[0]}) == 3
    for names in zip(*classes, strict=True):  # a prompt that is encoded beside another differs in its last bit
        pixels = [np.asarray(Image.open(Path(one, f"class-{kind}-{n}", name))) for n, name in enumerate(names, 1)]
        np.testing.assert_allclose(*(image.astype(float) for image in pixels), atol=2)
    drawn = sorted(path.name for path in two.output.glob("image_[0-9].png"))
    assert drawn == ["image_0.png", "image_1.png", "image_2.png"]


def test_a_process_that_hangs_is_found_out_within_an_hour(records, kind):
    """The others wait as long while one saves."""
    assert {rank["timeout"] for rank in records[kind, "accumulation", 2].ranks} == {60 * 60}


@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_says_that_something_is_deprecated(records, rank):
    log = Path(records["full", "accumulation", 2].output.parent, f"log.{rank}").read_text()
    assert [line for line in log.splitlines() if "FutureWarning" in line or "DeprecationWarning" in line] == []


def test_logs_and_bars_come_from_one_process(records):
    """Of processes that start on their own, which tell tqdm before it is imported, bars too: test_two_machines.py."""
    home = records["full", "accumulation", 2].output.parent
    log, other = (Path(home, f"log.{rank}").read_text() for rank in (0, 1))
    assert log.count("The result is in") == 2 * (len(CASES) + 2)
    bars = [line.partition(":")[0] for line in log.replace("\r", "\n").splitlines() if "%|" in line]
    ours = {"Training", "Encoding text with text_encoder", "Encoding images"}
    assert ours | {"Loading weights"} <= set(bars)
    assert [line for line in other.splitlines() if line.startswith("INFO")] == []
    done = [line for line in log.replace("\r", "\n").splitlines() if line.startswith("Training: 100%")]
    assert {line.split("|")[2].split()[0] for line in done} >= {f"{n}/{n}" for n in UPDATES.values()}
