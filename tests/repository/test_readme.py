"""README and docs against the repository: commands parse, what they name exists, links lead somewhere."""

import re
import shlex

import pytest
from conftest import ROOT, load_script

PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
LENGTHS = {"README.md": 200, "CONTRIBUTING.md": 60, "benchmarks/README.md": 150}  # lines; a page in docs has 150
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in {*PAGES, *LENGTHS}}
SCRIPTS = {"train_dreambooth_sd3.py": "full", "train_dreambooth_lora_sd3.py": "lora"}
LAUNCHERS = (
    "accelerate launch --config_file --num_processes --multi_gpu --num_machines --machine_rank --main_process_ip"
)
OTHERS = "--help --flavor --timeout --secret --secrets --volume --exclude --repo-type --local-dir"  # hf, sky
OTHERS += " --all --seeds --signals-to-handle --json --kill-on-bad-exit"  # demo/run.py, torchrun, fits.py, srun
TOPS = "benchmarks", "configs", "demo", "docs", "launch", "tests"


def read_commands():
    """Each command of a bash block that starts a script: (page, the launcher's words, the script, its flags)."""
    for name in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", TEXTS[name], re.DOTALL):
            for command in re.split(r"(?<!\\)\n", block):
                words = shlex.split(command.replace("\\\n", " "), comments=True)
                script = next((word for word in words if word in SCRIPTS), None)
                if script:
                    place = words.index(script)
                    yield name, words[:place], SCRIPTS[script], words[place + 1 :]


COMMANDS = list(read_commands())


@pytest.mark.parametrize(
    ("launcher", "kind", "words"),
    [pytest.param(*command, id=f"{page}-{number}") for number, (page, *command) in enumerate(COMMANDS)],
)
def test_command_parses(launcher, kind, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "drawings", "photos"):
        (tmp_path / name).mkdir()
    args = load_script(kind).parse_args(words)
    assert args.instance_prompt
    assert capsys.readouterr().err == ""  # no flag of a recipe is without effect
    assert launcher[:2] == ["accelerate", "launch"]
    assert set(LAUNCHERS.split()).issuperset(word for word in launcher if word.startswith("-"))
    if "--config_file" in launcher:
        assert (ROOT / launcher[launcher.index("--config_file") + 1]).is_file()


ORIGINAL = {
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3-medium-diffusers",
    "instance_data_dir": "dog",
    "instance_prompt": "a photo of sks dog",
    "mixed_precision": "fp16",
    "train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "max_train_steps": 500,
    "validation_epochs": 25,
    "seed": 0,
    "report_to": "wandb",
    "push_to_hub": True,
}
YARN = {
    "dataset_name": "Norod78/Yarn-art-style",
    "instance_prompt": "a photo of TOK yarn art dog",
    "train_text_encoder": True,
    "resolution": 1024,
    "train_batch_size": 1,
    "optimizer": "prodigy",
    "learning_rate": 1.0,
    "text_encoder_lr": 1.0,
    "max_train_steps": 1500,
    "rank": 32,
}
STYLE = {
    "weighting_scheme": "logit_normal",
    "logit_mean": -3.0,
    "training_shift": 1.0,
    "rank": 32,
    "learning_rate": 1e-4,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "max_train_steps": 300,
}
BLOCKS = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large", "lora_blocks": "12-24,30-37"}


@pytest.mark.parametrize(
    ("output_dir", "wanted_kind", "expected"),
    [
        ("dog-lora", "lora", ORIGINAL | {"resolution": 512, "learning_rate": 4e-4}),
        ("dog-sd3", "full", ORIGINAL | {"resolution": 1024, "learning_rate": 1e-4}),
        ("yarn-lora", "lora", YARN),
        ("style-lora", "lora", STYLE),
        ("dog-subject", "lora", {"weighting_scheme": "none", "training_shift": 1.0, "cache_latents": True}),
        ("dog-blocks", "lora", BLOCKS),
        ("dog-lean", "lora", {"lora_layers": "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0"}),
    ],
)
def test_recipe_has_the_published_values(output_dir, wanted_kind, expected):
    recipes = [(kind, words) for _, _, kind, words in COMMANDS if output_dir in words]
    kind, words = recipes[0]
    args = load_script(kind).build_parser().parse_args(words)
    assert kind == wanted_kind
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("page", PAGES)
def test_named_flags_exist(page):
    known = set(LAUNCHERS.split()) | set(OTHERS.split())
    for kind in SCRIPTS.values():
        known |= set(load_script(kind).build_parser()._option_string_actions)
    named = set(re.findall(r"(?<![\w-])--[a-z0-9][\w-]*", TEXTS[page]))
    assert named - known == set()


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_length(page):
    assert len(TEXTS[page].splitlines()) <= LENGTHS.get(page, 150)


def anchors(path):
    """What links to headings of a page end in."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_links_and_paths_lead_somewhere(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(rf"`((?:{'|'.join(TOPS)})/[\w./-]*)`", TEXTS[page]):
        assert (ROOT / path).exists(), path
    for program in re.findall(r"python ((?:benchmarks|demo)/\w+\.py)", TEXTS[page]):
        assert (ROOT / program).is_file(), program


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_named_targets_of_make_exist(page):
    targets = re.findall(r"^([a-z][a-z0-9 -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:`|^    )make ([a-z][\w-]*)", TEXTS[page], re.MULTILINE))
    assert named <= set(" ".join(targets).split())


def test_every_page_and_configuration_is_linked_or_named():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", TEXTS["README.md"]))
    assert linked >= PAGES.keys() - {"README.md"}
    named = set(re.findall(r"`(\w+\.yaml)`", TEXTS["docs/several-gpus.md"]))
    assert named == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_python_blocks_compile():
    blocks = [(name, block) for name in PAGES for block in re.findall(r"```python\n(.*?)```", TEXTS[name], re.DOTALL)]
    assert blocks
    for name, block in blocks:
        compile(block, name, "exec")
