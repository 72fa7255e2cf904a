"""A signal ends a run at the end of the update, with a checkpoint from which it goes on as if nothing had been."""

import os
import signal

import pytest
from conftest import isolated
from test_resume import read_run

NUMBERS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}


def send_at(script, monkeypatch, number, update):
    """Sends this process a signal in the middle of an update."""
    original, calls = script.flow_losses, []

    def flow_losses(*args):
        calls.append(None)
        if len(calls) == update:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(script, "flow_losses", flow_losses)


@pytest.mark.parametrize("name", NUMBERS)
def test_stops_at_the_update_and_goes_on(script, argv, run, monkeypatch, capsys, tmp_path, name):
    flags = {"max_train_steps": 4, "output_dir": tmp_path / "stopped"}
    with isolated(), monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        send_at(script, patch, getattr(signal, name), 2)
        script.main(script.parse_args(argv(**flags)))
    assert end.value.code == NUMBERS[name]
    saved = f"{name}: saved {tmp_path / 'stopped/checkpoint-2'}; add --resume_from_checkpoint latest to go on"
    assert saved in capsys.readouterr().err.splitlines()
    assert [path.name for path in (tmp_path / "stopped").glob("*checkpoint*")] == ["checkpoint-2"]
    if name != "SIGTERM":
        return
    stopped = read_run(run(script, **flags, resume_from_checkpoint="latest"))
    whole = read_run(run(script, **flags | {"output_dir": tmp_path / "whole"}))
    assert sorted(whole[0]) == [1, 2, 3, 4]
    assert stopped[0] == whole[0]
    assert {n: d for n, d in stopped[1].items() if n != "loss.png"} == {
        n: d for n, d in whole[1].items() if n != "loss.png"
    }


def test_a_second_signal_ends_at_once(script):
    """In a process of its own, for it ends without a word to anyone."""
    child = os.fork()
    if not child:
        caught = script.catch_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        if caught == [signal.SIGUSR1]:
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
