"""What is in memory at each stage: one text encoder at a time, then the VAE, then the transformer; nothing twice."""

import gc
import weakref

import pytest

MODELS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "transformer")


@pytest.fixture
def loads(script, monkeypatch):
    """(name, {name of a model that is alive then: its device}) of each load of a model, in order."""
    alive, record, load_part = [], [], script.load_part

    def recorded(args, parts, name, **kwargs):
        if name not in MODELS:
            return load_part(args, parts, name, **kwargs)
        gc.collect()
        record.append((name, {other: model().device.type for other, model in alive if model()}))
        model = load_part(args, parts, name, **kwargs)
        alive.append((name, weakref.ref(model)))
        return model

    monkeypatch.setattr(script, "load_part", recorded)
    return record


ENCODERS = [("text_encoder", {}), ("text_encoder_2", {}), ("text_encoder_3", {}), ("vae", {})]
CASES = {
    "latents encoded in each update": ({}, [*ENCODERS, ("transformer", {"vae": "cpu"})]),
    "latents cached, nothing to draw": ({"cache_latents": True}, [*ENCODERS, ("transformer", {"vae": "meta"})]),
    "few images of one view": ({"center_crop": True}, [*ENCODERS, ("transformer", {"vae": "meta"})]),
    "one view and its mirror": (
        {"center_crop": True, "random_flip": True},
        [*ENCODERS, ("transformer", {"vae": "cpu"})],
    ),
    "latents cached, images drawn": (
        {"cache_latents": True, "validation_prompt": "a dog", "num_validation_images": 1},
        [*ENCODERS, ("transformer", {"vae": "cpu"})],
    ),
    "no T5": ({"no_t5": True}, [*ENCODERS[:2], ENCODERS[3], ("transformer", {"vae": "cpu"})]),
}


@pytest.mark.parametrize("case", CASES)
def test_stages(script, run, loads, case):
    flags, expected = CASES[case]
    run(script, **flags)
    if "lora" not in script.__name__:  # the full result has every part
        *loads, transformer = loads
        parts = sorted(name for name, _ in loads[len(expected) - 1 :])
        assert parts == sorted(name for name, _ in expected[:-1])
        loads = [*loads[: len(expected) - 1], transformer]
    assert loads == expected


def test_captions_do_not_keep_the_encoders(script, run, loads, pictures, tmp_path):
    for path in pictures(3).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / path.name).with_suffix(".txt").write_text(f"a dog called {path.stem}")
    run(script, instance_data_dir=tmp_path, output_dir=tmp_path / "out")
    assert [*loads[:4], loads[-1]] == [*ENCODERS, ("transformer", {"vae": "cpu"})]


def test_frozen_parts_come_in_their_precision_from_disk(lora, run, monkeypatch):
    dtypes, load_part = {}, lora.load_part

    def recorded(args, parts, name, **kwargs):
        part = load_part(args, parts, name, **kwargs)
        if name in MODELS:
            dtypes[name] = (str(kwargs["dtype"]), str(next(part.parameters()).dtype))
        return part

    monkeypatch.setattr(lora, "load_part", recorded)
    run(lora, mixed_precision="bf16", max_train_steps=1)
    frozen = dict.fromkeys(MODELS, ("torch.bfloat16",) * 2)
    assert dtypes == frozen | {"vae": ("torch.float32",) * 2}
