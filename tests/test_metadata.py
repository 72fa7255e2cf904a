"""What lets a script run alone: its inline metadata (PEP 723) and the requirements that it repeats."""

import re
import tomllib

from conftest import ROOT

REQUIREMENTS = [line for line in (ROOT / "requirements_sd3.txt").read_text().splitlines() if not line.startswith("#")]


def inline_metadata(source):
    """The script block of a file, found as PEP 723 says it is."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block,) = [match for match in re.finditer(pattern, source) if match["type"] == "script"]
    lines = block["content"].splitlines()
    return tomllib.loads("\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def test_metadata_is_the_requirements(script_path):
    metadata = inline_metadata(script_path.read_text())
    assert metadata["dependencies"] == [line for line in REQUIREMENTS if line]
    assert metadata["requires-python"] == ">=3.11"  # as ruff's target and the Makefile have it
    assert 'target-version = "py311"' in (ROOT / "pyproject.toml").read_text()


def test_requirements_are_what_is_installed():
    """The versions that the tests ran with are those that are promised."""
    from importlib.metadata import version

    pinned = dict(line.split("==") for line in REQUIREMENTS if line)
    assert {name: version(name).split("+")[0] for name in pinned} == pinned


def test_a_script_imports_nothing_of_the_repository(script_path, tmp_path, launch):
    """Copied alone into an empty folder it answers --help."""
    import shutil
    import subprocess
    import sys

    copy = shutil.copy(script_path, tmp_path)
    command = [sys.executable, copy, "--help"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0
    assert "--instance_prompt" in answer.stdout
