"""What is in memory at each stage: one text encoder at a time, then the VAE, then the transformer; nothing twice."""

import weakref
from pathlib import Path

import pytest
import torch
from accelerate import utils
from accelerate.utils import AutocastKwargs
from conftest import in_turn, isolated
from diffusers import AutoencoderKL

MODELS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "transformer")


@pytest.fixture
def loads(script, monkeypatch):
    """(name, {name of a model that is alive then: its device}, dtype) of each load of a model, in order."""
    alive, record, load_part = [], [], script.load_part

    def recorded(parts, name, *rest, **kwargs):
        there = {other: model().device.type for other, model in alive if model()}
        model = load_part(parts, name, *rest, **kwargs)
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


@pytest.mark.parametrize(("kind", "case"), [*in_turn([(case,) for case in CASES]), ("lora", "bfloat16")])
def test_stages(script, kind, run, loads, pictures, tmp_path, case):
    flags = dict(CASES[case])
    for path in pictures(3).iterdir() if flags.pop("captions", False) else ():
        flags["instance_data_dir"] = tmp_path
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / path.name).with_suffix(".txt").write_text(f"a dog called {path.stem}")
    run(script, max_train_steps=1, output_dir=tmp_path / "out", **flags)
    expected = [(name, {}) for name in MODELS[:4] if name != "text_encoder_3" or "no_t5" not in flags]
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


BF16 = {"mixed_precision": "bf16", "max_train_steps": 3}
BUCKETS = {"resolution": 48, "aspect_ratio_buckets": "48,48;32,48"}  # three patches high, and two


def weights_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("**/*.safetensors"))}


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        pytest.param(BF16, "autocast's copies", id="autocast keeps no copies"),
        pytest.param(BUCKETS | {"size": (96, 64)}, "cut_positions", id="positions are cut"),
        pytest.param({"resolution": 64, "size": (80, 80)}, "has_fixed_crops", id="latents are cached unasked"),
        pytest.param({"resolution": 48, "center_crop": True}, "has_fixed_crops", id="and of the middle"),
    ],
)
def test_what_saves_memory_changes_no_bit(script, kind, run, pictures, monkeypatch, tmp_path, flags, change):
    if change == "cut_positions" and kind == "full":
        pytest.skip("full training saves the whole table")
    flags = dict(flags)
    flags["instance_data_dir"] = pictures(2, size=flags.pop("size", (80, 64)))
    found = run(script, **flags, output_dir=tmp_path / "found")
    if change == "autocast's copies":
        monkeypatch.setattr(utils, "AutocastKwargs", lambda cache_enabled: AutocastKwargs())
    elif change == "cut_positions":
        monkeypatch.setattr(script, change, lambda args, transformer: None)
    else:
        monkeypatch.setattr(script.DreamBoothDataset, change, lambda dataset: False)
    assert weights_of(found) == weights_of(run(script, **flags, output_dir=tmp_path / "plain"))


def test_latents_are_encoded_once_where_each_image_has_one_crop(script, run, pictures, monkeypatch, tmp_path):
    encoded, whole = [], AutoencoderKL._encode
    monkeypatch.setattr(AutoencoderKL, "_encode", lambda vae, pixels: encoded.append(1) or whole(vae, pixels))
    square = {"instance_data_dir": pictures(2, size=(80, 80)), "max_train_steps": 6}
    counts = []
    for number, flags in enumerate((square, square | {"random_flip": True}, {"max_train_steps": 6})):
        encoded.clear()
        run(script, **flags, output_dir=tmp_path / str(number))
        counts.append(len(encoded))
    assert counts == [2, 6, 6]


def test_out_of_memory_names_the_flags_that_lower_it(script, kind, run, monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(script, "flow_losses", fail)
    with pytest.raises(SystemExit) as end:
        run(script, gradient_checkpointing=True)
    own = {"full": "--use_8bit_adam, --fused_backward_pass", "lora": "--blocks_to_swap"}[kind]
    assert str(end.value.code).startswith("out of GPU memory: add --cache_latents, --offload, ")
    assert own in end.value.code and "Tried to allocate 2.00 GiB" in end.value.code


def test_blocks_in_ram_are_refused_where_they_cannot_be(lora, argv, capsys):
    with isolated(), pytest.raises(SystemExit) as end:
        lora.main(lora.parse_args(argv(blocks_to_swap=2, gradient_checkpointing=True)))
    assert end.value.code == 2
    assert "--blocks_to_swap needs an NVIDIA GPU" in capsys.readouterr().err
