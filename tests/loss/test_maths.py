"""The mathematics of both scripts against computations that share no code with them."""

import itertools
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SCRIPTS
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

IN_TURN = True  # one script for each test, see conftest.py

PROMPTS = ["a photo of sks dog", "", "the yarn dog in a bucket, " * 30]
SCHEMES = ["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"]


# Text: StableDiffusion3Pipeline.encode_prompt is the reference.


def reference_embeds(checkpoint, prompts, length):
    """What the pipeline itself gives for prompts: (B, S, D) and (B, P)."""
    absent = {} if (checkpoint / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoint, **absent)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return pipeline, embeds, pooled


@pytest.mark.parametrize(
    ("trained", "length"),
    [((), 77), ((), 512), (("text_encoder", "text_encoder_2"), 154), ("all", 154)],
    ids=["frozen", "frozen, long", "CLIPs", "all"],
)
@pytest.mark.parametrize("t5", [True, False], ids=["T5", "no T5"])
def test_prompt_table_equals_the_pipeline(script, checkpoints, argv, t5, trained, length):
    """Looked up, called, or some of each, in any order and with repeats."""
    checkpoint = checkpoints(t5=t5)
    batch = [PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[1]]
    pipeline, embeds, pooled = reference_embeds(checkpoint, batch, length)
    args = script.parse_args(argv(pretrained_model_name_or_path=checkpoint, max_sequence_length=length))
    parts = script.read_pipeline(args)
    names = [name for name in script.TEXT_ENCODERS if name in parts] if trained == "all" else trained
    accelerator = Accelerator(cpu=True)
    table = script.PromptTable(args, parts, accelerator, PROMPTS)
    table.fill(parts, accelerator, torch.float32, names)
    table.trained = {name: getattr(pipeline, name) for name in names}
    with torch.no_grad():
        ours, ours_pooled = table(batch)
    torch.testing.assert_close(ours, embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_pooled, pooled, rtol=1e-5, atol=1e-5)
    frozen = [name for name in script.TEXT_ENCODERS if name in parts and name not in names]
    assert list(table.frozen) == frozen
    for encoded in table.frozen.values():
        assert list(encoded) == PROMPTS, "each prompt once"


# Loss: the formulas of the SD3 paper (arXiv 2403.03206, sections 2 and 3.1) in float64, an image at a time.


def paper_level(u):
    """Timestep and sigma of a density u: 1000 levels from noisy to clean, shifted by 3 as in section 5.3.2."""
    index = min(int(u * 1000), 999)
    t = (1000 - index) / 1000
    sigma = 3 * t / (1 + 2 * t)
    return 1000 * sigma, sigma


def paper_weight(scheme, sigma):
    if scheme == "sigma_sqrt":
        return 1 / sigma**2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return 1.0


def paper_loss(scheme, precondition, image):
    """Loss of one image in float64: `image` has latents, noise, u, embeds, pooled."""
    latents, noise, embeds, pooled = (
        image[name].double().numpy() for name in ("latents", "noise", "embeds", "pooled")
    )
    timestep, sigma = paper_level(image["u"].item())
    noisy = (1 - sigma) * latents + sigma * noise
    velocity = np.tanh(0.7 * noisy + timestep / 500 + embeds.mean()) + pooled.mean()
    error = (noisy - sigma * velocity - latents) if precondition else (velocity - (noise - latents))
    return paper_weight(scheme, sigma) * np.mean(error**2)


def stand_in(hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict):
    """A transformer that depends on all its inputs and can be written down twice."""
    time, text = timestep.view(-1, 1, 1, 1) / 500, encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    return (torch.tanh(0.7 * hidden_states + time + text) + pooled_projections.mean(dim=1).view(-1, 1, 1, 1),)


