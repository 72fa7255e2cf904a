"""A loss or gradient that is not finite never reaches the weights; the scaler's own skips are told apart."""

import functools
import itertools
import logging
import math
import types

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import in_turn, isolated


@pytest.fixture
def poison(script, monkeypatch):
    """Makes the losses of some updates, batch 1 and no accumulation, bad: of value, or of gradient alone."""

    def poison(updates, gradient_alone=False):
        original, calls = script.flow_losses, []

        def flow_losses(*args):
            losses, prediction = original(*args)
            calls.append(None)
            if len(calls) not in updates:
                return losses, prediction
            if gradient_alone:
                losses.register_hook(lambda gradient: gradient * math.inf)
                return losses, prediction
            return losses * math.nan, prediction

        monkeypatch.setattr(script, "flow_losses", flow_losses)

    return poison


@pytest.fixture
def rows(script, monkeypatch):
    """What trackers get, with the update's number."""
    rows = []

    def note(accelerator, state, figures):
        rows.append({"step": state.step, **figures})

    monkeypatch.setattr(script, "log_figures", note)
    return rows


def read_weights(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.safetensors")
        if "transformer" in str(path) or "lora" in path.name
    }


@pytest.fixture
def end(argv, capsys):
    """Runs a script that ends itself; gives its code and its last line."""

    def end(script, **flags):
        with isolated(), pytest.raises(SystemExit) as end:
            script.main(script.parse_args(argv(**flags)))
        return end.value.code, capsys.readouterr().err.splitlines()[-1]

    return end


OTHERS = ({"optimizer": "prodigy"}, {"use_8bit_adam": True})  # for them the host decides, for AdamW its kernel


@pytest.mark.parametrize(
    ("kind", "gradient_alone", "flags"),
    [*in_turn(itertools.product((False, True), ({},))), *in_turn(zip((False, True), OTHERS, strict=True))],
)
def test_a_bad_update_is_skipped_counted_and_logged(
    script, end, poison, rows, tmp_path, caplog, gradient_alone, flags
):
    poison({2, 4}, gradient_alone)
    with caplog.at_level(logging.WARNING):
        end(script, max_train_steps=4, checkpointing_steps=1, lr_scheduler="linear", **flags)
    said = [line.split(":")[0] for line in caplog.messages if "skipping" in line]
    assert said == ["[RANK 0] skipping update 2", "[RANK 0] skipping update 4"]
    assert {row["step"]: row["skipped_updates"] for row in rows if "skipped_updates" in row} == {2: 1, 4: 2}
    weights = [read_weights(tmp_path / f"out/checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert weights[0] == weights[1] != weights[2] == weights[3]
    states = [torch.load(tmp_path / f"out/checkpoint-{step}/optimizer.bin") for step in (1, 2, 3, 4)]
    assert_same(states[0]["state"], states[1]["state"])
    assert_same(states[2]["state"], states[3]["state"])
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates[0] == rates[1] > rates[2] == rates[3]


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


WAITS = ("item", "tolist", "__bool__", "__float__", "__int__", "cpu")


@pytest.mark.parametrize("flags", [{}, {"optimizer": "prodigy"}], ids=["AdamW", "Prodigy"])
def test_the_host_waits_for_no_device_between_the_backward_pass_and_adamw(script, run, monkeypatch, flags):
    """And reads an update's figures when the next one is under way: what Prodigy does is the other way."""
    order = []

    def watch(owner, name, word, first):
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*inputs, **options):
            order.extend([word] * first)
            result = original(*inputs, **options)
            order.extend([word] * (not first))
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(script, "flow_losses", "forward", True)
    watch(script.Accelerator, "backward", "backward", False)
    watch(AcceleratedOptimizer, "step", "step", True)
    watch(script, "log_update", "log", True)
    for name in WAITS:
        watch(torch.Tensor, name, "wait", True)
    run(script, max_train_steps=3, repeats=3, **flags)
    between = [set(part.split("step")[0].split()) for part in " ".join(order).split("backward")[1:]]
    assert between == [{"wait"} if flags else set()] * 3
    assert [word for word in order if word in ("forward", "step", "log")] == [
        *("forward", "step"),
        *("forward", "log", "step") * 2,
        "log",
    ]


@pytest.mark.parametrize(("kind", "bad", "code"), in_turn([({2, 4}, 1), ({2}, None)]))
def test_a_run_that_skipped_more_than_a_tenth_says_so_and_keeps_the_weights(
    script, run, end, poison, tmp_path, bad, code
):
    poison(bad)
    flags = {"max_train_steps": 10}
    if code is None:
        run(script, **flags)
    else:
        assert end(script, **flags) == (
            code,
            f"what was trained is saved in {tmp_path / 'out'}, but 2 of 10 updates were skipped, not being finite:"
            " lower the rate",
        )
    assert read_weights(tmp_path / "out")


@pytest.mark.parametrize("kind", ["lora"])
def test_ten_in_a_row_end_the_run(script, end, poison, tmp_path):
    poison({2, *range(4, 40)})
    code, _ = end(script, max_train_steps=30, checkpointing_steps=3)
    kept = tmp_path / "out/checkpoint-12"
    assert code == "ten updates in a row were not finite: lower the rate and resume from the last checkpoint"
    assert kept.is_dir() and not (tmp_path / "out/checkpoint-15").exists()
    assert read_weights(kept) == read_weights(tmp_path / "out/checkpoint-3")


@pytest.mark.parametrize(
    ("kind", "scale", "loss", "norm", "sound"),
    in_turn(
        [
            (None, 1.0, 1.0, True),
            (None, 1.0, math.inf, False),
            (None, math.nan, 1.0, False),
            (65536.0, 1.0, math.inf, True),  # the scaler skips it by itself and halves its scale
            (65536.0, 1.0, math.nan, True),
            (65536.0, math.nan, math.nan, False),
            (1.0, 1.0, math.inf, False),  # no scale is left that could have done it
        ]
    ),
)
def test_whose_skip_it_is(script, monkeypatch, scale, loss, norm, sound):
    scaler = None if scale is None else types.SimpleNamespace(get_scale=lambda: scale)
    accelerator, state = types.SimpleNamespace(scaler=scaler), types.SimpleNamespace(step=4, skipped=[])
    monkeypatch.setattr(script, "log", logging.getLogger("skips"))
    found = script.check_finite(accelerator, state, {"loss": loss, "grad_norm": norm})
    assert found is (math.isfinite(loss) and math.isfinite(norm))
    assert state.skipped == ([] if sound else [4])


def test_a_real_scaler_skips_and_halves():
    """What `update_weights` relies on: torch's scaler leaves the weights alone and halves its scale."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(weight.sum() * math.inf).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert (scaler.get_scale(), weight.tolist()) == (2.0, [1.0, 1.0])
