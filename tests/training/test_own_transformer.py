"""--pretrained_transformer_model_name_or_path: another transformer in the place of the base's."""

import json
import shutil

import comfyui
import pytest
import torch
from conftest import SCRIPTS
from safetensors.torch import load_file, save_file

IN_TURN = True  # one script for each test that asks for no other, see conftest.py
FLAG = "pretrained_transformer_model_name_or_path"
REFUSED = ["another width", "another model", "a layer is missing", "adapters", "damaged", "absent", "empty folder"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def bases(checkpoints, tmp_path_factory):
    """Two pipelines, and one with the first's parts but for the second's transformer; SD3.5, with all its layers."""
    base, other = checkpoints(sd35=True, layers=3), checkpoints(sd35=True, layers=3, seed=1)
    mixed = tmp_path_factory.mktemp("mixed") / "base"
    shutil.copytree(base, mixed)
    shutil.rmtree(mixed / "transformer")
    shutil.copytree(other / "transformer", mixed / "transformer")
    return base, other, mixed


def source(other, form, folder):
    """The second's transformer in one of the forms that the flag takes."""
    state = load_file(other / WEIGHTS)
    if form == "folder":
        return other
    path = folder / "own.safetensors"
    if form == "diffusers":
        save_file(state, path)
        return path
    return comfyui.write(state, path, "model.diffusion_model." if form == "ComfyUI, whole checkpoint" else "")


def trained(output):
    """What a run has trained, as bytes."""
    return next(
        path.read_bytes() for path in (output / "pytorch_lora_weights.safetensors", output / WEIGHTS) if path.exists()
    )


@pytest.mark.parametrize("kind", SCRIPTS)
def test_trains_as_a_pipeline_that_has_it(script, run, bases, tmp_path):
    base, other, mixed = bases
    flags = {"learning_rate": 1e-2, "max_train_steps": 2}
    wanted = trained(run(script, pretrained_model_name_or_path=mixed, output_dir=tmp_path / "mixed", **flags))
    flags["pretrained_model_name_or_path"] = base
    assert trained(run(script, output_dir=tmp_path / "plain", **flags)) != wanted
    for form in ("folder", "diffusers", "ComfyUI", "ComfyUI, whole checkpoint"):
        own = {FLAG: source(other, form, tmp_path)}
        assert trained(run(script, output_dir=tmp_path / form, **own, **flags)) == wanted, form


def test_draws_the_class_images(script, run, bases, few_steps, tmp_path):
    base, other, mixed = bases
    drawn = {}
    for name, flags in {
        "mixed": {"pretrained_model_name_or_path": mixed},
        "own": {"pretrained_model_name_or_path": base, FLAG: source(other, "ComfyUI", tmp_path)},
        "plain": {"pretrained_model_name_or_path": base},
    }.items():
        folder = tmp_path / name
        prior = {"with_prior_preservation": True, "class_data_dir": folder, "class_prompt": "a dog"}
        run(script, **flags, **prior, num_class_images=1, max_train_steps=1, output_dir=tmp_path / f"{name}-out")
        (drawn[name],) = [path.name for path in folder.iterdir()]  # with a digest of the pixels
    assert drawn["own"] == drawn["mixed"] != drawn["plain"]


def make_refused(case, base, checkpoints, folder):
    path = folder / "file.safetensors"
    if case == "another width":
        return comfyui.write(load_file(checkpoints("odd") / WEIGHTS), path)
    if case == "another model":
        return shutil.copy(base / "vae/diffusion_pytorch_model.safetensors", path)
    if case == "a layer is missing":
        state = load_file(base / WEIGHTS)
        del state["transformer_blocks.1.ff.net.2.weight"]
        return comfyui.write(state, path)
    if case == "adapters":
        save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 16)}, path)
    if case == "damaged":
        path.write_bytes((base / WEIGHTS).read_bytes()[:1000])
    if case == "empty folder":
        path = folder / "empty"
        path.mkdir()
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_encoded(case, script, refusal, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(script.PromptTable, "fill", None)
    path = make_refused(case, checkpoints(), checkpoints, tmp_path)
    assert refusal(**{FLAG: path}).startswith(f"transformer of {str(path)!r} ")


@pytest.mark.parametrize("kind", SCRIPTS)
def test_checkpoints_record_it(script, run, refusal, bases, tmp_path):
    base, other, _ = bases
    path = source(other, "ComfyUI", tmp_path)
    flags = {"pretrained_model_name_or_path": base, "checkpointing_steps": 1, "max_train_steps": 2}
    whole = trained(run(script, **flags, **{FLAG: path}, output_dir=tmp_path / "whole"))
    output = run(script, **flags | {"max_train_steps": 1}, **{FLAG: path})
    manifest = json.loads((output / "checkpoint-1/dreambooth.json").read_text())
    assert manifest["run"][FLAG] == str(path)
    again = {"resume_from_checkpoint": "latest"}
    assert refusal(**flags, **again).endswith(f"was trained with {FLAG} {str(path)!r}, not None: give the same")
    assert trained(run(script, **flags, **again, **{FLAG: path})) == whole


@pytest.mark.parametrize("form", ["folder", "ComfyUI"])
def test_the_card_names_it(lora, run, bases, form, tmp_path):
    base, other, _ = bases
    path = source(other, form, tmp_path)
    output = run(lora, pretrained_model_name_or_path=base, **{FLAG: path})
    text = (output / "README.md").read_text()
    said = f"DreamBooth weights for {base.name}, trained for 2 updates with the transformer {path.name}: 2 updates in "
    assert said in text
    assert str(path) not in text