@pytest.fixture(scope="module")
def scheduler():
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(scope="module")
def images():
    """Six images' worth of inputs; u has both ends of the range, 1 too, which the mode density reaches."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (16, 4, 6), "noise": (16, 4, 6), "embeds": (9, 20), "pooled": (10,)}
    inputs = {name: torch.randn(6, *shape, generator=generator) for name, shape in shapes.items()}
    return inputs | {"u": torch.tensor([0.0, 0.2, 0.5, 0.7705, 0.9996, 1.0])}


def batch_of(images, mask=None):
    """What was drawn and the text, as flow_losses takes them."""
    return (images["latents"], images["noise"], images["u"], mask), (images["embeds"], images["pooled"])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("precondition", [0, 1])
@pytest.mark.parametrize("prior", [None, 0.0, 0.3])
def test_loss_equals_the_paper(script, scheduler, images, scheme, precondition, prior):
    args = SimpleNamespace(weighting_scheme=scheme, precondition_outputs=precondition)
    args.with_prior_preservation, args.prior_loss_weight = prior is not None, prior
    args.output_preservation_weight = 0.0
    inputs = batch_of(images)
    losses, prediction = script.flow_losses(args, stand_in, scheduler, *inputs)
    expected = [paper_loss(scheme, precondition, {k: v[i] for k, v in images.items()}) for i in range(6)]
    assert losses.shape == (6,) and losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), expected, rtol=2e-4)
    again, _ = script.flow_losses(args, stand_in, scheduler, *inputs, target=prediction)
    assert torch.equal(again, torch.zeros(6))

    minimised = np.mean(expected) if prior is None else np.mean(expected[:3]) + prior * np.mean(expected[3:])
    np.testing.assert_allclose(script.mean_losses(args, losses)["loss"].item(), minimised, rtol=2e-4)


def test_loss_of_a_half_precision_transformer_is_float32(script, scheduler, images):
    args = SimpleNamespace(weighting_scheme="sigma_sqrt", precondition_outputs=0)

    def half(*inputs, **options):
        return (stand_in(*inputs, **options)[0].half(),)

    inputs = batch_of(images)
    losses, _ = script.flow_losses(args, half, scheduler, *inputs)
    exact, _ = script.flow_losses(args, stand_in, scheduler, *inputs)
    assert losses.dtype == torch.float32
    assert exact.max() > 65504, "the weight of the lowest sigma overflows float16"
    torch.testing.assert_close(losses, exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", SCRIPTS)  # batch_losses differs
@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_backward_gets_the_weighted_sum(script, run, pictures, monkeypatch, prior, accumulation):
    """loss = mean over instance images + prior_loss_weight * mean over class images, one number a batch."""
    vectors, totals, points = [], [], []
    flow_losses, backward, log_update = script.flow_losses, Accelerator.backward, script.log_update

    def keep_losses(*inputs):
        losses, prediction = flow_losses(*inputs)
        vectors.append(losses)
        return losses, prediction

    def keep_total(self, loss, **kwargs):
        totals.append(loss.item())
        return backward(self, loss, **kwargs)

    def keep_figures(*rest):
        points.append(dict(rest[-2]))
        return log_update(*rest)

    monkeypatch.setattr(script, "flow_losses", keep_losses)
    monkeypatch.setattr(Accelerator, "backward", keep_total)
    monkeypatch.setattr(script, "log_update", keep_figures)
    flags = {"instance_data_dir": pictures(5)}
    if prior:
        flags |= {"with_prior_preservation": True, "prior_loss_weight": 0.3, "num_class_images": 4}
        flags |= {"class_data_dir": pictures(4, seed=9), "class_prompt": "a photo of a dog"}
    run(script, train_batch_size=2, gradient_accumulation_steps=accumulation, max_train_steps=2, **flags)

    rows = [vector.detach().double().numpy() for vector in vectors]
    halves = [np.split(row, 2) if prior else (row, np.zeros(1)) for row in rows]
    instance, klass = ([half[i].mean() for half in halves] for i in range(2))
    expected = np.add(instance, 0.3 * np.array(klass))
    assert [len(half[0]) for half in halves] == [2] * 2 * accumulation
    np.testing.assert_allclose(totals, expected, rtol=1e-5)
    assert len(points) == 2
    for point, first in zip(points, range(0, len(rows), accumulation), strict=True):
        here = slice(first, first + accumulation)
        assert point["loss"] == pytest.approx(np.mean(expected[here]), rel=1e-5)
        assert point["grad_norm"] > 0
        assert ("prior_loss" in point) == ("instance_loss" in point) == prior
        if prior:
            assert point["instance_loss"] == pytest.approx(np.mean(instance[here]), rel=1e-5)
            assert point["prior_loss"] == pytest.approx(np.mean(klass[here]), rel=1e-5)


# Draws.


DENSITIES = {
    "logit_normal": lambda args, g: torch.sigmoid(args.logit_mean + args.logit_std * torch.randn(1, generator=g)),
    "mode": lambda args, g: mode_density(args.mode_scale, torch.rand(1, generator=g)),
    "sigma_sqrt": lambda args, g: torch.rand(1, generator=g),
    "cosmap": lambda args, g: torch.rand(1, generator=g),
    "none": lambda args, g: torch.rand(1, generator=g),
}


def mode_density(scale, v):
    return 1 - v - scale * (torch.cos(math.pi / 2 * v) ** 2 - 1 + v)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_density_draws(script, scheme):
    """Formulas of the paper, section 3.1, on what an image's generator draws after its latent and noise."""
    args = SimpleNamespace(weighting_scheme=scheme, logit_mean=-0.4, logit_std=0.7, mode_scale=0.8)
    config, seeds = SimpleNamespace(shift_factor=0.0, scaling_factor=1.0, latent_channels=3), range(50)
    *_, u, _ = script.draw_latents(args, config, torch.ones(50, 6, 2, 2), seeds, torch.device("cpu"))
    expected = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        torch.randn(2, 3, 2, 2, generator=generator)
        expected.append(DENSITIES[scheme](args, generator))
    torch.testing.assert_close(u, torch.cat(expected), rtol=0, atol=1e-6)


