"""The form of the code that ruff does not measure: tokens, length, nesting, one idea a line, imports, file sizes."""

import argparse
import ast
import io
import shutil
import subprocess
import sys
import tokenize

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SCRIPTS
from diffusers import SD3Transformer2DModel

FOLDERS = "demo", "benchmarks", "tests"
FILES = [*SCRIPTS.values(), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))]
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.ClassDef)
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
LINES = 2200
TOKENS = {"lora": 15_400, "full": 14_900}
TOKENS_OF_A_LINE = 9.3
LIBRARIES = (torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR, torch.utils.data.DataLoader, Accelerator)
LIBRARIES += (SD3Transformer2DModel, argparse.ArgumentParser)
METHODS = {name for kind in LIBRARIES for name in dir(kind) if callable(getattr(kind, name))}


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


def most_tokens(name):
    return 750 if name == "main" else 300


def count_tokens(source):
    """Tokens by line, without comments and docstrings, and the lines that hold code."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens, lines, depth = {}, set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]  # from Python 3.12 on an f-string is many tokens: it counts as one
        if token.type not in SILENT and token.start[0] not in docstrings:
            tokens[token.start[0]] = tokens.get(token.start[0], 0) + (depth == 0)
            lines.update(range(token.start[0], token.end[0] + 1))
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
    return tokens, lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_functions_are_short_and_flat(path):
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path)}
    long = {name: length for name, length in lengths.items() if length > most_lines(path, name)}
    deep = {f.name: depth(f) for f in functions(path) if depth(f) > 4}
    assert (long, deep) == ({}, {})


def test_a_script_is_read_in_one_sitting(kind, script_path):
    """Tokens are what is read: a bound on lines alone would reward packing."""
    source = script_path.read_text()
    tokens, lines = count_tokens(source)
    total = sum(tokens.values())
    assert total <= TOKENS[kind]
    assert round(total / len(lines), 1) <= TOKENS_OF_A_LINE
    assert len(source.splitlines()) <= LINES


def test_a_function_is_small_and_takes_few_arguments(script_path):
    tokens, _ = count_tokens(script_path.read_text())
    large, many = {}, {}
    for function in functions(script_path):
        own = sum(tokens.get(line, 0) for line in range(function.lineno, function.end_lineno + 1))
        if own > most_tokens(function.name):
            large[function.name] = own
        if len(function.args.args + function.args.kwonlyargs) > 6:
            many[function.name] = ast.unparse(function.args)
    assert (large, many) == ({}, {})


def is_packed(node):
    """Whether a statement or expression holds more than one idea."""
    inside = [child for child in ast.walk(node) if child is not node]
    if isinstance(node, ast.Assign):
        return isinstance(node.value, ast.Tuple) and any(isinstance(target, ast.Tuple) for target in node.targets)
    if isinstance(node, COMPREHENSIONS):
        conditions = [condition for loop in node.generators for condition in loop.ifs]
        nested = any(isinstance(one, COMPREHENSIONS) for one in inside)
        return nested or len(node.generators) > 1 or len(conditions) > 1
    return isinstance(node, ast.JoinedStr) and any(isinstance(one, ast.IfExp) for one in inside)


def replaces_a_method(node):
    """Whether an assignment puts something in the place of a method of an object of a library."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Attribute) and target.attr in METHODS for target in targets)


def find(source, rule):
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if rule(node)]


def test_a_line_has_one_idea(script_path):
    assert find(script_path.read_text(), is_packed) == []


def test_no_method_of_a_library_is_replaced(script_path):
    assert find(script_path.read_text(), replaces_a_method) == []


@pytest.mark.parametrize(
    ("rule", "line", "breach"),
    [
        (is_packed, "a, b = 1, 2", True),
        (is_packed, "a, b = f()", False),
        (is_packed, "[a for b in c for a in b]", True),
        (is_packed, "{a: [b for b in a] for a in c}", True),
        (is_packed, "{a for a in b if a if c}", True),
        (is_packed, "[a for a in b if a]", False),
        (is_packed, "f'{a if b else c}'", True),
        (is_packed, "f'{a}'", False),
        (replaces_a_method, "a.step = b", True),
        (replaces_a_method, "a.b.load_state_dict = c", True),
        (replaces_a_method, "a.forward = b", True),
        (replaces_a_method, "a.step += 1", False),
        (replaces_a_method, "a.bar = b", False),
    ],
)
def test_a_breach_is_seen(rule, line, breach):
    assert (find(line, rule) != []) == breach


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
