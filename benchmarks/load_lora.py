"""Loads the LoRA script's result in several versions of diffusers and checks the merged weights.

    python benchmarks/load_lora.py 0.34.0 0.36.0 0.40.0

pip fetches each version alone, and it is imported in place of the environment's. All other packages are the
environment's, except for a version that cannot be imported with them: it gets the packages of its time (OF_ITS_TIME).
A row has the versions, the kind of run, the number of changed layers, and the largest difference from base + B @ A,
relative to the largest entry of B @ A.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--instance_prompt sks --resolution 32 --train_batch_size 1 --max_train_steps 3 --lr_warmup_steps 0"
FLAGS += " --learning_rate 1e-2 --seed 0 --report_to none"
KINDS = {
    "plain": "",
    "alpha 7, text encoders": "--lora_alpha 7 --train_text_encoder --text_encoder_lr 1e-2",
    "rsLoRA, all layers, SD3.5": "--use_rslora --rank 8 --lora_alpha 3 --lora_layers all-linear",
    "bfloat16": "--mixed_precision bf16 --lora_alpha 2",
}
# diffusers 0.34, of June 2025, imports names of Flax that transformers 5 no longer has.
OF_ITS_TIME = {
    "0.34.0": ["transformers==4.52.4", "tokenizers==0.21.4", "huggingface_hub==0.33.0", "peft==0.15.2"],
}


def compare(folder):
    """Fuses each kind's file into its base in this process, and prints a row for each."""
    import diffusers
    import huggingface_hub
    import peft
    import transformers

    modules = diffusers, transformers, huggingface_hub, peft
    print(", ".join(f"{module.__name__} {module.__version__}" for module in modules))
    for number, kind in enumerate(KINDS):
        layers, difference = fuse(Path(folder, f"base-{number}"), Path(folder, f"out-{number}"))
        print(f"    {kind:27}{layers:4} layers  {difference:.0e}")


def fuse(base, out):
    """The number of layers that a file changes in a base, and the largest difference from base + B @ A."""
    import diffusers
    import torch
    from safetensors.torch import load_file

    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=torch.float32)
    models = {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2")}

    def weights():
        return {f"{name}.{key}": w.clone() for name, model in models.items() for key, w in model.state_dict().items()}

    before, saved = weights(), load_file(Path(out, "pytorch_lora_weights.safetensors"))
    pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora(components=list(models))
    pipeline.unload_lora_weights()
    after, expected = weights(), {}
    for key in [key for key in saved if ".lora_A." in key]:
        a, b = saved[key].float(), saved[key.replace("lora_A", "lora_B")].float()
        expected[key.replace(".lora_A.weight", ".weight")] = b @ a
    largest = max(change.abs().max() for change in expected.values())
    assert before.keys() == after.keys()
    difference = max((after[key] - before[key] - expected.get(key, 0)).abs().max() for key in after) / largest
    return len(expected), difference


def start(*words, **variables):
    """What a program prints. Errors: RuntimeError with its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.rstrip()


def main(versions):
    sys.path.insert(0, str(ROOT / "tests/support"))
    import tiny_sd3

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_sd3.images(folder / "pictures", 2)
        for number, (kind, flags) in enumerate(KINDS.items()):
            base = tiny_sd3.build(folder / f"base-{number}", sd35="SD3.5" in kind)
            files = ["--pretrained_model_name_or_path", base, "--instance_data_dir", folder / "pictures"]
            out = folder / f"out-{number}"
            start(ROOT / "train_dreambooth_lora_sd3.py", *files, "--output_dir", out, *FLAGS.split(), *flags.split())
        for version in versions:
            packages = folder / "packages" / version
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
            subprocess.run([*pip, f"diffusers=={version}", *OF_ITS_TIME.get(version, [])], check=True)
            try:
                print(start(__file__, "--compare", folder, PYTHONPATH=str(packages)), flush=True)
            except RuntimeError as error:
                print(f"diffusers {version} fails: {error}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compare"]:
        compare(*sys.argv[2:])
    else:
        main(sys.argv[1:])
