"""The adapters' file: what other programs make of it, and which layers are in it."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file

WEIGHTS, COMFYUI_WEIGHTS = "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"
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
    """(up, down, scale, magnitude) of each layer by ComfyUI's rule, and the keys that it does not know."""
    state = load_file(path)
    known = {f"transformer.transformer_blocks.{block}.{layer}" for block in range(blocks) for layer in COMFYUI_LAYERS}
    for clip in ("text_encoder", "text_encoder_2"):
        known |= {f"{clip}.text_model.encoder.layers.{n}.{layer}" for n in range(32) for layer in COMFYUI_CLIP}
    layers, read = {}, set()
    for name in sorted(known):
        up, down = state.get(f"{name}.lora_B.weight"), state.get(f"{name}.lora_A.weight")
        if up is None:
            continue
        alpha, magnitude = state.get(f"{name}.alpha"), state.get(f"{name}.dora_scale")
        layers[name] = up, down, 1.0 if alpha is None else alpha.item() / down.shape[0], magnitude
        read |= {f"{name}.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha", "dora_scale")}
    return layers, state.keys() - read


def merge_as_comfyui(weight, up, down, scale, magnitude):
    """A base weight with an adapter by ComfyUI's rule (comfy/weight_adapter: LoRAAdapter and weight_decompose)."""
    merged = weight + scale * (up @ down)
    if magnitude is not None:
        merged = merged * (magnitude / (weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps))
    return merged


def load_pipeline(checkpoint, folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoint)
    pipeline.load_lora_weights(folder)
    return pipeline


def velocity(transformer):
    """The transformer's answer to a fixed question."""
    generator = torch.Generator().manual_seed(3)
    config = transformer.config
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 16, 4, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, config.joint_attention_dim, generator=generator),
            pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=generator),
            timestep=torch.tensor([500.0]),
        ).sample


@pytest.fixture
def train(lora, run, monkeypatch):
    """Trains adapters and returns output_dir and the trained models' answer to the fixed question."""

    def train(**flags):
        answers, save_result = [], lora.save_result

        def save(args, accelerator, parts, trained, step):
            answers.append(velocity(trained["transformer"].eval()))
            save_result(args, accelerator, parts, trained, step)

        monkeypatch.setattr(lora, "save_result", save)
        return run(lora, learning_rate=0.1, **flags), answers[0]

    return train


@pytest.mark.parametrize("method", METHODS)
def test_applied_as_trained(method, train, checkpoints):
    """In diffusers to the last bit; in ComfyUI from the file beside it, where it would apply that one wrongly."""
    flags, scale = METHODS[method]
    output, answer = train(train_text_encoder=True, **flags)
    pipeline = load_pipeline(checkpoints(), output)
    scales = [m.scaling for m in pipeline.transformer.modules() if hasattr(m, "lora_A")]
    assert scales
    for scaling in scales:
        got, wanted = torch.tensor([*scaling.values(), scale], dtype=torch.float32).view(torch.int32).tolist()
        assert got == wanted
    assert torch.equal(velocity(pipeline.transformer), answer)
    assert not torch.equal(velocity(StableDiffusion3Pipeline.from_pretrained(checkpoints()).transformer), answer)

    plain = scale == 1 and "use_dora" not in flags
    assert (output / COMFYUI_WEIGHTS).exists() is not plain
    layers, unknown = read_as_comfyui(output / (WEIGHTS if plain else COMFYUI_WEIGHTS))
    assert not unknown
    adapted = {
        f"{name}.{layer}": module
        for name in ("transformer", "text_encoder", "text_encoder_2")
        for layer, module in getattr(pipeline, name).named_modules()
        if hasattr(module, "lora_A")
    }
    assert layers.keys() == adapted.keys()
    for name, module in adapted.items():
        assert layers[name][2] == pytest.approx(scale, rel=1e-15)
        merged = merge_as_comfyui(module.get_base_layer().weight.data.clone(), *layers[name])
        module.merge()
        torch.testing.assert_close(merged, module.get_base_layer().weight.data)


def test_comfyui_file_of_another_run_is_removed(train):
    assert (train(lora_alpha=8)[0] / COMFYUI_WEIGHTS).exists()
    assert not (train()[0] / COMFYUI_WEIGHTS).exists()


def test_comfyui_knows_every_layer_of_all_linear(train, checkpoints):
    model = checkpoints(sd35=True)
    output, _ = train(pretrained_model_name_or_path=model, lora_layers="all-linear", lora_alpha=2)
    layers, unknown = read_as_comfyui(output / COMFYUI_WEIGHTS)
    kinds = {name.split(".", 3)[3] for name in layers}
    assert not unknown
    assert kinds == COMFYUI_LAYERS.keys()


