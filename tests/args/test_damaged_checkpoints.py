"""A damaged checkpoint is found and named.

Without a manifest that can be read, `latest` falls back to an older one, and a named one ends in one line. A damaged
file ends a run in one line when it is loaded.
"""

import json
import shutil

import pytest
from conftest import in_turn, isolated


@pytest.fixture
def saved(script, kind, run, tmp_path_factory):
    """A copy of the output of three updates with a checkpoint each, as output_dir of a script; trained once."""
    if kind not in SAVED:
        SAVED[kind] = run(
            script, max_train_steps=3, checkpointing_steps=1, use_ema=True, output_dir=tmp_path_factory.mktemp("saved")
        )
    folder = tmp_path_factory.mktemp("damaged") / "out"
    shutil.copytree(SAVED[kind], folder)
    return folder


SAVED = {}


def lose_manifest(folder):
    (folder / "dreambooth.json").unlink()
    return "No such file or directory"


def spoil_manifest(folder):
    (folder / "dreambooth.json").write_text("[]")
    return ""


DAMAGES = [(lose_manifest,), (spoil_manifest,)]


@pytest.mark.parametrize(("kind", "damage"), in_turn(DAMAGES))
def test_seen(script, argv, saved, caplog, capsys, damage):
    """`latest` takes the one before; a name is refused. Both say why. A dry run goes as far as that."""
    reason = damage(saved / "checkpoint-3")
    flags = {"output_dir": saved, "dry_run": True, "use_ema": True, "learning_rate": 1e-3}
    with isolated():
        script.main(script.parse_args(argv(**flags, resume_from_checkpoint="latest")))
    assert f"resuming {saved / 'checkpoint-2'} with changed flags: " in caplog.text
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(**flags, resume_from_checkpoint="checkpoint-3")))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (end.value.code, len(lines)) == (2, 1)
    assert "--resume_from_checkpoint 'checkpoint-3': no whole checkpoint" in lines[0]
    said = [line for line in caplog.messages if "passed over: " in line]
    assert len(said) == 2
    assert all(f"{saved / 'checkpoint-3'} is no checkpoint to resume from: " in line for line in said)
    assert all(reason in line for line in said)


@pytest.mark.parametrize(("kind", "wanted"), in_turn([("latest",), ("checkpoint-3",)]))
def test_another_format_is_refused(script, argv, saved, capsys, wanted):
    """No older checkpoint is taken in its place: the script that wrote it would go on from it."""
    path = saved / "checkpoint-3/dreambooth.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(output_dir=saved, use_ema=True, resume_from_checkpoint=wanted)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (end.value.code, len(lines)) == (2, 1)
    assert lines[0].endswith(f"{saved / 'checkpoint-3'}: its format is 0, not 2: use the script that wrote it")


WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}


NOISE = [("optimizer.bin",), ("scheduler.bin",), ("ema.bin",), ("WEIGHTS",)]


@pytest.mark.parametrize(("kind", "name"), [*in_turn(NOISE), ("full", "WEIGHTS")])
def test_noise_of_the_right_size_ends_in_one_line(script, kind, argv, saved, capsys, name):
    folder = saved / "checkpoint-3"
    path = folder / (WEIGHTS[kind] if name == "WEIGHTS" else name)
    path.write_bytes(b"\xa7" * path.stat().st_size)
    flags = {"output_dir": saved, "max_train_steps": 4, "resume_from_checkpoint": "latest", "use_ema": True}
    with isolated(), pytest.raises(SystemExit) as end:
        script.main(script.parse_args(argv(**flags)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (end.value.code, len(lines)) == (2, 1)
    assert str(folder) in lines[0]
    assert " cannot be loaded" in lines[0] or "the adapters of the transformer in " in lines[0]
