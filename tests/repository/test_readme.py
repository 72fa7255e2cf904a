"""The README against the scripts: its commands parse, the flags it names exist, what it links to is there."""

import argparse
import re
import shlex

import pytest
from conftest import ROOT, load_script

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(command.replace("\\\n", " "), comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for command in re.split(r"(?<!\\)\n", block)
    if "train_dreambooth" in command
]


def script_of(command):
    """The script that a command runs, and the flags behind it."""
    place = next(n for n, word in enumerate(command) if word.startswith("train_dreambooth"))
    return {"train_dreambooth_sd3.py": "full", "train_dreambooth_lora_sd3.py": "lora"}[command[place]], place


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_command_parses(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    kind, place = script_of(command)
    args = load_script(kind).parse_args(command[place + 1 :])
    assert args.instance_prompt
    assert capsys.readouterr().err == ""  # no flag of a recipe is without effect


def test_launcher_words():
    for command in COMMANDS:
        words = command[: script_of(command)[1]]
        assert words[:2] == ["accelerate", "launch"]
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()


def recipe(output_dir):
    for command in COMMANDS:
        kind, place = script_of(command)
        parser = load_script(kind).build_parser()
        args = parser.parse_args(command[place + 1 :])
        if args.output_dir == output_dir:
            return argparse.Namespace(kind=kind, **vars(args))
    raise AssertionError(f"no command writes {output_dir}")


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
    "validation_prompt": "A photo of sks dog in a bucket",
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
BLOCKS = {"lora_blocks": "12-24,30-37"}


@pytest.mark.parametrize(
    ("output_dir", "expected"),
    [
        ("dog-lora", ORIGINAL | {"kind": "lora", "resolution": 512, "learning_rate": 4e-4}),
        ("dog-sd3", ORIGINAL | {"kind": "full", "resolution": 1024, "learning_rate": 1e-4}),
        ("yarn-lora", YARN | {"kind": "lora"}),
        ("dog-blocks", BLOCKS | {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large"}),
        ("dog-lean", {"lora_layers": "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0"}),
    ],
)
def test_recipe(output_dir, expected):
    args = recipe(output_dir)
    assert {name: getattr(args, name) for name in expected} == expected


def test_every_flag_that_is_named_exists():
    known = {"--help", "--config_file", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip"}
    known |= {"--flavor", "--timeout", "--secret", "--secrets", "--volume", "--exclude", "--repo-type", "--local-dir"}
    known |= {"--all", "--seeds", "--full"}  # of demo/run.py and benchmarks/real_size.py
    for kind in ("full", "lora"):
        known |= set(load_script(kind).build_parser()._option_string_actions)
    named = set(re.findall(r"(?<![\w-])--[a-z0-9][\w-]*", TEXT))
    assert len(named) > 40
    assert named <= known, named - known


def test_ten_flags():
    table = TEXT.split("## The ten flags that matter")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| `--", table, re.MULTILINE)) == 10


def test_the_first_screen():
    """What it is in two sentences, the picture, the two commands, the command for one's own photos, the cost."""
    screen = TEXT.split("\n## ")[0]
    title, words, picture, *_ = screen.split("\n\n")
    assert title.startswith("# ")
    assert len(re.findall(r"\.(?:\s|$)", words)) == 2
    assert picture.startswith("![") and picture.endswith("(demo/before_after.png)")
    assert "    make demo\n    make test\n" in screen
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo:", "test:"} <= {line.split(" ")[0] for line in makefile.splitlines()}
    assert (
        screen.index("    make test") < screen.index("--instance_data_dir photos") < screen.index("**What it costs.**")
    )
    assert len(screen.splitlines()) <= 40


def test_length():
    assert len(TEXT.splitlines()) <= 350


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", TEXT, re.M)
    }
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("https://")]
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (ROOT / link).is_file(), link
    for path in re.findall(r"`((?:benchmarks|configs|demo|launch|tests)/[\w./]*)`", TEXT):
        assert (ROOT / path).exists(), path
    files = set(re.findall(r"`(\w+\.yaml)`", TEXT.split("## Several GPUs")[1].split("```")[0]))
    assert files == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_python_blocks_compile():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 1
    for block in blocks:
        compile(block, "README.md", "exec")


def test_parts_that_a_newcomer_looks_for():
    assert re.findall(r"^## (.*)$", TEXT, re.MULTILINE) == [
        "What these scripts have",
        "Install",
        "The dog example",
        "The ten flags that matter",
        "When it does not work",
        "Other dogs",
        "Text encoders",
        "Blocks and layers",
        "Data",
        "Low memory",
        "Several GPUs",
        "Stopping and resuming",
        "What is in the result",
    ]
