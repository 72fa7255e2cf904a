"""The mean of the last losses, and the held-out loss at each noise level."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from test_trackers import read_tensorboard

IN_TURN = True  # one script for each test, see conftest.py

LEVELS = [f"validation_loss_{level}" for level in range(1, 9)]


def test_the_average_is_that_of_the_last_100_finite_losses(script, monkeypatch):
    rows, shown = [], {}
    monkeypatch.setattr(script, "peak_memory_gb", lambda device: 1.0)
    state = script.Progress({}, {}, 0, 250, False)
    state.bar = SimpleNamespace(
        update=lambda: None, set_postfix=lambda *figures, **more: shown.update(*figures, **more)
    )
    accelerator = SimpleNamespace(device=None, log=lambda figures, step: rows.append(figures))
    optimizer = SimpleNamespace(param_groups=[{"name": "transformer", "lr": 0.1}])
    losses = [float(number) for number in range(250)]
    losses[7], losses[200] = math.nan, math.inf
    for loss in losses:
        script.log_update(accelerator, optimizer, {"loss": loss, "seconds_per_update": 1.0}, state)
    for number, row in enumerate(rows):
        last = [loss for loss in losses[max(number - 99, 0) : number + 1] if math.isfinite(loss)]
        assert row["loss_average"] == pytest.approx(sum(last) / len(last))
    assert shown["loss_average"] == rows[-1]["loss_average"]
    assert shown["loss"] == 249


def test_each_noise_level_is_logged_beside_the_mean(script, run, pictures, monkeypatch):
    """With sigma in the place of the loss: 8 is the most noise, and the levels are those of SD3's shifted schedule."""
    flow_losses = script.flow_losses

    def sigmas(args, transformer, scheduler, drawn, *others):
        if torch.is_grad_enabled():
            return flow_losses(args, transformer, scheduler, drawn, *others)
        return scheduler.sigmas[(drawn[2] * 1000).long()], None

    monkeypatch.setattr(script, "flow_losses", sigmas)
    output = run(script, validation_data_dir=pictures(3), report_to="tensorboard", tracker_project_name="dogs")
    history, _ = read_tensorboard(output / "logs" / "dogs")
    found = [history[2][name] for name in LEVELS]
    clean = [1 - (number + 0.5) / 8 for number in range(8)]
    assert found == pytest.approx([3 * s / (1 + 2 * s) for s in reversed(clean)], abs=2e-3)
    assert history[2]["validation_loss"] == pytest.approx(sum(found) / 8)


def test_the_card_and_the_last_line_say_what_the_run_took(script, run, checkpoints, pictures, monkeypatch, caplog):
    monkeypatch.setattr(script, "peak_memory_gb", lambda device: 12.34)
    output = run(script, max_train_steps=2, validation_data_dir=pictures())
    card = (output / "README.md").read_text()
    (last,) = [record.getMessage() for record in caplog.records if "held-out loss" in record.getMessage()]
    cost = last.removeprefix(f"[RANK 0] The result is in {output}: ")
    assert re.fullmatch(r"2 updates in \d+ s \(\d+\.\d\d s each\), at most 12\.3 GB; held-out loss \d\.\d{4}", cost)
    assert f"DreamBooth weights for {checkpoints().name}, trained for 2 updates: {cost}." in card
    assert "held-out" not in (run(script, output_dir=output / "plain") / "README.md").read_text()
