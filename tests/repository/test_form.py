"""The form of the code that ruff does not measure: length and nesting of functions, imports, sizes of files."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

FOLDERS = "demo", "benchmarks", "tests"
FILES = [*SCRIPTS.values(), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))]
LINES = {"full": 1750, "lora": 1800}
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)


def functions(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def depth(node):
    """How deeply the blocks of a function are nested; an elif is as deep as its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        chained = isinstance(node, ast.If) and child in node.orelse and isinstance(child, ast.If)
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not chained))
    return deepest


def most_lines(path, name):
    if path not in SCRIPTS.values():
        return 60
    return 90 if name == "main" else 50


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_functions_are_short_and_flat(path):
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path)}
    long = {name: length for name, length in lengths.items() if length > most_lines(path, name)}
    deep = {f.name: depth(f) for f in functions(path) if depth(f) > 4}
    assert (long, deep) == ({}, {})


def test_a_script_is_read_in_one_sitting(kind, script_path):
    assert len(script_path.read_text().splitlines()) <= LINES[kind]


@pytest.mark.parametrize("path", SCRIPTS.values(), ids=SCRIPTS)
def test_each_script_runs_alone(path, tmp_path):
    shutil.copy(path, tmp_path)
    command = [sys.executable, "-I", path.name, "--help"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--pretrained_model_name_or_path" in found.stdout


@pytest.mark.parametrize("path", SCRIPTS.values(), ids=SCRIPTS)
def test_no_script_imports_what_it_does_not_name(path):
    """Neither a module of this repository nor torchvision, which has no build for every machine."""
    files = [file.relative_to(ROOT) for file in ROOT.rglob("*.py")]
    modules = {file.stem for file in files if not file.parts[0].startswith(".venv")} | {"torchvision"}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported & modules == set()


def test_no_large_file_but_the_checkpoint():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file()}
    checkpoint = {name: size for name, size in sizes.items() if name.startswith("demo/tiny-sd3/")}
    assert sum(checkpoint.values()) <= 16_000_000
    assert {name for name, size in sizes.items() if size > 4_000_000} <= checkpoint.keys()
