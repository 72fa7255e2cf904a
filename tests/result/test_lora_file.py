"""The LoRA file: every loader applies it with the strength of training; and which layers are in it."""

from types import SimpleNamespace

import pytest
import torch
from conftest import isolated
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file

WEIGHTS = "pytorch_lora_weights.safetensors"
METHODS = {  # flags, and the scale of the adapters that they ask for
    "default": ({}, 1.0),
    "alpha": ({"rank": 7, "lora_alpha": 3}, 3 / 7),
    "rslora": ({"rank": 7, "lora_alpha": 3, "use_rslora": True}, 3 / 7**0.5),
    "dora": ({"rank": 7, "lora_alpha": 3, "use_dora": True}, 3 / 7),
    "dora at scale 1": ({"use_dora": True}, 1.0),
}

# ComfyUI's names for the layers of an SD3 block, by diffusers' (comfy/utils.py, mmdit_to_diffusers), and which third
# of a joint weight: its keys are these with "transformer." in front (comfy/lora.py, model_lora_keys_unet).
COMFYUI_LAYERS = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn2.to_q": ("x_block.attn2.qkv", 0),
    "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
    "attn.to_out.0": ("x_block.attn.proj", None),
    "attn2.to_out.0": ("x_block.attn2.proj", None),
    "attn.to_add_out": ("context_block.attn.proj", None),
    "ff.net.0.proj": ("x_block.mlp.fc1", None),
    "ff.net.2": ("x_block.mlp.fc2", None),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", None),
    "ff_context.net.2": ("context_block.mlp.fc2", None),
    "norm1.linear": ("x_block.adaLN_modulation.1", None),
    "norm1_context.linear": ("context_block.adaLN_modulation.1", None),
}
COMFYUI_CLIP = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{name}_proj" for name in ("k", "q", "v", "out")))


def read_as_comfyui(path, blocks=40):
    """(up, down) of each layer by ComfyUI's rule, and the keys that it does not know. No alpha means a scale of 1."""
    state, layers = load_file(path), {}
    known = {f"transformer.transformer_blocks.{block}.{layer}" for block in range(blocks) for layer in COMFYUI_LAYERS}
    for clip in ("text_encoder", "text_encoder_2"):
        known |= {f"{clip}.text_model.encoder.layers.{n}.{layer}" for n in range(32) for layer in COMFYUI_CLIP}
    for name in sorted(known):
        if f"{name}.lora_B.weight" in state:
            layers[name] = state.pop(f"{name}.lora_B.weight"), state.pop(f"{name}.lora_A.weight")
    return layers, state.keys()


def answers(models):
    """What a transformer and two CLIPs make of fixed inputs."""
    generator, transformer = torch.Generator().manual_seed(3), models["transformer"]
    with torch.no_grad():
        velocity = transformer(
            hidden_states=torch.randn(1, 16, 4, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, transformer.config.joint_attention_dim, generator=generator),
            pooled_projections=torch.randn(1, transformer.config.pooled_projection_dim, generator=generator),
            timestep=torch.tensor([500.0]),
        ).sample
        texts = [models[name](torch.arange(1, 9)[None]).text_embeds for name in models if name != "transformer"]
    return [velocity, *texts]


def load_parts(checkpoint, folder=None, encoders=True):
    """Transformer and CLIPs of a pipeline that has loaded a folder's adapters, by name."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoint)
    if folder:
        pipeline.load_lora_weights(folder)
    return {
        name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2")[: 1 + 2 * encoders]
    }


def adapted_layers(models):
    return {
        f"{name}.{layer}": module
        for name, model in models.items()
        for layer, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def read_header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def train(lora, run, monkeypatch):
    """Trains adapters and returns output_dir and the trained models' answers."""

    def train(**flags):
        found, save_weights = [], lora.save_weights

        def save(args, accelerator, trained, *others):
            found.append(answers({name: model.eval() for name, model in trained.items()}))
            save_weights(args, accelerator, trained, *others)

        monkeypatch.setattr(lora, "save_weights", save)
        return run(lora, learning_rate=0.1, text_encoder_lr=0.1, **flags), found[-1]

    return train


