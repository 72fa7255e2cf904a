"""The tiny checkpoint is a complete pipeline, in every shape that the tests use."""

import json

import numpy as np
import pytest
import tiny_sd3
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def load(folder, **kwargs):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("options", "kwargs", "joint_width", "pooled_width"),
    [
        pytest.param({}, {}, 56, 40, id="tiny"),
        pytest.param({"preset": "odd"}, {}, 49, 37, id="odd"),
        pytest.param({"preset": "real"}, {}, 4096, 2048, id="real"),
        pytest.param({"clip_width": 20, "clip2_width": 32, "t5_width": 60}, {}, 60, 52, id="widths"),
        pytest.param({"sd35": True}, {}, 56, 40, id="sd35"),
        pytest.param({"t5": False}, NO_T5, 56, 40, id="no t5"),
        pytest.param({"variant": "fp16"}, {"variant": "fp16"}, 56, 40, id="fp16"),
    ],
)
def test_loads_encodes_and_draws(checkpoints, options, kwargs, joint_width, pooled_width):
    pipeline = load(checkpoints(**options), **kwargs)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(["a dog", "a cat"], None, None, max_sequence_length=100)
    assert embeds.shape == (2, 77 + 100, joint_width)
    assert pooled.shape == (2, pooled_width)
    assert not torch.equal(embeds[0], embeds[1])
    assert not torch.equal(pooled[0], pooled[1])
    image = pipeline("a dog", num_inference_steps=1, height=32, width=32).images[0]
    assert image.size == (32, 32)
    assert len(image.getcolors(32 * 32)) > 100


def test_same_seed_same_weights(tmp_path):
    state = torch.get_rng_state()
    first, again, other = (
        load_file(tiny_sd3.build(tmp_path / name, seed=seed) / "transformer/diffusion_pytorch_model.safetensors")
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(state, torch.get_rng_state()), "the draws of the caller must not depend on a checkpoint"


def test_a_variant_is_written_alone(checkpoints):
    names = [path.name for path in checkpoints(variant="fp16").rglob("*.safetensors")]
    assert len(names) == 5
    assert all(".fp16." in name for name in names)


def test_sd35_has_a_second_attention(checkpoints):
    transformer = SD3Transformer2DModel.from_pretrained(checkpoints(sd35=True), subfolder="transformer")
    names = [name for name, _ in transformer.named_parameters()]
    assert any(".0.attn2.to_q." in name for name in names)
    assert any(".norm_q." in name for name in names)


def test_without_t5_the_index_says_so(checkpoints):
    folder = checkpoints(t5=False)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert not (folder / "text_encoder_3").exists()


# Of a tokenizer that pads with its end mark, of one that pads with "!", and of T5's.
IDS = {
    "a Photo of sks dog": (
        [521, 320, 512, 78, 83, 334, 513, 514, 338, 515, 326, 522],
        [521, 320, 512, 78, 83, 334, 513, 514, 338, 515, 326, 522],
        [13, 3, 61, 85, 92, 97, 92, 5, 6, 7, 1],
    ),
    "Ein Hündchen, 狗!": (
        [521, 68, 516, 71, 127, 120, 77, 67, 66, 71, 68, 333, 267, 163, 233, 501, 256, 522],
        [521, 68, 516, 71, 127, 120, 77, 67, 66, 71, 68, 333, 267, 163, 233, 501, 0, 522],
        [3, 50, 86, 91, 3, 53, 2, 91, 81, 80, 85, 82, 91, 25, 3, 2, 14, 1],
    ),
}


def test_tokens(checkpoints):
    """The same in every version of transformers: losses of one can be held against another's."""
    pipeline = load(checkpoints())
    tokenizers = pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3
    for number, (tokenizer, pad, length) in enumerate(zip(tokenizers, (522, 0, 0), (77, 77, 512), strict=True)):
        assert tokenizer.model_max_length == length
        for text, ids in IDS.items():
            padded = tokenizer(text, padding="max_length", max_length=60, truncation=True).input_ids
            assert padded == ids[number] + [pad] * (60 - len(ids[number]))
    assert pipeline.tokenizer.decode(IDS["a Photo of sks dog"][0][1:-1]) == "a photo of sks dog"


def test_pictures_differ(tmp_path):
    paths = tiny_sd3.images(tmp_path / "pictures", 3, size=(48, 40))
    pixels = [np.asarray(Image.open(path)) for path in paths]
    assert [array.shape for array in pixels] == [(40, 48, 3)] * 3
    assert paths == sorted((tmp_path / "pictures").iterdir())
    assert not np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[1], pixels[2])


def test_unknown_width(tmp_path):
    with pytest.raises(TypeError, match="clip3_width"):
        tiny_sd3.build(tmp_path, clip3_width=8)
