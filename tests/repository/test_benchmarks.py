"""What the benchmarks count."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, in_child
from diffusers import SD3Transformer2DModel

sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import TOKENS, count_operations
from real_size import measure, pace

BATCH, SIDE, WIDTH = 3, 8, 64  # images, latent's height and width, transformer's


def forward_operations(model):
    """Of a forward pass, by hand: two for each weight and each row that it meets; and those of joint attention."""
    total, joint = [], model.config

    def count(module, inputs, output):
        total.append(2 * output.numel() // output.shape[module.axis] * module.weight.numel())

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.axis = 1 if isinstance(module, torch.nn.Conv2d) else -1
            module.register_forward_hook(count)
    model(
        hidden_states=torch.zeros(BATCH, joint.in_channels, SIDE, SIDE),
        timestep=torch.zeros(BATCH),
        encoder_hidden_states=torch.zeros(BATCH, TOKENS, joint.joint_attention_dim),
        pooled_projections=torch.zeros(BATCH, joint.pooled_projection_dim),
    )
    return sum(total), len(model.transformer_blocks) * 4 * BATCH * (SIDE**2 // 4 + TOKENS) ** 2 * WIDTH


@pytest.mark.parametrize(("rank", "passes"), [(0, 3), (1, 2)], ids=["full", "LoRA"])
def test_operations_of_an_update(checkpoints, rank, passes):
    """Counted on shapes alone they are those of a real update: a forward pass, the like of it for the gradients of
    activations (twice that in attention) and, where all is trained, for those of weights."""
    model = SD3Transformer2DModel.from_pretrained(checkpoints(transformer_width=WIDTH), subfolder="transformer")
    counted = count_operations(model.config, 8 * SIDE, rank, BATCH)
    assert counted == count_operations(model.config, 8 * SIDE, rank, BATCH, device="cpu")
    weights, attention = forward_operations(model)
    assert 0.92 < counted / (passes * weights + 3 * attention) < 1.02  # less what leads to no trained weight


BARS = """
import sys, time
from tqdm import tqdm
time.sleep(0.2)
for _ in tqdm(range(2), desc="Caching latents"):
    block = bytearray(64 << 20)
del block
for _ in tqdm(range(3), desc="Training"):
    time.sleep(0.3)
"""


def test_stages_of_a_run():
    """Each progress bar begins a stage, whose peak is its own."""
    stages, updates = measure([sys.executable, "-c", BARS])
    wall, worked = pace(updates)
    start, caching, training, _ = stages
    assert [stage[0] for stage in stages] == ["start", "Caching latents", "Training", "Saving"]
    assert caching[3] > start[3] + (60 << 20) and training[3] < caching[3] - (30 << 20)
    assert list(updates) == [0, 1, 2, 3]
    assert 0.2 < wall < 3 and worked < wall  # it sleeps for 0.3 s; a line can be read a little late


def in_fits(work, *inputs):
    """Calls work(fits, ...) in a process of its own, because what fits.py imports and registers lasts."""

    def child():
        import fits

        work(fits, *inputs)

    assert in_child(child) == 0


def compare_bytes(fits):
    for way in ("LoRA 4", "all"):
        setting = "tiny", 64, 2, way, True
        fake, real = fits.count_training(*setting)[:4], fits.count_training(*setting, mode=contextlib.nullcontext)[:4]
        assert fake == real, (way, fake, real)


def test_bytes_of_fake_tensors_are_those_of_real_ones():
    in_fits(compare_bytes)


SIZE, WAY = "sd3.5-medium", "LoRA 4, all blocks in RAM"


def count_rows(fits, folder):
    """What fits.py writes down for three blocks, two of them with a second attention, and for one more of a kind."""
    blocks, heads, dual, *more = fits.SIZES[SIZE]["transformer"]
    assert (blocks, dual) == (24, 13)
    for name, *shape in (("three", 3, 2), ("dual", 4, 3), ("single", 4, 2)):
        fits.SIZES[SIZE]["transformer"] = (shape[0], heads, shape[1], *more)
        words = ["--sizes", SIZE, "--resolutions", "1024", "--batches", "1", "--ways", WAY]
        fits.main(fits.parse_args([*words, "--json", str(folder / name)]))


@pytest.mark.slow
def test_what_fits_on_a_card(tmp_path):
    """Five numbers of the table, GiB: LoRA of SD3.5 Medium at 1024 px with gradient checkpointing.

    Its 24 blocks take long to count. Each adds to a model of three blocks what one of its kind adds.
    """
    in_fits(count_rows, tmp_path)
    counted = []
    for name in ("three", "dual", "single"):
        _, need = json.loads(Path(tmp_path, name).read_text())
        counted.append([need[name] for name in ("text", "latents", "update", "drawing_offloaded", "work")])
    three, dual, single = map(np.array, counted)
    found = three + 11 * (dual - three) + 10 * (single - three)
    assert found == pytest.approx([8.88, 3.37, 0.97, 5.4, 38.0], rel=0.02)
