"""What is in memory at each stage: one text encoder at a time, then the VAE, then the transformer; nothing twice."""

import weakref

import pytest

MODELS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "transformer")


@pytest.fixture
def loads(script, monkeypatch):
    """(name, {name of a model that is alive then: its device}, dtype) of each load of a model, in order."""
    alive, record, load_part = [], [], script.load_part

    def recorded(args, parts, name, *rest, **kwargs):
        there = {other: model().device.type for other, model in alive if model()}
        model = load_part(args, parts, name, *rest, **kwargs)
        if name in MODELS:
            record.append((name, there, str(model.dtype).removeprefix("torch.")))
            alive.append((name, weakref.ref(model)))
        return model

    monkeypatch.setattr(script, "load_part", recorded)
    return record


CASES = {
    "latents encoded in each update": {},
    "latents cached": {"cache_latents": True},
    "no T5": {"no_t5": True},
    "captions": {"captions": True},
    "bfloat16": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize("case", CASES)
def test_stages(script, kind, run, loads, pictures, tmp_path, case):
    flags = dict(CASES[case])
    for path in pictures(3).iterdir() if flags.pop("captions", False) else ():
        flags["instance_data_dir"] = tmp_path
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / path.name).with_suffix(".txt").write_text(f"a dog called {path.stem}")
    run(script, max_train_steps=1, output_dir=tmp_path / "out", **flags)
    expected = [(name, {}) for name in MODELS[:4] if name != "text_encoder_3" or "no_t5" not in flags]
    if kind == "full":  # the parts that are not trained go to the result while there is memory for them
        result, loads = loads[len(expected) : -1], [*loads[: len(expected)], loads[-1]]
        assert sorted(name for name, _, _ in result) == sorted(name for name, _ in expected)
        assert all(there == {"vae": "cpu"} for _, there, _ in result)
    assert [(name, there) for name, there, _ in loads] == [*expected, ("transformer", {"vae": "cpu"})]
    frozen = "bfloat16" if "mixed_precision" in flags else "float32"
    trained = frozen if kind == "lora" else "float32"  # the base of adapters is frozen
    assert [dtype for _, _, dtype in loads] == [*[frozen] * (len(expected) - 1), "float32", trained]
