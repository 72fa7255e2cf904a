"""The full script's result: what is not trained is the base's files, byte for byte, and loads without a variant."""

import json
import shutil

import pytest
from diffusers import StableDiffusion3Pipeline
from transformers import T5EncoderModel

TRAINED = "transformer"


def files(folder, names):
    """The bytes of the files of some parts, by name."""
    paths = [path for name in names for path in sorted((folder / name).iterdir())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def parts(folder):
    return [path.name for path in folder.iterdir() if path.is_dir() and path.name != TRAINED]


def test_they_are_the_base_files(full, run, checkpoints):
    """With text encoders that are not trained; what is trained is written anew."""
    base = checkpoints()
    result = run(full, max_train_steps=1)
    assert files(result, parts(base)) == files(base, parts(base))
    assert len(parts(base)) == 8
    assert {path.name for path in (result / TRAINED).iterdir()} == {path.name for path in (base / TRAINED).iterdir()}


@pytest.fixture
def sharded(checkpoints, tmp_path):
    """A base in two precisions: float32 without a variant, and fp16, of which T5 is in several files."""
    base = shutil.copytree(checkpoints(), tmp_path / "base")
    half = checkpoints(variant="fp16")
    for path in half.glob("*/*.fp16.*"):
        shutil.copy(path, base / path.relative_to(half))
    t5 = T5EncoderModel.from_pretrained(half / "text_encoder_3", variant="fp16")
    (base / "text_encoder_3/model.fp16.safetensors").unlink()
    t5.half().save_pretrained(base / "text_encoder_3", variant="fp16", max_shard_size="30KB")
    return base


def plain(name):
    return name.replace(".fp16", "")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_two_variants_the_one_asked_for_is_copied(full, run, sharded, tmp_path, variant):
    output = run(full, pretrained_model_name_or_path=sharded, variant=variant, max_train_steps=1)
    given, copied = files(sharded, parts(sharded)), files(output, parts(sharded))
    weights = {name for name in given if "safetensors" in name and ("fp16" in name) == bool(variant)}
    others = {name for name in given if "safetensors" not in name}
    assert copied.keys() == {plain(name) for name in weights} | others
    assert len(weights) == (4 if variant is None else 3 + len(list(sharded.glob("text_encoder_3/*fp16*"))))
    for name in weights | others:
        if name.endswith("index.fp16.json"):
            index = json.loads(copied[plain(name)])
            assert {f"text_encoder_3/{file}" for file in index["weight_map"].values()} <= copied.keys()
        else:
            assert copied[plain(name)] == given[name], name
    pipeline = StableDiffusion3Pipeline.from_pretrained(output)
    assert pipeline.text_encoder_3 is not None


def test_of_a_model_on_the_hub_they_come_from_the_cache(full, run, checkpoints, tmp_path):
    """As it is after a download: links to blobs, in the revision that is asked for."""
    base = checkpoints()
    cache = tmp_path / "cache/models--someone--sd3"
    shutil.copytree(base, cache / "blobs")
    for path in (path for path in base.rglob("*") if path.is_file()):
        link = cache / "snapshots/0123456789012345678901234567890123456789" / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / path.relative_to(base))
    (cache / "refs").mkdir()
    (cache / "refs/v1").write_text("0123456789012345678901234567890123456789")
    flags = {"pretrained_model_name_or_path": "someone/sd3", "revision": "v1", "cache_dir": tmp_path / "cache"}
    output = run(full, **flags, max_train_steps=1)
    assert files(output, parts(base)) == files(base, parts(base))
    assert not any(path.is_symlink() for path in output.rglob("*"))


def test_what_was_read_at_the_start_is_not_read_again(script, run, checkpoints, tmp_path, monkeypatch):
    """The base is taken away once it is loaded: result, card and exit code are those of any run."""
    base = shutil.copytree(checkpoints(), tmp_path / "base")
    log_update = script.log_update

    def take_away(*inputs):
        shutil.rmtree(base, ignore_errors=True)
        log_update(*inputs)

    monkeypatch.setattr(script, "log_update", take_away)
    output = run(script, pretrained_model_name_or_path=base)
    assert (output / "README.md").is_file()
    if script.METHOD == "dreambooth-sd3":
        assert json.loads((output / "model_index.json").read_text())["text_encoder_3"][1] == "T5EncoderModel"
        StableDiffusion3Pipeline.from_pretrained(output)
