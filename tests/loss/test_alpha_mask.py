"""--alpha_mask: transparent parts are not learned, however the image is cropped, mirrored or cached."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import in_turn, isolated
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from ranks import read_files, watch_updates
from test_maths import batch_of, images, stand_in  # noqa: F401  images is a fixture

IN_TURN = True  # one script for each test, see conftest.py

PROMPTS = {"instance_prompt": "a photo of sks dog", "class_prompt": "a dog"}
PRIOR = {"with_prior_preservation": True, "num_class_images": 2, **PROMPTS}


@pytest.fixture
def cut_outs(tmp_path):
    """A folder of black images, each transparent in another half, (width, height) by name; a last one has no alpha."""
    folder = tmp_path / "cut-outs"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (64, 64), (96, 64)]):
        alpha = np.full(size[::-1], 255, np.uint8)
        alpha[: size[1] // 2] = 0
        image = Image.new("RGBA", size, "black")
        image.putalpha(Image.fromarray(np.rot90(alpha, 2 * number).copy()))
        image.save(folder / f"{number}.png")
    Image.new("RGB", (64, 64), "navy").save(folder / "whole.png")
    return folder


@pytest.fixture
def masks(monkeypatch):
    """Has a script's losses note the masks that they are given."""

    def masks(script):
        seen, flow_losses = [], script.flow_losses

        def watched(*inputs, **options):
            seen.append(inputs[3][3])
            return flow_losses(*inputs, **options)

        monkeypatch.setattr(script, "flow_losses", watched)
        return seen

    return masks


def test_the_loss_is_the_mean_over_what_the_mask_leaves(script, images):  # noqa: F811
    args = SimpleNamespace(weighting_scheme="none", precondition_outputs=0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    mask = torch.rand(6, 1, 4, 6, generator=torch.Generator().manual_seed(3)).round()
    mask[1], mask[2] = 1, 0
    errors = torch.stack(
        [
            script.flow_losses(args, stand_in, scheduler, *batch_of(images, one))[0]
            for one in torch.eye(24).view(24, 1, 1, 4, 6).expand(-1, 6, -1, -1, -1)
        ],
        dim=1,
    )  # of each place alone, (6, 24)
    kept = mask.flatten(1)
    losses, _ = script.flow_losses(args, stand_in, scheduler, *batch_of(images, mask))
    torch.testing.assert_close(losses, (errors * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1))
    whole, _ = script.flow_losses(args, stand_in, scheduler, *batch_of(images))
    torch.testing.assert_close(losses[1], whole[1])
    assert losses[2] == 0, "an image that is transparent as a whole teaches nothing"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_the_mask_is_scaled_cropped_and_mirrored_with_the_image(script, tmp_path, mode):
    """Black under an alpha, on white, is as bright as it is transparent, in each crop."""
    alpha = np.zeros((90, 120), np.uint8)
    alpha[20:60, 30:50] = 255
    image = Image.new("RGBA", (120, 90), "black")
    image.putalpha(Image.fromarray(alpha))
    path = tmp_path / "image.png"
    image.convert(mode).save(path)
    for seed in range(8):
        whole = script.open_image(path, 64, 0, True)
        crop = script.crop_image(whole, (48, 48), torch.Generator().manual_seed(seed), False, True)
        assert crop.shape == (4, 48, 48)
        torch.testing.assert_close(crop[0], 255 - crop[3], atol=2, rtol=0)
        assert crop[3].max() == 255


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "I;16"])
def test_an_image_without_transparency_counts_whole(script, tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (40, 40), 99).save(path)
    image = script.open_image(path, 32, 0, True)
    assert image.mode == "RGBA"
    assert image.getchannel("A").getextrema() == (255, 255)
    assert image.convert("RGB").tobytes() == script.open_image(path, 32, 0).tobytes()


def test_the_mask_of_the_latents_is_the_share_of_each_cell(script, checkpoints):
    vae = AutoencoderKL.from_pretrained(checkpoints(), subfolder="vae")
    pixels = torch.randint(256, (2, 4, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with isolated():
        moments, plain = script.encode_moments(vae, pixels), script.encode_moments(vae, pixels[:, :3])
    side = 32 // plain.shape[2]
    expected = torch.nn.functional.avg_pool2d(pixels[:, 3:] / 255, side)
    assert torch.equal(moments[:, :-1], plain)
    torch.testing.assert_close(moments[:, -1:], expected)


CASES = {
    "plain": {},
    "batch 3": {"train_batch_size": 3},
    "cached": {"cache_latents": True},
    "buckets": {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "32,32;32,48", "random_flip": True},
    "prior": PRIOR,
    "cached prior": PRIOR | {"cache_latents": True},
    "encoders": {"train_text_encoder": True, "gradient_checkpointing": True},
    "held out": {"validation_epochs": 1},
}


@pytest.mark.parametrize(("kind", "case"), in_turn([(case,) for case in CASES]))
def test_images_without_transparency_train_as_without_the_flag(script, run, pictures, tmp_path, case):
    """To the last byte."""
    flags = {"max_train_steps": 3, "instance_data_dir": pictures(3), **CASES[case]}
    flags |= {"class_data_dir": pictures(2, seed=5)} if "prior" in case else {}
    flags |= {"validation_data_dir": pictures(2, seed=6)} if case == "held out" else {}
    found = []
    for name, mask in (("with", True), ("without", None)):
        with watch_updates(script) as updates:
            folder = run(script, **flags, alpha_mask=mask, output_dir=tmp_path / name)
        found.append((list(updates), read_files(folder)))
    assert found[0] == found[1]


@pytest.mark.parametrize(("kind", "case"), in_turn([(case,) for case in CASES if case != "encoders"]))
def test_every_loss_knows_the_mask(script, run, masks, cut_outs, pictures, case):
    """Half of each cut-out, all of an image without transparency, of class images too."""
    seen, flags = (
        masks(script),
        {"max_train_steps": 4, "instance_data_dir": cut_outs, "alpha_mask": True, **CASES[case]},
    )
    flags |= {"class_data_dir": pictures(2)} if "prior" in case else {}
    flags |= {"validation_data_dir": cut_outs} if case == "held out" else {}
    run(script, **flags)
    shares = torch.cat([mask.mean(dim=(1, 2, 3)) for mask in seen])
    assert all(mask.shape[1] == 1 for mask in seen)
    assert set(shares.round(decimals=2).tolist()) == {0.5, 1.0}


def test_images_of_a_dataset_have_their_masks(script, run, masks, cut_outs):
    rows = [f'{{"file_name": "{path.name}", "text": "a dog"}}' for path in sorted(cut_outs.glob("*.png"))]
    Path(cut_outs, "metadata.jsonl").write_text("\n".join(rows))
    seen = masks(script)
    run(script, dataset_name=cut_outs, caption_column="text", max_train_steps=4, alpha_mask=True)
    assert {round(mask.mean().item(), 2) for mask in seen} == {0.5, 1.0}


def test_a_run_with_masks_resumes_exactly(script, run, cut_outs, tmp_path):
    flags = {"instance_data_dir": cut_outs, "alpha_mask": True, "max_train_steps": 4, "checkpointing_steps": 2}
    whole = run(script, **flags)
    part = run(script, **flags, output_dir=tmp_path / "part", resume_from_checkpoint=whole / "checkpoint-2")
    assert read_files(whole) == read_files(part)
