"""The twins: definitions in both scripts have the same text, except for those that make LoRA differ.

So `diff train_dreambooth_sd3.py train_dreambooth_lora_sd3.py` explains LoRA, and a fix always reaches both scripts.
"""

import ast
import difflib
import re

import pytest
from conftest import SCRIPTS

# In both, with another text in each: ten at most.
DIFFERENCES = (
    "METHOD",
    "METHOD_FLAGS",  # the lora group of flags, and the full script's for small cards
    "RESULT",  # what the model card says and what is uploaded
    "choose_targets",  # layers with adapters, or whole models
    "make_trainable",
    "load_trained",
    "save_weights",  # one file of adapters, or a folder for each model
    "batch_losses",  # preservation by switching adapters off
    "clip_gradient",  # the whole gradient, or none where the backward pass updates
    "make_optimizer",  # of all parameters at once, or of one at a time
)
# In one of them alone.
ALONE = (
    "LORA_LAYERS",
    "WEIGHTS",
    "choose_layers",
    "read_quantization",
    "adapter_layers",
    "adapter_scale",
    "load_adapters",
    "SwappedBlocks",
    "cut_positions",
    "save_with_header",
    "SingleUpdates",
    "copy_part",
)


def definitions(source):
    """Text of each top-level function, class and constant by name, with decorators and the comment above, in order."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        else:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        text = "\n".join(lines[first - 1 : node.end_lineno])
        found |= dict.fromkeys(names, text)
    return found


def chapters(source):
    """Titles of the ruled-off headings, in order."""
    return re.findall(r"^# ---- (.+?) -+$", source, flags=re.MULTILINE)


def compare(full, lora, differences=(), alone=()):
    """What breaks the rule, a message each; no message, no breach."""
    ours, theirs = definitions(full), definitions(lora)
    shared = [name for name in ours if name in theirs]
    problems = []
    for name in shared:
        if ours[name] != theirs[name] and name not in differences:
            lines = difflib.unified_diff(ours[name].splitlines(), theirs[name].splitlines(), "full", "lora", n=1)
            problems.append(f"{name} drifted apart:\n" + "\n".join(lines))
        if ours[name] == theirs[name] and name in differences:
            problems.append(f"{name} is listed as a difference and is none")
    problems += [f"{name} is listed as a difference and is not in both" for name in differences if name not in shared]
    single = ours.keys() ^ theirs.keys()
    problems += [f"{name} is in one script alone" for name in sorted(single - set(alone))]
    problems += [f"{name} is listed as alone and is not" for name in alone if name not in single]
    if shared != [name for name in theirs if name in ours]:
        problems.append("what is shared comes in another order")
    if chapters(full) != chapters(lora):
        problems.append(f"the chapters are {chapters(full)} and {chapters(lora)}")
    return problems


def test_the_scripts_are_twins():
    problems = compare(*(path.read_text() for path in SCRIPTS.values()), DIFFERENCES, ALONE)
    assert not problems, "\n".join(problems)
    assert len(DIFFERENCES) <= 10


def test_main_is_identical():
    full, lora = (definitions(path.read_text())["main"] for path in SCRIPTS.values())
    assert full == lora
    assert "main" not in DIFFERENCES


def test_the_chapters_are_there():
    titles = chapters(SCRIPTS["full"].read_text())
    assert titles[0] == "Arguments"
    assert titles[-1] == "Training"
    assert len(titles) == 11


BASE = "# ---- One ----\n\nA = 1  # why\n\n\n# Above.\n@cache\ndef f():\n    return A\n\n\nclass C:\n    pass\n"


@pytest.mark.parametrize(
    ("old", "new", "differences", "alone", "problem"),
    [
        pytest.param("", "", (), (), None, id="equal"),
        pytest.param("return A", "return 2", (), (), "f drifted", id="function"),
        pytest.param("return A", "return A  # more", (), (), "f drifted", id="comment inside"),
        pytest.param("# Above", "# Over", (), (), "f drifted", id="comment above"),
        pytest.param("@cache", "@other", (), (), "f drifted", id="decorator"),
        pytest.param("# why", "# how", (), (), "A drifted", id="comment beside a constant"),
        pytest.param("    pass", "    x = 1", (), (), "C drifted", id="class"),
        pytest.param("return A", "return 2", ("f",), (), None, id="listed"),
        pytest.param("", "", ("f",), (), "f is listed as a difference and is none", id="listed, equal"),
        pytest.param("", "", ("g",), (), "g is listed as a difference and is not in both", id="listed, in neither"),
        pytest.param("def f", "def g", (), ("g",), "f is in one script alone", id="missing in one"),
        pytest.param("def f", "def g", (), ("f", "g"), None, id="alone, listed"),
        pytest.param("", "", (), ("f",), "f is listed as alone and is not", id="alone, in both"),
        pytest.param("A = 1  # why\n", "", (), ("A",), None, id="constant alone"),
        pytest.param("- One", "- Two", (), (), "the chapters are", id="chapter"),
    ],
)
def test_compare(old, new, differences, alone, problem):
    problems = compare(BASE, BASE.replace(old, new) if old else BASE, differences, alone)
    assert len(problems) == (problem is not None), problems
    assert problem is None or problems[0].startswith(problem)


def test_compare_sees_another_order():
    assert compare("A = 1\nB = 2\n", "B = 2\nA = 1\n") == ["what is shared comes in another order"]