def moments_of(count):
    generator = torch.Generator().manual_seed(2)
    mean, deviation = (torch.randn(count, 16, 4, 4, generator=generator) for _ in range(2))
    return torch.cat([mean, deviation.abs()], dim=1)


def draws(script, moments, seeds):
    args = SimpleNamespace(weighting_scheme="logit_normal", logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    config = SimpleNamespace(shift_factor=0.5, scaling_factor=2.0, latent_channels=16)
    return script.draw_latents(args, config, moments, seeds, torch.device("cpu"))[:3]


def test_draws_belong_to_the_image_not_to_the_batch(script):
    moments, seeds = moments_of(5), [11, 12, 13, 14, 15]
    together = draws(script, moments, seeds)
    for order in ([0], [3, 1], [4, 3, 2, 1, 0]):
        apart = draws(script, moments[order], [seeds[i] for i in order])
        for one, other in zip(apart, together, strict=True):
            assert torch.equal(one, other[order])
    for tensor in together:
        for i, j in itertools.combinations(range(5), 2):
            assert not torch.equal(tensor[i], tensor[j])


def test_latents_are_samples_of_the_posterior(script):
    """mean + deviation * N(0, 1), shifted and scaled; the noise that is mixed in is another draw."""
    count = 400
    mean, deviation = moments_of(1).repeat(count, 1, 1, 1).chunk(2, dim=1)
    latents, noise, _ = draws(script, torch.cat([mean, deviation], dim=1), range(count))
    sample = (latents / 2.0 + 0.5 - mean) / deviation
    for normal in (sample, noise):
        assert normal.mean() == pytest.approx(0, abs=0.01) and normal.std() == pytest.approx(1, abs=0.01)
    assert (sample * noise).mean() == pytest.approx(0, abs=0.01)


def test_seeds_differ_by_kind_epoch_index_and_copy(script, pictures, argv, monkeypatch):
    monkeypatch.setattr(script, "log", logging.getLogger("data"))
    args = script.parse_args(argv(seed=3, repeats=2, random_flip=True))
    datasets = [script.read_instances(args) for _ in range(2)]
    for dataset in datasets:
        images = script.list_images(pictures())
        dataset.add_images("class", "--class_data_dir", images, ["dog"] * len(images))
    dataset, again = datasets
    places = list(itertools.product(range(3), range(len(dataset)), range(3)))
    examples = [example for place in places for example in dataset[place]]
    assert len({seed for _, _, seed in examples}) == 2 * len(places)
    for (data, _, seed), (same, _, again_seed) in zip(dataset[1, 2, 0], again[1, 2, 0], strict=True):
        assert seed == again_seed and torch.equal(data, same)
    for other in (dataset[2, 2, 0], dataset[1, 2, 1]):
        assert not torch.equal(dataset[1, 2, 0][0][0], other[0][0])


# Learning rate.

WARMUP = 2
CURVES = [
    ("linear", 1),
    ("cosine", 2),
    ("cosine_with_restarts", 1),
    ("polynomial", 2),
    ("constant", 1),
    ("constant_with_warmup", 2),
]


def reference_rates(name, rate, updates):
    """Rates of each update of a single process, by diffusers' own function."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=WARMUP, num_training_steps=updates, num_cycles=2, power=2.0
    )
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates, schedule.get_last_lr()[0]


def test_a_run_may_end_with_its_warm_up(lora, run):
    """Polynomial divides by the number of updates that come after it."""
    out = run(lora, lr_scheduler="polynomial", lr_warmup_steps=2, max_train_steps=2)
    assert (out / lora.WEIGHTS).is_file()


@pytest.mark.parametrize(("name", "accumulation"), CURVES)
def test_rates_of_a_run(script, run, pictures, monkeypatch, name, accumulation):
    """Updates, not batches, are counted: five images make three batches of two, two updates of two batches."""
    rates, step = [], torch.optim.AdamW.step

    def keep_rate(self, *inputs, **kwargs):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *inputs, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", keep_rate)
    run(
        script,
        instance_data_dir=pictures(5),
        train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=3,
        max_train_steps=None,
        lr_scheduler=name,
        lr_warmup_steps=WARMUP,
        lr_num_cycles=2,
        lr_power=2.0,
        learning_rate=1e-3,
        text_encoder_lr=1e-4,
        train_text_encoder=name == "cosine",
    )
    updates = 3 * (3 if accumulation == 1 else 2)
    assert len(rates) == updates
    np.testing.assert_allclose([row[0] for row in rates], reference_rates(name, 1e-3, updates)[0], rtol=1e-6)
    if name == "cosine":
        np.testing.assert_allclose([row[1] for row in rates], reference_rates(name, 1e-4, updates)[0], rtol=1e-6)


@pytest.mark.slow
def test_rates_of_two_processes(argv, in_two_processes, pictures, tmp_path):
    """Each process has a batch of two of the five images at a time: two updates an epoch, as the schedule has to know.

    A log point has the rate that its update left behind.
    """
    flags = {"num_train_epochs": 3, "max_train_steps": None, "lr_scheduler": "linear", "lr_warmup_steps": WARMUP}
    flags |= {"instance_data_dir": pictures(5), "train_batch_size": 2, "checkpointing_steps": 6}
    flags |= {"learning_rate": 1e-3, "report_to": "tensorboard"}
    in_two_processes([{"script": "lora", "argv": argv(**flags), "record": str(tmp_path / "record")}])
    manifest = json.loads((tmp_path / "out" / "checkpoint-6" / "dreambooth.json").read_text())
    assert manifest["run"]["processes"] == 2
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "dreambooth-sd3-lora")).Reload()
    logged = events.Scalars("lr")
    rates, after = reference_rates("linear", 1e-3, 6)
    assert [point.step for point in logged] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([point.value for point in logged], [*rates[1:], after], rtol=1e-6, atol=1e-12)


# Images.


@pytest.mark.parametrize("size", [(100, 80), (80, 100), (64, 64), (24, 30), (301, 97), (64, 65)])
@pytest.mark.parametrize("center", [True, False], ids=["center", "random"])
def test_crop_equals_resize_then_crop(script, size, center):
    """The whole image is resized by torch, antialiased, and the drawn square is cut from it."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    target, scale = 64, 64 / min(size)
    width, height = int(size[0] * scale + 1e-9), int(size[1] * scale + 1e-9)
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    whole = torch.nn.functional.interpolate(whole, (height, width), mode="bilinear", antialias=True)[0]
    mirrored = []
    for seed in range(8):
        down, right, mirror = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
        top = round((height - target) / 2) if center else int(down * (height - target + 1))
        left = round((width - target) / 2) if center else int(right * (width - target + 1))
        square = whole[:, top : top + target, left : left + target]
        mirrored.append(mirror < 0.5)
        expected = square.flip(-1) if mirrored[-1] else square
        ours = script.crop_image(image, (target, target), torch.Generator().manual_seed(seed), center, flip=True)
        assert ours.shape == (3, target, target) and ours.dtype == torch.uint8
        assert (ours.float() - expected).abs().max() < 1.6, "pixels are rounded twice, after either direction"
        plain = script.crop_image(image, (target, target), torch.Generator().manual_seed(seed), center, flip=False)
        assert torch.equal(plain, ours.flip(-1) if mirrored[-1] else ours)
    assert {True, False} == set(mirrored)


def test_random_crops_reach_both_ends_and_half_are_mirrored(script):
    ramp = Image.fromarray(np.repeat(np.arange(80, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2))
    lefts, mirrored = set(), 0
    for seed in range(400):
        crop = script.crop_image(ramp, (64, 64), torch.Generator().manual_seed(seed), False, True)
        row = crop[0, 0].int().tolist()
        mirrored += row[0] > row[-1]
        lefts.add(min(row))
    assert lefts == set(range(17))
    assert 160 < mirrored < 240


def test_crop_ends_at_0_and_255(script):
    for colour, value in (("black", 0), ("white", 255)):
        image = Image.new("RGB", (40, 50), colour)
        crop = script.crop_image(image, (16, 16), torch.Generator(), False, False)
        assert torch.equal(crop, torch.full((3, 16, 16), value, dtype=torch.uint8))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_and_transparency_from_a_file(script, tmp_path, suffix):
    path = tmp_path / f"deep{suffix}"
    values = np.array([[0, 257 * 10], [257 * 128, 65535]], np.uint16)
    Image.fromarray(values).save(path)
    np.testing.assert_allclose(np.array(script.open_image(path, 2, 0))[..., 0], values / 257, atol=1)
    if suffix == ".png":
        Image.fromarray(values).save(path, transparency=257 * 10)
        expected = np.where(values == 257 * 10, 255, values / 257)
        np.testing.assert_allclose(np.array(script.open_image(path, 2, 0))[..., 0], expected, atol=1)


# Order.


class Items:
    """As much of a dataset as a sampler asks for: a length, and the size of each, one of `sizes`."""

    def __init__(self, length, sizes=1):
        self.length, self.sizes = length, sizes

    def __len__(self):
        return self.length

    def size(self, index):
        return 32, 32 + 16 * (index % self.sizes)


def batches_of(script, items, batch, processes, accumulation=1, epoch=0, done=0, seed=5):
    args = SimpleNamespace(seed=seed, train_batch_size=batch, gradient_accumulation_steps=accumulation)
    return script.order_epoch(args, items, processes, epoch, done)


def indices(batches):
    return [index for places in batches for _, index, copy in places if copy == 0]


SAMPLERS = list(itertools.product([1, 4, 7, 12], [1, 2, 3], [1, 2, 3]))


@pytest.mark.parametrize("kind", ["lora"])
@pytest.mark.parametrize("sizes", [1, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("length", "batch", "processes"), SAMPLERS)
def test_order_of_an_epoch(script, length, batch, processes, accumulation, sizes):
    """Every index once an epoch, in updates of one size; they are full, by copies of the last."""
    items = Items(length, sizes)
    kinds = [script, items, batch, processes, accumulation]
    update = processes * accumulation
    epochs = []
    for epoch in range(3):
        batches = batches_of(*kinds, epoch)
        assert len(batches) % update == 0
        assert {len(places) for places in batches} == {batch}
        assert {place[0] for places in batches for place in places} == {epoch}
        epochs.append(indices(batches))
        assert sorted(epochs[-1]) == list(range(length))
        all_places = [place for places in batches for place in places]
        assert len(set(all_places)) == len(all_places), "a copy is drawn anew"
        for first in range(0, len(batches), update):
            group = batches[first : first + update]
            assert len({items.size(index) for places in group for _, index, _ in places}) == 1
        for done in range(len(batches) // update + 1):
            assert batches_of(*kinds, epoch, done) == batches[done * update :]
    if length > 4 * min(sizes, 2):
        assert len({tuple(order) for order in epochs}) == 3, "each epoch has an order of its own"
        assert indices(batches_of(*kinds, seed=6)) != epochs[0]
    assert indices(batches_of(*kinds)) == epochs[0]


@pytest.mark.parametrize("sizes", [1, 3])
def test_updates_have_the_same_images_however_they_are_shared_out(script, sizes):
    """Twelve an update, of seventeen images."""
    shares = [(12, 1, 1), (6, 2, 1), (6, 1, 2), (2, 3, 2), (1, 4, 3), (3, 1, 4)]
    updates = []
    for batch, processes, accumulation in shares:
        places = [
            place for batch in batches_of(script, Items(17, sizes), batch, processes, accumulation) for place in batch
        ]
        updates.append([places[first : first + 12] for first in range(0, len(places), 12)])
    assert updates == updates[:1] * len(shares)
