"""The command line against flags.json, the table of flags that users of the upstream scripts rely on."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

ROWS = json.loads((ROOT / "tests/support/flags.json").read_text())
MOVED = {"--cache_latents": "training"}  # it is no output
RELAXED = {"--instance_prompt"}  # the table requires it; here captions can stand in for it
VALUES = {
    "--precondition_outputs": ("0", 0),
    "--optimizer": ("AdamW", "adamw"),
    "--validation_prompt": ("a dog", ["a dog"]),
}
VALUES |= {"int": ("16", 16), "float": ("0.25", 0.25), "switch": (None, True), "bool": ("false", False)}
BOOL_WORDS = {"true": True, "True": True, "false": False, "FALSE": False}
MINIMUM = ["--pretrained_model_name_or_path", "model", "--instance_prompt", "a dog", "--instance_data_dir", "folder"]


def cases(wanted=lambda row: True, absent=False):
    """Pairs of row and script: those where the table has the flag, or those where it has not."""
    return pytest.mark.parametrize(
        ("row", "kind"),
        [
            pytest.param(row, kind, id=f"{kind} {row['flag']}")
            for row in ROWS
            for kind in SCRIPTS
            if wanted(row) and (row["scripts"] in ("both", kind)) is not absent
        ],
    )


def parse(script, *words):
    """The namespace of a valid command line with some more words, from the parser alone."""
    return script.build_parser().parse_args([*MINIMUM, *words])


def value_of(namespace, row):
    return getattr(namespace, row["flag"].removeprefix("--"))


@cases()
def test_type_and_default(row, script):
    word, expected = (
        VALUES.get(row["flag"]) or VALUES.get(row["type"]) or [(row["choices"] or [row["default"] or "word"])[0]] * 2
    )
    value = value_of(parse(script, row["flag"], *([] if word is None else [word])), row)
    assert value == expected
    assert type(value) is type(expected)
    if row["flag"] not in MINIMUM:
        default = value_of(parse(script), row)
        assert default == (row["default"].lower() if row["flag"] == "--optimizer" else row["default"])
        assert type(default) is type(row["default"])


@cases(absent=True)
def test_flags_of_one_script_are_unknown_to_the_other(row, script):
    with pytest.raises(SystemExit, match="2"):
        parse(script, row["flag"], "1")


@cases(lambda row: row["choices"])
def test_choices(row, script):
    for choice in row["choices"]:
        assert value_of(parse(script, row["flag"], choice), row) == choice
    with pytest.raises(SystemExit, match="2"):
        parse(script, row["flag"], "something else")


@cases(lambda row: row["required"] and row["flag"] not in RELAXED)
def test_required(row, script):
    place = MINIMUM.index(row["flag"])
    with pytest.raises(SystemExit, match="2"):
        script.build_parser().parse_args(MINIMUM[:place] + MINIMUM[place + 2 :])


@cases(lambda row: row["type"] in ("int", "float"))
def test_numbers_refuse_words(row, script):
    with pytest.raises(SystemExit, match="2"):
        parse(script, row["flag"], "many")


@cases(lambda row: row["type"] == "bool")
def test_bool_flags_take_words_and_need_one(row, script):
    for word, expected in BOOL_WORDS.items():
        assert value_of(parse(script, row["flag"], word), row) is expected
    for words in (["perhaps"], []):
        with pytest.raises(SystemExit, match="2"):
            parse(script, row["flag"], *words)


@pytest.mark.parametrize("spellings", [("AdamW", "adamw", "ADAMW"), ("prodigy", "Prodigy", "PRODIGY")])
def test_an_optimizer_may_be_spelled_in_any_case(spellings, script):
    names = {parse(script, "--optimizer", spelling).optimizer for spelling in spellings}
    assert len(names) == 1
    assert names.pop().lower() == spellings[0].lower()


def test_no_abbreviations(script):
    """An abbreviation that works today may be ambiguous tomorrow."""
    with pytest.raises(SystemExit, match="2"):
        parse(script, "--learning", "1e-4")


def test_parse_args_gives_a_whole_namespace(script, kind, argv):
    namespace = script.parse_args(argv())
    for row in ROWS:
        if row["scripts"] in ("both", kind):
            assert hasattr(namespace, row["flag"].removeprefix("--"))


def test_help_is_one_sentence_a_flag_under_the_table_s_group(script, kind):
    parser = script.build_parser()
    groups = {
        flag: group for group in parser._action_groups for a in group._group_actions for flag in a.option_strings
    }
    for row in ROWS:
        if row["scripts"] in ("both", kind):
            differs = row["scripts"] != "both" or row["flag"] == "--train_text_encoder"  # these stand together
            group = MOVED.get(row["flag"], row["group"])
            group = {"full": "full training", "lora": "lora"}[kind] if differs else group
            assert groups[row["flag"]].title.startswith(group)
    for action in parser._actions[1:]:
        words = " ".join((action.help % vars(action)).split())
        assert words.endswith("."), action.option_strings
        assert words.count(". ") == 0, action.option_strings
        assert "default" not in words.lower(), f"{action.option_strings}: the formatter prints the default"
        assert not action.nargs or action.nargs in (0, "?", "+"), action.option_strings
    text = " ".join(parser.format_help().split())
    assert script.__doc__.splitlines()[0] in text
    for default in ("(default: 512)", "(default: logit_normal)", "(default: tensorboard)"):
        assert default in text


@pytest.mark.parametrize(
    ("words", "code", "stdout", "stderr"),
    [
        pytest.param(["--help"], 0, "--pretrained_model_name_or_path", "", id="help"),
        pytest.param(["--no_such_flag"], 2, "", "error: ", id="unknown flag"),
        pytest.param([*MINIMUM, "--resolution", "many"], 2, "", "--resolution: invalid number", id="no number"),
        pytest.param([*MINIMUM, "--dataset_name", "x"], 2, "", "give exactly one of the two", id="contradiction"),
    ],
)
def test_answers_at_once_when_copied_alone(words, code, stdout, stderr, script_path, tmp_path):
    """With -I, which hides the repository, and before torch or anything else that takes seconds is imported."""
    path = shutil.copy(script_path, tmp_path)
    command = [sys.executable, "-I", "-X", "importtime", path, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stderr.splitlines()
    messages = [line for line in lines if not line.startswith("import time:")]
    modules = {line.split("|")[-1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert done.returncode == code
    assert stdout in done.stdout
    assert len(messages) == (1 if code else 0), messages
    assert stderr in "".join(messages)
    assert "argparse" in modules
    assert not modules & {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "PIL", "datasets"}
