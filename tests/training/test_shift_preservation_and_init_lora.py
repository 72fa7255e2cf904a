"""Ways to fine-tune SD3 known from other programs: shift, output preservation, and starting from another LoRA."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import isolated
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from ranks import watch_updates
from safetensors.torch import load_file, save_file

KEPT = {"output_preservation_weight": 1.0, "class_prompt": "a photo of a dog"}
WEIGHTS = "pytorch_lora_weights.safetensors"


def refusal(script, arguments, capsys):
    with isolated(), pytest.raises(SystemExit) as refused:
        script.main(script.parse_args(arguments))
    assert refused.value.code == 2
    return capsys.readouterr().err


# ---- Noise levels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "mean", "above"),
    [
        pytest.param({}, 0.715, 0.14, id="as it was"),
        pytest.param({"training_shift": 1}, 0.501, 0.01, id="shift 1"),
        pytest.param({"training_shift": 1, "weighting_scheme": "none"}, 0.501, 0.10, id="uniform, shift 1"),
        pytest.param({"weighting_scheme": "none"}, 0.676, 0.25, id="uniform"),
    ],
)
def test_noise_levels_have_the_mean_and_the_share_above_nine_tenths(script, argv, flags, mean, above):
    """By the tables that training reads, over 100,000 draws."""
    args = script.parse_args(argv(**flags))
    with isolated():
        accelerator = script.start_accelerator(args)
        scheduler = script.load_scheduler(args, script.read_pipeline(args), accelerator)
    density = {"logit_mean": args.logit_mean, "logit_std": args.logit_std, "mode_scale": args.mode_scale}
    generator = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(args.weighting_scheme, 100_000, generator=generator, **density)
    sigma = scheduler.sigmas[(u * 1000).long().clamp(max=999)]
    assert sigma.mean().item() == pytest.approx(mean, abs=0.004)
    assert (sigma > 0.9).float().mean().item() == pytest.approx(above, abs=0.012)
    assert scheduler.config.shift == 3  # which images are drawn with


def test_uniform_times_weigh_every_image_alike(script, argv):
    args = script.parse_args(argv(weighting_scheme="none", precondition_outputs=0))
    with isolated():
        accelerator = script.start_accelerator(args)
        scheduler = script.load_scheduler(args, script.read_pipeline(args), accelerator)
    latents, noise = torch.zeros(2, 16, 4, 4), torch.ones(2, 16, 4, 4)

    def still(latents, *others, **options):
        return (torch.zeros_like(latents),)

    drawn = latents, noise, torch.tensor([0.1, 0.9]), None
    losses, _ = script.flow_losses(args, still, scheduler, drawn, (None, None))
    assert losses.tolist() == [1.0, 1.0]


# ---- Validation -----------------------------------------------------------------------------------------------------


def test_validation_is_drawn_with_the_steps_and_the_guidance_asked_for(script, run, monkeypatch):
    seen, draw = [], StableDiffusion3Pipeline.__call__

    def watched(self, *inputs, **options):
        seen.append({name: options.get(name) for name in ("num_inference_steps", "guidance_scale")})
        return draw(self, *inputs, **options | {"num_inference_steps": 2})

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", watched)
    flags = {"validation_prompt": "a dog", "num_validation_images": 1}
    run(script, **flags, validation_num_inference_steps=4, validation_guidance_scale=0)
    assert seen == [{"num_inference_steps": 4, "guidance_scale": 0.0}] * len(seen)


@pytest.mark.usefixtures("few_steps")
def test_the_final_images_can_be_left_out(script, run):
    flags = {"validation_prompt": "a dog", "num_validation_images": 1, "validation_epochs": 1, "max_train_steps": 3}
    folder = run(script, **flags, skip_final_inference=True)
    assert not list(folder.glob("image_*.png"))
    assert list(folder.glob("validation/step-000002-0.png"))


# ---- Preservation ---------------------------------------------------------------------------------------------------


def test_what_preservation_adds_is_logged_apart(lora, run):
    """So that its weight can be chosen: the loss is the images' and, weighed, that of the class prompt."""
    with watch_updates(lora) as updates:
        run(lora, **KEPT | {"output_preservation_weight": 3.0}, learning_rate=1e-2, max_train_steps=3)
    assert updates[0]["preservation_loss"] == 0 < updates[2]["preservation_loss"]
    for update in updates:
        assert update["loss"] == pytest.approx(update["instance_loss"] + 3 * update["preservation_loss"], rel=1e-6)


