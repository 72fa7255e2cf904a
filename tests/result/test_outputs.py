"""The result loads in diffusers and draws what the model in memory drew."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

pytestmark = pytest.mark.usefixtures("few_steps")  # the runs and diffusers' pipeline alike

SIZE, IMAGES, PROMPT, TEXT = 32, 2, "a photo of sks dog in a bucket", 154
CASES = {
    "transformer": {},
    "all": {"train_text_encoder": True, "text_encoder_lr": 1e-2},
    "SD3.5": {"checkpoint": {"sd35": True}},
    "no T5": {"checkpoint": {"t5": False}, "train_text_encoder": True, "text_encoder_lr": 1e-2},
}


def draw(pipeline):
    """Pixels (N, SIZE, SIZE, 3) of image i from seed 5 + i, as a user draws them."""
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            PROMPT,
            height=SIZE,
            width=SIZE,
            max_sequence_length=TEXT,
            generator=torch.Generator().manual_seed(5 + number),
        ).images[0]
        for number in range(IMAGES)
    ]
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def load(folder, **parts):
    """A pipeline of a folder; diffusers has to be told where there is no T5."""
    if not (folder / "text_encoder_3").is_dir():
        parts = {"text_encoder_3": None, "tokenizer_3": None} | parts
    return StableDiffusion3Pipeline.from_pretrained(folder, **parts)


def load_output(base, output, checkpoint, trained):
    """The pipeline of a run, from its output_dir or, of the base model, with the weights of one of its checkpoints."""
    if (output / "pytorch_lora_weights.safetensors").is_file():
        pipeline = load(base)
        pipeline.load_lora_weights(checkpoint or output)
        return pipeline
    if checkpoint is None:
        return load(output)
    whole = load(output)
    return load(base, **{name: type(getattr(whole, name)).from_pretrained(checkpoint / name) for name in trained})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_draw_what_the_model_in_memory_drew(script, run, checkpoints, case):
    flags = dict(case)
    base = checkpoints(**flags.pop("checkpoint", {}))
    output = run(
        script,
        pretrained_model_name_or_path=base,
        learning_rate=1e-2,
        max_train_steps=4,
        checkpointing_steps=4,
        validation_epochs=9,
        resolution=SIZE,
        max_sequence_length=TEXT,
        validation_prompt=PROMPT,
        num_validation_images=IMAGES,
        seed=5,
        **flags,
    )
    drawn = np.stack([np.asarray(Image.open(output / f"image_{i}.png"), dtype=np.int16) for i in range(IMAGES)])
    assert drawn.shape == (IMAGES, SIZE, SIZE, 3)
    assert np.abs(drawn[0] - drawn[1]).mean() > 1, "each image has a seed of its own"
    assert np.abs(draw(load(base)) - drawn).mean() > 1, "training changed the images"

    trained = ["transformer"]
    if "train_text_encoder" in case:
        trained += [name for name in script.TEXT_ENCODERS if (base / name).is_dir()]
    for checkpoint in (None, output / "checkpoint-4"):
        pipeline = load_output(base, output, checkpoint, trained)
        assert np.abs(draw(pipeline) - drawn).max() <= 1, checkpoint or output


@pytest.mark.parametrize("train_text_encoder", [False, True], ids=["transformer", "all"])
def test_a_checkpoint_is_the_result_of_a_shorter_run(script, run, tmp_path, train_text_encoder):
    """checkpoint-2 of a run of four updates holds the weights that a run of two ends with."""
    from safetensors.torch import load_file

    flags = {"train_text_encoder": train_text_encoder, "learning_rate": 1e-2}
    long = run(script, max_train_steps=4, checkpointing_steps=2, output_dir=tmp_path / "long", **flags)
    short = run(script, max_train_steps=2, output_dir=tmp_path / "short", **flags)
    names = ["pytorch_lora_weights.safetensors"]
    if not (short / names[0]).is_file():
        names = ["transformer/diffusion_pytorch_model.safetensors"]
        names += [f"{name}/model.safetensors" for name in script.TEXT_ENCODERS if train_text_encoder]
    for name in names:
        early, late, end = (load_file(path / name) for path in (long / "checkpoint-2", long / "checkpoint-4", short))
        assert early.keys() == end.keys()
        assert all(torch.equal(early[key], end[key]) for key in end)
        assert not all(torch.equal(late[key], end[key]) for key in end)


def test_upcast_before_saving_changes_the_file_not_the_adapters(lora, run, tmp_path):
    """The adapters of a bf16 run are stored in bf16, or with the flag in float32 as they were trained."""
    from safetensors.torch import load_file

    files = []
    for upcast in (False, True):
        flags = {"mixed_precision": "bf16", "upcast_before_saving": upcast, "checkpointing_steps": 1}
        output = run(lora, output_dir=tmp_path / str(upcast), **flags)
        files.append(load_file(output / lora.WEIGHTS))
        live = load_file(output / "checkpoint-2" / lora.WEIGHTS)
        assert {tensor.dtype for tensor in live.values()} == {torch.float32}
    half, whole = files
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert all(torch.equal(whole[key], live[key]) for key in live)
    assert all(torch.equal(whole[key].bfloat16(), half[key]) for key in half)


def test_a_finished_run_resumed_trains_no_further(script, run, pictures, monkeypatch):
    """Two updates end in the middle of an epoch of five."""
    flags = {"instance_data_dir": pictures(5), "max_train_steps": 2, "checkpointing_steps": 2}
    run(script, **flags)
    losses, flow_losses = [], script.flow_losses
    monkeypatch.setattr(script, "flow_losses", lambda *inputs: losses.append(0) or flow_losses(*inputs))
    run(script, **flags, resume_from_checkpoint="latest")
    assert losses == []
