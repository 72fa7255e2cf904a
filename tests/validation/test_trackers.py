"""What trackers receive: the same names and numbers everywhere, by update, and no secret."""

import importlib.util
import json
import struct
import sys
from types import SimpleNamespace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from accelerate.utils import LoggerType
from conftest import isolated

PLAIN = {"loss", "loss_average", "grad_norm", "lr"}
HELD_OUT = {"validation_loss", *(f"validation_loss_{level}" for level in range(1, 9))}
COST = {"seconds_per_update", "memory_gb"}
FLAGS = {"max_train_steps": 3, "num_validation_images": 2, "validation_prompt": "a dog", "validation_epochs": 10}


def wandb_records(path):
    """Records of an offline run: protobuf messages in LevelDB's log format, blocks of 32 KiB after a header of 7."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_wandb(folder):
    """{update: {name: value}}, the configuration and (project, name) of the offline run in a folder."""
    import wandb

    wandb.teardown()  # has its own process write the rest
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history, config, names = {}, {}, set()
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            plain = {name: value for name, value in row.items() if "." not in name and name[0] != "_"}
            history.setdefault(row["_step"], {}).update(plain)
        elif record.WhichOneof("record_type") == "run":
            names.add((record.run.project, record.run.display_name))
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.WhichOneof("record_type") == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
    return history, config, names


def read_tensorboard(folder):
    """{update: {name: value}} of scalars, and {name: [update]} of images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags, history = events.Tags(), {}
    for name in tags["scalars"]:
        for event in events.Scalars(name):
            history.setdefault(event.step, {})[name] = event.value
    return history, {name: [event.step for event in events.Images(name)] for name in tags["images"]}


def test_tensorboard_and_wandb_agree(script, run, pictures, few_steps):
    output = run(
        script,
        report_to="tensorboard, wandb",
        tracker_project_name="dogs",
        tracker_run_name="first",
        validation_data_dir=pictures(),
        **FLAGS,
    )
    history, config, names = read_wandb(output / "logs")
    board, images = read_tensorboard(output / "logs" / "first" / "dogs")
    assert names == {("dogs", "first")}
    assert history.keys() == board.keys() == {1, 2, 3}
    for step, row in history.items():
        assert row.keys() == board[step].keys() == PLAIN | COST | (HELD_OUT if step >= 2 else set())
        assert all(board[step][name] == pytest.approx(value, rel=1e-6) for name, value in row.items())
    assert config["instance_prompt"] == "a photo of sks dog"
    assert config["max_train_steps"] == 3
    assert "hub_token" not in config
    assert images == {"validation": [2], "test": [3]}


class Recorder(GeneralTracker):
    """Stands in for a package that is not installed here."""

    name = "trackio"
    requires_logging_directory = False

    def __init__(self, project, **options):
        super().__init__()
        self.rows, self.config, self.opened = [], {}, (project, options)

    def start(self):
        pass

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    @on_main_process
    def log(self, values, step=None, **options):
        self.rows.append((step, values))

    def finish(self):
        pass


NAMES = {
    (): PLAIN,
    ("prior",): PLAIN | {"instance_loss", "prior_loss"},
    ("encoders",): PLAIN | {"lr_text_encoder", "lr_text_encoder_2"},
}


@pytest.mark.parametrize("case", NAMES, ids=lambda case: "-".join(case) or "plain")
def test_names_of_the_scalars(case, script, kind, run, monkeypatch, pictures):
    """The README's table has these names."""
    seen, log_update = {}, script.log_update

    def recorded(accelerator, optimizer, figures, state):
        log_update(accelerator, optimizer, figures, state)
        seen[state.step] = set(figures)

    monkeypatch.setattr(script, "log_update", recorded)
    flags = {}
    if "prior" in case:
        flags |= {"with_prior_preservation": True, "class_data_dir": pictures(3), "class_prompt": "a dog"}
        flags |= {"num_class_images": 3}
    if "encoders" in case:
        flags |= {"train_text_encoder": True}
    run(script, **flags)
    extra = {"lr_text_encoder_3"} if "encoders" in case and kind == "full" else set()
    assert seen == dict.fromkeys((1, 2), NAMES[case] | COST | extra)


def test_trackio(lora, run, monkeypatch):
    """Whose package is not installed here: what accelerate hands to it."""
    trackers = []

    class Kept(Recorder):
        def __init__(self, *words, **options):
            super().__init__(*words, **options)
            trackers.append(self)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Kept)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TRACKIO])
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(__spec__="here"))
    real = importlib.util.find_spec  # accelerate asks it for devices' packages too, once in a process
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: name if name == "trackio" else real(name, *_))
    run(lora, report_to="trackio", tracker_project_name="dogs", max_train_steps=3)
    (tracker,) = trackers
    assert tracker.opened == ("dogs", {})
    assert "hub_token" not in tracker.config
    assert [(step, set(row)) for step, row in tracker.rows] == [(step, PLAIN | COST) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"report_to": "wandb"}, "--report_to wandb: could not start a tracker"),  # nobody is logged in
        (
            {"report_to": "tensorbord"},
            "accelerate takes no --mixed_precision None with --report_to tensorbord "
            "(ValueError: Unsupported logging capability: tensorbord. Choose between [",
        ),
        (
            {"report_to": "wandb", "tracker_run_name": "../../x"},
            "--logging_dir, --tracker_run_name, --tracker_project_name: '../x",
        ),
        (
            {"report_to": "tensorboard", "logging_dir": "/logs"},
            "--logging_dir, --tracker_run_name, --tracker_project_name: '/logs",
        ),
        ({"report_to": "wandb", "hub_token": "hf_secret"}, "--hub_token would be readable in wandb: "),
    ],
)
def test_refused_before_anything_is_encoded(lora, argv, monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.setattr(lora.PromptTable, "fill", None)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "no logins"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with isolated(), pytest.raises(SystemExit, match="2"):
        lora.main(lora.parse_args(argv(**flags)))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert line.startswith(f"script.py: error: {message}")
    assert "hf_secret" not in line