def test_preservation_starts_from_nothing_to_preserve(lora, run, tmp_path):
    """New adapters change nothing: the first loss is that of a run without, bit for bit."""
    losses = []
    for number, flags in enumerate(({}, KEPT)):
        with watch_updates(lora) as updates:
            run(lora, **flags, learning_rate=1e-2, train_batch_size=3, output_dir=tmp_path / str(number))
        losses.append([update["loss"] for update in updates])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_checkpointing": True, "train_batch_size": 3}, id="checkpointing"),
        pytest.param({"train_text_encoder": True, "text_encoder_lr": 1e-2}, id="encoders"),
        pytest.param({"mixed_precision": "bf16"}, id="bfloat16"),
    ],
)
def test_its_target_is_the_base_models_prediction_bit_for_bit(lora, run, monkeypatch, tmp_path, flags):
    """Also once the adapters have learned: the target of the last update is what a fresh run's first one sees."""
    targets, whole = [], lora.flow_losses

    def watched(args, transformer, scheduler, drawn, text, target=None):
        if target is not None:
            targets.append((*drawn[:3], target))
        return whole(args, transformer, scheduler, drawn, text, target)

    monkeypatch.setattr(lora, "flow_losses", watched)
    run(lora, **KEPT, **flags, learning_rate=1e-2, max_train_steps=4, output_dir=tmp_path / "learned")
    learned, targets[:] = list(targets), []
    run(lora, **KEPT, **flags, learning_rate=0.0, max_train_steps=4, output_dir=tmp_path / "still")
    for (latents, noise, u, target), (latents2, noise2, u2, still) in zip(learned, targets, strict=True):
        assert torch.equal(latents, latents2)
        assert torch.equal(noise, noise2)
        assert torch.equal(u, u2)
        assert torch.equal(target, still)


def test_preservation_keeps_what_the_class_prompt_draws(lora, run, tmp_path):
    """The distance to the base model on the class prompt, in weights' effect: smaller with it than without."""
    distance, whole = {}, lora.flow_losses

    for name, weight in (("without", 1e-12), ("with", 10.0)):
        preserved = []

        def watched(args, transformer, scheduler, drawn, text, target=None, preserved=preserved):
            losses, prediction = whole(args, transformer, scheduler, drawn, text, target)
            if target is not None:
                preserved.append(losses.mean().item())
            return losses, prediction

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora, "flow_losses", watched)
            flags = KEPT | {"output_preservation_weight": weight, "learning_rate": 1e-2, "max_train_steps": 12}
            run(lora, **flags, output_dir=tmp_path / name)
        distance[name] = sum(preserved[-4:])
    assert distance["with"] < 0.5 * distance["without"]


def test_a_run_with_preservation_resumes_exactly(lora, run, tmp_path):
    flags = KEPT | {"max_train_steps": 4, "checkpointing_steps": 2, "train_text_encoder": True}
    whole = run(lora, **flags)
    folder = shutil.copytree(whole / "checkpoint-2", tmp_path / "again" / "checkpoint-2").parent
    resumed = run(lora, **flags, output_dir=folder, resume_from_checkpoint="latest")
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()


