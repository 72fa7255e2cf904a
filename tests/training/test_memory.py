"""What is in memory at each stage: one text encoder at a time, then the VAE, then the transformer; nothing twice."""

import weakref

import pytest
from conftest import isolated
from diffusers import AutoencoderKL

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


def test_the_vae_has_one_image_at_a_time_whatever_the_batch(script, run, monkeypatch, tmp_path):
    """At 1024 px it needs 2.5 GiB to encode one, 3 to decode one."""
    seen = {"_encode": set(), "_decode": set()}
    for part, sizes in seen.items():
        whole = getattr(AutoencoderKL, part)

        def noted(vae, batch, *args, whole=whole, sizes=sizes, **kwargs):
            sizes.add(len(batch))
            return whole(vae, batch, *args, **kwargs)

        monkeypatch.setattr(AutoencoderKL, part, noted)
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": tmp_path / "class"}
    flags = {"num_class_images": 3, "sample_batch_size": 3, "train_batch_size": 3, "max_train_steps": 1}
    run(script, **prior, **flags)
    assert seen == {"_encode": {1}, "_decode": {1}}


def test_a_gradient_is_held_once_by_several_processes(script, argv):
    """DDP's buckets are the gradients, and the table of positions, which never changes, is not sent around."""
    with isolated():
        handler = script.start_accelerator(script.parse_args(argv())).ddp_handler
    assert handler.gradient_as_bucket_view and not handler.broadcast_buffers
