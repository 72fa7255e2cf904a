"""What lets a script run alone: its inline metadata (PEP 723) and the requirements, which must agree."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version


def read_requirements(path):
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


REQUIREMENTS = read_requirements(ROOT / "requirements_sd3.txt")


def inline_metadata(source):
    """The script block of a file, found as PEP 723 says it is."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block,) = [match for match in re.finditer(pattern, source) if match["type"] == "script"]
    lines = block["content"].splitlines()
    return tomllib.loads("\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def test_metadata_is_the_requirements(script_path):
    metadata = inline_metadata(script_path.read_text())
    assert sorted(metadata["dependencies"]) == sorted(REQUIREMENTS)
    assert metadata["requires-python"] == ">=3.11"  # as ruff's target and the Makefile have it
    assert 'target-version = "py311"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", ["docs/several-gpus.md", "launch/train.sbatch", "launch/skypilot.yaml"])
def test_remote_commands_have_flags_that_there_are(path, lora):
    text = (ROOT / path).read_text().replace("\\\n", " ")
    if path == "docs/several-gpus.md":
        text = re.search(r"^hf jobs uv run .*$", text, flags=re.MULTILINE)[0]
    (command,) = [line for line in text.splitlines() if "train_dreambooth_lora_sd3.py --" in " ".join(line.split())]
    words = shlex.split(command.split("train_dreambooth_lora_sd3.py")[1])
    args = lora.build_parser().parse_args(words)
    assert args.instance_prompt == "a photo of sks dog"


def test_sbatch_requeues_a_run_that_its_signal_stopped(tmp_path):
    """With srun and scontrol of a few words: the signal's exit code leads back into the queue, another does not."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    script = ROOT / "launch" / "train.sbatch"
    for code, requeued in ((138, True), (0, False), (1, False)):
        tools = f'srun() {{ return {code}; }}; scontrol() {{ echo "$@"; }}; export -f srun scontrol; '
        command = ["bash", "-c", f"{tools} SLURM_JOB_ID=7 bash {script}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert (done.stdout == "requeue 7\n") is requeued


def test_each_set_of_constraints_has_a_version_of_each_requirement():
    """Within its range; the oldest is at the floors."""
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, REQUIREMENTS)}
    for path in ROOT.glob("constraints*.txt"):
        pinned = dict(line.split("==") for line in read_requirements(path))
        assert pinned.keys() == ranges.keys(), path.name
        assert all(ranges[name].contains(number) for name, number in pinned.items()), path.name
        assert pinned["torch"] == "2.13.0"
    oldest = dict(line.split("==") for line in read_requirements(ROOT / "constraints-oldest.txt"))
    floors = {name: Version(one.version) for name in ranges for one in ranges[name] if one.operator == ">="}
    assert {name: Version(oldest[name]) for name in floors if name != "torch"} == {
        name: floor for name, floor in floors.items() if name != "torch"
    }


@pytest.mark.oldest
def test_what_is_installed_is_what_an_environment_of_make_has():
    """The versions that the tests run with are those that are named."""
    sets = [dict(line.split("==") for line in read_requirements(path)) for path in ROOT.glob("constraints*.txt")]
    assert {name: version(name).split("+")[0] for name in sets[0]} in sets


def test_the_citation_has_the_version_and_the_licence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()


def test_make_lists_its_targets():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert not [target for target in named if not re.search(rf"^make .*\b{target}\b", listed, re.MULTILINE)]


def test_the_newest_changes_are_those_of_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == project["version"]


def test_a_script_imports_nothing_of_the_repository(script_path, tmp_path):
    """Copied alone into an empty folder it answers --help."""
    copy = shutil.copy(script_path, tmp_path)
    command = [sys.executable, copy, "--help"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0
    assert "--instance_prompt" in answer.stdout