def test_two_processes_preserve_as_one_does(lora, run, in_two_processes, argv, tmp_path):
    flags = KEPT | {"learning_rate": 1e-3, "max_train_steps": 3}
    one = run(lora, **flags, train_batch_size=2, output_dir=tmp_path / "one")
    two = {"script": "lora", "argv": argv(**flags, output_dir=tmp_path / "two"), "record": str(tmp_path / "record")}
    in_two_processes([two])
    one, two = load_file(one / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize("flags", [{"class_prompt": None}, {"with_prior_preservation": True, "class_data_dir": "c"}])
def test_preservation_needs_a_prompt_and_no_class_images(lora, argv, capsys, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    assert "--output_preservation_weight needs --class_prompt" in refusal(lora, argv(**KEPT | flags), capsys)


# ---- A start from another LoRA --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(lora, checkpoints, pictures, tmp_path_factory):
    """Adapters of another run, with a scale of 2 in them."""
    folder = tmp_path_factory.mktemp("other")
    arguments = ["--pretrained_model_name_or_path", checkpoints(), "--instance_data_dir", pictures()]
    arguments += ["--instance_prompt", "a dog", "--resolution", 32, "--max_train_steps", 2, "--lr_warmup_steps", 0]
    arguments += ["--learning_rate", 1e-2, "--lora_alpha", 8, "--seed", 1, "--report_to", "none"]
    arguments += ["--checkpointing_steps", 2]
    with isolated():
        lora.main(lora.parse_args([*map(str, arguments), "--output_dir", str(folder)]))
    return folder


@pytest.mark.parametrize("alpha", [None, 4, 16])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_run_that_learns_nothing_gives_the_adapters_back(lora, run, other, alpha, as_file):
    path = other / WEIGHTS if as_file else other
    folder = run(lora, init_lora=path, learning_rate=0.0, lora_alpha=alpha)
    given, saved = load_file(other / WEIGHTS), load_file(folder / WEIGHTS)
    assert given.keys() == saved.keys()
    assert all(torch.equal(given[name], saved[name]) for name in given)


def test_what_is_saved_is_one_whole_adapter(lora, run, other):
    saved = load_file(run(lora, init_lora=other, learning_rate=1e-5) / WEIGHTS)
    given = load_file(other / WEIGHTS)
    near = [torch.allclose(given[name], saved[name], atol=1e-3) for name in given]
    assert all(near)
    assert any(not torch.equal(given[name], saved[name]) for name in given)


def with_header(lora, source, target):
    """A copy of adapters as diffusers' own scripts write them: the raw weights, and their scale of 2 in the header."""
    weights = {key: weight / 2 if "lora_B" in key else weight for key, weight in load_file(source / WEIGHTS).items()}
    fields = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": False}
    target.mkdir()
    save_file(weights, target / WEIGHTS, {"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
    return target


@pytest.mark.parametrize("alpha", [None, 16])
@pytest.mark.parametrize("source", ["header", "checkpoint", "checkpoint's file"])
def test_adapters_start_at_the_strength_that_they_had(lora, run, other, tmp_path, source, alpha):
    """That a header names, or that the run of a checkpoint had; and not at this run's."""
    path = with_header(lora, other, tmp_path / "header") if source == "header" else other / "checkpoint-2"
    path = path / WEIGHTS if "file" in source else path
    folder = run(lora, init_lora=path, learning_rate=0.0, lora_alpha=alpha)
    given, saved = load_file(other / WEIGHTS), load_file(folder / WEIGHTS)
    assert all(torch.equal(given[name], saved[name]) for name in given)


def test_a_file_that_is_not_there_is_named_in_one_plain_line(lora, argv, capsys, tmp_path):
    for path in (tmp_path / "nothing", tmp_path / "nothing/lora.safetensors"):
        message = refusal(lora, argv(init_lora=path), capsys)
        assert f"the adapters of the transformer in {str(path)!r} cannot be used by this run (FileNotFound" in message
        assert "offline" not in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"rank": 8}, "the shape in current model is torch.Size([16, 8])"),
        ({"lora_blocks": "0"}, "tensors differ, such as"),
        ({"lora_layers": "attn.to_q"}, "tensors differ, such as"),
    ],
    ids=str,
)
def test_other_adapters_are_refused_before_anything_is_encoded(lora, argv, other, capsys, flags, said):
    message = refusal(lora, argv(**{"init_lora": other} | flags), capsys)
    assert "Encoding" not in message
    assert f"the adapters of the transformer in {str(other)!r} cannot be used by this run (" in message
    assert said in message


def test_text_encoders_it_lacks_are_refused_before_anything_is_encoded(lora, argv, other, capsys):
    message = refusal(lora, argv(init_lora=other, train_text_encoder=True), capsys)
    assert "Encoding" not in message
    assert f"the adapters of the text_encoder in {str(other)!r} cannot be used by this run (ValueError: " in message
    assert "differ, such as" in message


def test_text_encoders_that_are_not_trained_are_said_once(lora, run, caplog, tmp_path):
    trained = run(lora, train_text_encoder=True, max_train_steps=1, output_dir=tmp_path / "trained")
    run(lora, init_lora=trained, max_train_steps=1)
    for name in ("text_encoder", "text_encoder_2"):
        assert caplog.text.count(f"{trained / WEIGHTS}: its adapters of the {name} are not used") == 1


def test_a_resumed_run_needs_the_source_no_more(lora, run, other, tmp_path):
    source = shutil.copytree(other, tmp_path / "source")
    flags = {"init_lora": source, "checkpointing_steps": 1}
    run(lora, **flags, max_train_steps=1)
    shutil.rmtree(source)
    with watch_updates(lora) as updates:
        run(lora, **flags, max_train_steps=2, resume_from_checkpoint="latest")
    assert [update["step"] for update in updates] == [2]


def test_a_resumed_run_takes_the_checkpoints_adapters(lora, run, other, tmp_path):
    flags = {"init_lora": other, "max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2}
    whole = run(lora, **flags)
    folder = Path(shutil.copytree(whole / "checkpoint-2", tmp_path / "again" / "checkpoint-2")).parent
    resumed = run(lora, **flags, output_dir=folder, resume_from_checkpoint="latest")
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()