def test_header(train, lora):
    output, _ = train(rank=7, lora_alpha=3, train_text_encoder=True, max_train_steps=3)
    with safe_open(output / WEIGHTS, "pt") as file:
        header = file.metadata()
    adapters = json.loads(header.pop("lora_adapter_metadata"))
    # the three fields that LoraConfig has had since PEFT 0.3: a field it does not know is an error there
    fields = {f"{name}.{field}" for name in ("transformer", "text_encoder", "text_encoder_2")
              for field in ("r", "lora_alpha", "target_modules")}  # fmt: skip
    assert adapters.keys() == fields
    base = header["ss_sd_model_name"]
    assert header == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-3-medium/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "LoRA: a photo of sks dog",
        "modelspec.description": f"LoRA of {base}, 3 updates by train_dreambooth_lora_sd3.py {lora.VERSION}",
        "modelspec.resolution": "32x32",
        "modelspec.trigger_phrase": "a photo of sks dog",
        "ss_sd_model_name": base,
        "ss_steps": "3",
        "ss_training_script": f"train_dreambooth_lora_sd3.py {lora.VERSION}",
    }


def test_same_weights_same_bytes(lora, tmp_path):
    """The library alone shuffles the header's entries, so that equal runs would give unequal files."""
    header = {f"key {n}": "ä" for n in range(8)}
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    written = set()
    for _ in range(8):
        lora.write_safetensors(weights, tmp_path / "file.safetensors", header)
        written.add((tmp_path / "file.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == header
    assert all(torch.equal(tensor, weights[key]) for key, tensor in load_file(tmp_path / "file.safetensors").items())


def targets(lora, argv, **flags):
    args = lora.parse_args(argv(**flags))
    return lora.choose_targets(args, lora.read_pipeline(args))["transformer"]


@pytest.mark.parametrize(
    ("layers", "blocks", "found"),
    [
        ("attn.to_q", None, ["0.attn.to_q", "1.attn.to_q", "2.attn.to_q"]),
        ("to_q", "0", ["0.attn.to_q", "0.attn2.to_q"]),
        ("attn2.*", None, ["0.attn2.to_q", "0.attn2.to_k", "0.attn2.to_v", "0.attn2.to_out.0"]),
        ("ff.*", "1", ["1.ff.net.0.proj", "1.ff.net.2"]),
        (" ff.net.2 , ff_context.net.2", "0, 1", [f"{n}.ff{c}.net.2" for n in (0, 1) for c in ("", "_context")]),
    ],
)  # fmt: skip
def test_layers(layers, blocks, found, lora, argv, checkpoints):
    model = checkpoints(sd35=True, layers=3)
    got = targets(lora, argv, pretrained_model_name_or_path=model, lora_layers=layers, lora_blocks=blocks)
    assert got == [f"transformer_blocks.{name}" for name in found]


def test_all_linear_is_every_linear_layer_of_the_blocks(lora, argv, checkpoints):
    model = checkpoints(sd35=True, layers=3)
    transformer = lora.SD3Transformer2DModel.from_pretrained(model, subfolder="transformer").transformer_blocks
    linear = [f"transformer_blocks.{n}" for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    assert targets(lora, argv, pretrained_model_name_or_path=model, lora_layers="all-linear") == linear


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lora_layers": "attn.to_x"}, ("--lora_layers", "'attn.to_x'", "attn.to_q", "ff.net.2", "all-linear")),
        ({"lora_layers": "attn2.*"}, ("--lora_layers", "'attn2.*'", "attn.to_q")),  # SD3 has no second attention
        ({"lora_blocks": "2"}, ("--lora_blocks", "'2'", "0 to 1")),
        ({"lora_layers": "attn.to_add_out", "lora_blocks": "0,1"}, ("--lora_blocks", "block 1", "attn.to_add_out")),
    ],
)
def test_what_matches_nothing_is_refused(flags, words, lora, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        targets(lora, argv, **flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_table_of_adapters(lora, checkpoints):
    from peft import LoraConfig

    models = {}
    for name in ("transformer", "text_encoder"):
        models[name] = getattr(StableDiffusion3Pipeline.from_pretrained(checkpoints(layers=5)), name)
        models[name].requires_grad_(False)
    blocks = [f"transformer_blocks.{n}.attn.to_q" for n in (0, 2, 3, 4)]
    models["transformer"].add_adapter(LoraConfig(r=2, target_modules=[*blocks, "context_embedder"]))
    models["text_encoder"].add_adapter(LoraConfig(r=2, target_modules=["k_proj"]))
    width = models["transformer"].config.joint_attention_dim
    lines = [line.split() for line in lora.describe_adapters(models).splitlines()]
    assert lines == [
        ["layer", "blocks", "parameters"],
        ["transformer", "context_embedder", str(2 * (16 + width))],
        ["transformer", "attn.to_q", "0,2-4", "256"],
        ["text_encoder", "self_attn.k_proj", "0-1", "128"],
        ["all", str(256 + 128 + 2 * (16 + width))],
    ]


def test_resuming_at_another_scale_is_refused(lora, run, capsys):
    run(lora, checkpointing_steps=1, max_train_steps=1)
    with pytest.raises(SystemExit):
        run(lora, resume_from_checkpoint="latest", lora_alpha=8)
    assert "--lora_alpha None, this run has 8.0" in capsys.readouterr().err
