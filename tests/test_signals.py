"""A signal ends a run at the end of the update, with a checkpoint from which it goes on as if nothing had been."""

import json
import os
import signal

import pytest
from conftest import ROOT, isolated
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


@pytest.mark.slow
def test_all_processes_stop_at_the_update_at_which_one_is_told(argv, launch, tmp_path):
    """The second process alone gets SIGTERM in its second update; both save checkpoint-2 and end."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_dreambooth_lora_sd3 as script\n"
        "split, calls = script.split_losses, []\n"
        "def told(*rest):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return split(*rest)\n"
        "script.split_losses = told\n"
        "try:\n"
        "    script.main(script.parse_args())\n"
        "except SystemExit as end:\n"
        "    os.write(1, f\"ended {os.environ['RANK']} {end.code} {len(calls)}\\n\".encode())\n"
    )
    done = launch(program, argv(max_train_steps=6), processes=2)
    ended = sorted(line for line in done.stdout.splitlines() if line.startswith("ended"))
    assert ended == ["ended 0 143 2", "ended 1 143 2"], done.stderr[-2000:]
    assert json.loads((tmp_path / "out/checkpoint-2/dreambooth.json").read_text())["step"] == 2
