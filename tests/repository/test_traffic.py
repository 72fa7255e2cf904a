"""benchmarks/traffic.py: what it calculates, and that two processes move as many bytes as it says."""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = ROOT / "benchmarks/traffic.py"


@pytest.fixture(scope="module")
def traffic():
    spec = importlib.util.spec_from_file_location("traffic", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("gpus", "ddp", "fsdp"), [(1, 0, 0), (2, 400, 300), (8, 700, 525), (64, 787.5, 590.625)])
def test_bytes_of_a_hundred_parameters(traffic, gpus, ddp, fsdp):
    assert traffic.sent_by_ddp(100, gpus) == pytest.approx(ddp)
    assert traffic.sent_by_fsdp(100, gpus) == pytest.approx(fsdp)


@pytest.mark.parametrize(("model", "billions"), [("SD3 Medium", 2.03), ("SD3.5 Large", 8.06)])
def test_sizes_of_the_real_models(traffic, model, billions):
    transformer = traffic.build_transformer(*traffic.MODELS[model])
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bytes written are counted in /proc")
def test_measured_bytes_are_the_calculated_ones(checkpoints, pictures):
    """But for a few hundred bytes: the losses are gathered too, and each process writes its log."""
    command = [sys.executable, str(PROGRAM), "--measure", str(checkpoints()), str(pictures())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    pairs = re.findall(r"(\d+) bytes an update measured, (\d+) calculated", done.stdout)
    assert len(pairs) == 2, done.stdout
    for measured, calculated in pairs:
        assert 0 <= int(measured) - int(calculated) < 4000, done.stdout