@pytest.mark.parametrize("method", METHODS)
def test_applied_as_trained(method, train, checkpoints):
    """At a scale of 1: that of training is in the weights, which leaves the last bits to chance where it is not 1."""
    flags, scale = METHODS[method]
    output, trained = train(train_text_encoder=True, **flags)
    models, base = load_parts(checkpoints(), output), load_parts(checkpoints())
    adapted = adapted_layers(models)
    assert {tuple(module.scaling.values()) for module in adapted.values()} == {(1.0,)}
    for got, wanted, before in zip(answers(models), trained, answers(base), strict=True):
        assert not torch.allclose(got, before, atol=1e-2)
        if scale == 1:
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted)

    assert not {"lora_adapter_metadata", "ss_network_alpha"} & read_header(output / WEIGHTS).keys()  # the scale is 1
    if "use_dora" in flags:  # whose magnitudes ComfyUI knows by another name
        return
    layers, unknown = read_as_comfyui(output / WEIGHTS)
    assert not unknown
    assert layers.keys() == adapted.keys()
    for name, module in adapted.items():
        merged = module.get_base_layer().weight.data + layers[name][0] @ layers[name][1]
        module.merge()
        torch.testing.assert_close(merged, module.get_base_layer().weight.data)


def test_a_checkpoint_has_the_raw_weights(train):
    """So that a run that resumes goes on from the very numbers it trained."""
    output, _ = train(rank=7, lora_alpha=3, checkpointing_steps=2)
    raw, final = load_file(output / "checkpoint-2" / WEIGHTS), load_file(output / WEIGHTS)
    assert raw.keys() == final.keys()
    for name, tensor in final.items():
        assert torch.equal(tensor, raw[name] * (3 / 7) if "lora_B" in name else raw[name]), name


def test_comfyui_knows_every_layer_of_all_linear(train, checkpoints):
    model = checkpoints(sd35=True)
    output, _ = train(pretrained_model_name_or_path=model, lora_layers="all-linear", lora_alpha=2)
    layers, unknown = read_as_comfyui(output / WEIGHTS)
    kinds = {name.split(".", 3)[3] for name in layers}
    assert not unknown
    assert kinds == COMFYUI_LAYERS.keys()


def targets(lora, argv, **flags):
    args = lora.parse_args(argv(**flags))
    with isolated():
        accelerator = lora.start_accelerator(args)
        return lora.choose_targets(args, lora.read_pipeline(args), accelerator, None)["transformer"]


@pytest.mark.parametrize(
    ("layers", "blocks", "found"),
    [
        ("attn.to_q", None, ["0.attn.to_q", "1.attn.to_q", "2.attn.to_q"]),
        ("attn.to_q,", "1-2", ["1.attn.to_q", "2.attn.to_q"]),
        ("to_q", "0", ["0.attn.to_q", "0.attn2.to_q"]),
        ("attn2.*", None, ["0.attn2.to_q", "0.attn2.to_k", "0.attn2.to_v", "0.attn2.to_out.0"]),
        ("ff.*", "1", ["1.ff.net.0.proj", "1.ff.net.2"]),
        (" ff.net.2 , ff_context.net.2", "0, 1,", [f"{n}.ff{c}.net.2" for n in (0, 1) for c in ("", "_context")]),
    ],
)  # fmt: skip
def test_layers(layers, blocks, found, lora, argv, checkpoints):
    model = checkpoints(sd35=True, layers=3)
    got = targets(lora, argv, pretrained_model_name_or_path=model, lora_layers=layers, lora_blocks=blocks)
    assert sorted(got) == sorted(f"transformer_blocks.{name}" for name in found)


