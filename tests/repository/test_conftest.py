"""A script that runs in this process leaves no trace there."""

import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def state_of_the_process():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return handlers, torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, dict(os.environ)


def test_a_run_leaves_no_trace(script, run):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state, expected = state_of_the_process(), draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    output = run(script, max_train_steps=1, mixed_precision="bf16", allow_tf32=True)
    assert output.is_dir()
    assert draws() == expected
    assert state_of_the_process() == state
    singletons = AcceleratorState._shared_state, GradientState._shared_state, PartialState._shared_state
    assert not any(singletons)


def test_a_failed_run_leaves_no_trace_either(run, argv):
    def fail(args):
        os.environ["LEFT_BEHIND"] = "1"
        PartialState()
        raise RuntimeError(args)

    with pytest.raises(RuntimeError):
        run(SimpleNamespace(parse_args=list, main=fail))
    assert not PartialState._shared_state
    assert "LEFT_BEHIND" not in os.environ


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({}, ["--resolution", "32"], "--center_crop"),
        ({"resolution": 64, "center_crop": True}, ["--resolution", "64", "--center_crop"], "--dataset_name"),
        ({"seed": None, "center_crop": False}, [], "--seed"),
        ({"dataset_name": "some/set"}, ["--dataset_name", "some/set"], "--instance_data_dir"),
        ({"instance_data_dir": None}, [], "--instance_data_dir"),
    ],
)
def test_argv(argv, changes, present, absent):
    words = argv(**changes)
    assert set(present) <= set(words)
    assert absent not in words
