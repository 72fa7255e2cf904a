"""Losses of 20 updates stay the same, and a later script resumes checkpoints of this format.

If the numbers are meant to change, `make golden` writes new ones.
"""

import json
import re

import golden
import pytest
from conftest import load_script

KEPT = json.loads(golden.LOSSES.read_text())


@pytest.fixture
def folder(tmp_path_factory, tmp_path, monkeypatch):
    """The working directory of a run, with the bases and the pictures."""
    if not hasattr(golden, "made"):
        golden.made = tmp_path_factory.mktemp("golden")
        golden.make_folders(golden.made)
    for path in golden.made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return golden.made


@pytest.mark.parametrize("setting", golden.SETTINGS)
def test_losses(kind, folder, setting):
    losses = golden.run(kind, golden.SETTINGS[setting])
    assert len(losses) == 20
    assert losses == pytest.approx(KEPT[kind][setting], rel=1e-5)


def test_resumes_a_checkpoint_that_was_kept(kind, folder):
    golden.take_checkpoint(kind)
    losses = golden.run(kind, golden.RESUMED)
    assert len(losses) == golden.RESUMED["max_train_steps"] - golden.SAVED
    assert losses == pytest.approx(KEPT[kind]["resumed"], rel=1e-5)


def test_the_checkpoints_are_small_and_name_no_folder():
    files = [path for path in golden.CHECKPOINTS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files if path.name == "dreambooth.json"} == set(KEPT)
    assert sum(path.stat().st_size for path in files) < 1_500_000
    for path in files:
        assert not re.search(rb"/(home|root|tmp|work|Users)/", path.read_bytes()), path


@pytest.mark.parametrize("wanted", [f"checkpoint-{golden.SAVED}", "latest"])
@pytest.mark.parametrize("number", [3, None])
def test_another_format_is_refused(kind, folder, capsys, wanted, number):
    """A newer one, and one from before there was a number; also as the latest, so that its work is not lost."""
    path = golden.take_checkpoint(kind) / "dreambooth.json"
    manifest = json.loads(path.read_text()) | {"format": number}
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))
    with pytest.raises(SystemExit) as end:
        golden.run(kind, golden.RESUMED | {"resume_from_checkpoint": wanted})
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (end.value.code, len(lines)) == (2, 1)
    assert f"checkpoint-{golden.SAVED}" in lines[0]
    assert f"its format is {number}, not {load_script(kind).FORMAT}" in lines[0]