def test_all_linear_is_every_linear_layer_of_the_blocks(lora, argv, checkpoints):
    model = checkpoints(sd35=True, layers=3)
    transformer = SD3Transformer2DModel.from_pretrained(model, subfolder="transformer").transformer_blocks
    linear = [f"transformer_blocks.{n}" for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    assert targets(lora, argv, pretrained_model_name_or_path=model, lora_layers="all-linear") == linear


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"lora_layers": "attn.to_x"}, "*.attn.to_x"),
        ({"lora_layers": "attn.to_q,attn2.*"}, "*.attn2.*"),  # SD3 has no second attention
        ({"lora_blocks": "2"}, "transformer_blocks.2.*"),
        ({"lora_blocks": "1-2"}, "transformer_blocks.2.*"),
        ({"lora_layers": "attn.to_add_out", "lora_blocks": "0,1"}, "transformer_blocks.1.*"),
    ],
)
def test_what_matches_nothing_is_refused(flags, name, lora, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        targets(lora, argv, **flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert f"--lora_blocks, --lora_layers: nothing matches {name}; there are 2 blocks; first: [" in error
    assert all(f"'transformer_blocks.0.{layer}'" in error for layer in ("attn.to_q", "ff.net.2")), error


def test_resuming_at_another_scale_is_refused(lora, run, capsys):
    run(lora, checkpointing_steps=1, max_train_steps=1)
    with pytest.raises(SystemExit):
        run(lora, resume_from_checkpoint="latest", lora_alpha=8)
    assert "was trained with lora_alpha None, not 8.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("norm", "second", "version"),
    [(None, (), "3-medium"), ("rms_norm", tuple(range(13)), "3.5-medium"), ("rms_norm", (), "3.5-large")],
)
def test_other_programs_know_the_base_by_the_header(norm, second, version, lora, argv, monkeypatch, tmp_path):
    """SwarmUI knows an SD3.5 Medium LoRA by its modelspec.architecture alone."""
    args = lora.parse_args(argv(rank=16, instance_prompt=None))
    model = SimpleNamespace(config=SimpleNamespace(qk_norm=norm, dual_attention_layers=second))
    accelerator = SimpleNamespace(is_main_process=True, unwrap_model=lambda model, **options: model)
    monkeypatch.setattr(lora, "get_peft_model_state_dict", lambda model, state, **options: state)
    states = {"transformer": {"lora_A.weight": torch.zeros(1)}}
    lora.save_weights(args, accelerator, {"transformer": model}, states, tmp_path)
    assert read_header(tmp_path / WEIGHTS) == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-v{version}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "SD3 DreamBooth LoRA ",
        "modelspec.trigger_phrase": "",
        "ss_network_dim": "16",
    }


def test_equal_runs_give_equal_files(lora, run, checkpoints, tmp_path):
    """Also in other folders: the header has no date, no path, and its entries in one order."""
    flags = {"pretrained_model_name_or_path": checkpoints(sd35=True), "instance_prompt": 'un chien "sks" 雪\n🐕'}
    files = [run(lora, max_train_steps=1, output_dir=tmp_path / name, **flags) / WEIGHTS for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    header = read_header(files[0])
    assert header["modelspec.architecture"] == "stable-diffusion-v3.5-medium/lora"
    assert header["modelspec.trigger_phrase"] == flags["instance_prompt"]


@pytest.mark.parametrize("words", range(9))
def test_the_tensors_stay_as_they_were(words, lora, tmp_path):
    """With a header of any length, in any precision, and aligned to eight bytes."""
    weights = {
        f"lora {dtype}": torch.randn(3, 5).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    lora.save_with_header({"format": "pt", "modelspec.title": "x" * words}, weights, tmp_path / "file.safetensors")
    assert read_header(tmp_path / "file.safetensors")["modelspec.title"] == "x" * words
    assert int.from_bytes((tmp_path / "file.safetensors").read_bytes()[:8], "little") % 8 == 0
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
