"""What the tests share: tiny checkpoints, pictures, both scripts as modules, and two ways to run them.

What takes seconds to import is imported where it is used: the process that hands the tests out to others, which runs
none itself, would keep them waiting.
"""

import contextlib
import functools
import gc
import importlib.util
import itertools
import os
import random
import signal
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from pathlib import Path

import pytest

# The libraries read these when they are imported. A home of its own keeps out the accelerate configuration, the tokens
# and the caches of whoever runs the tests.
HOME = tempfile.TemporaryDirectory(prefix="sd3-tests-", ignore_cleanup_errors=True)
# A GPU is left out unless it is asked for by CUDA_VISIBLE_DEVICES, so that a result does not depend on the machine.
os.environ.update(
    HF_HOME=HOME.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
for variable in ("HF_TOKEN", "HF_ENDPOINT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(variable, None)

ROOT = Path(__file__).parent.parent
SCRIPTS = {"full": ROOT / "train_dreambooth_sd3.py", "lora": ROOT / "train_dreambooth_lora_sd3.py"}
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
# Given a script's name and a JSON list, runs it with each list of flags. Prints exit codes but 0, and ==== on stderr
# after each.
SEVERAL = f"""
import importlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
script = importlib.import_module(sys.argv[1])

for argv in json.loads(sys.argv[2]):
    try:
        script.main(script.parse_args(argv))
    except SystemExit as end:
        print(end.code)
    print("====", file=sys.stderr)
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
    # After a fork torch makes its pool of threads anew when it is first asked, but not where two threads ask at once.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def takes_part(item):
    """In a file that says IN_TURN a test takes one script, not both: what it is of is the same text in both."""
    chosen = any("kind" in str(mark.args[0]) for mark in item.iter_markers("parametrize"))
    if chosen or not hasattr(item.module, "IN_TURN") or "kind" not in item.fixturenames:
        return True
    return item.callspec.params["kind"] == list(SCRIPTS)[zlib.crc32(item.originalname.encode()) % 2]


def pytest_collection_modifyitems(items):
    """Files with many slow tests come first, so that at the end no process waits for another that got one late."""
    items[:] = filter(takes_part, items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def in_turn(rows):
    """Rows of a table, each for one of the scripts in turn: what they share is the same text in both."""
    return [pytest.param(kind, *row) for kind, row in zip(itertools.cycle(SCRIPTS), rows, strict=False)]


def load_script(kind):
    """A script as a module, under its own name so that loader processes can unpickle what it defines."""
    path = SCRIPTS[kind]
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


@contextlib.contextmanager
def isolated():
    """Puts back what a run changes in the process: accelerate's singletons, random states, threads, signals, ..."""
    import numpy as np
    import torch
    from accelerate.state import AcceleratorState, GradientState

    gc.collect()
    gc.freeze()  # what the libraries have made stays: else each collection of a run looks through it for 0.3 s
    environment = os.environ.copy()
    numbers, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()  # it keeps the settings that it was first imported with
        os.environ.clear()
        os.environ.update(environment)
        random.setstate(numbers)
        np.random.set_state(arrays)
        torch.set_rng_state(tensors)
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.use_deterministic_algorithms(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def in_child(work):
    """Runs work() in a child process. Returns its exit code, 1 after an error, or minus the number of a signal."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:  # the child must not go on as a second pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="session")
def full():
    return load_script("full")


@pytest.fixture(scope="session")
def lora():
    return load_script("lora")


@pytest.fixture(params=list(SCRIPTS))
def kind(request):
    """The name of a script, as in SCRIPTS: each in turn, but see takes_part."""
    return request.param


@pytest.fixture
def script(kind):
    """The script of that name as a module."""
    return load_script(kind)


@pytest.fixture
def script_path(kind):
    """The script of that name as a file."""
    return SCRIPTS[kind]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Builds a tiny checkpoint, see tiny_sd3.build for the options; each kind once a session. Do not write to it."""
    import tiny_sd3

    built = {}

    def checkpoints(preset="tiny", **options):
        key = (preset, *sorted(options.items()))
        if key not in built:
            built[key] = tiny_sd3.build(tmp_path_factory.mktemp("sd3"), preset, **options)
        return built[key]

    return checkpoints


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Gives a folder of `count` pictures, see tiny_sd3.images for the options; each once a session."""
    import tiny_sd3

    made = {}

    def pictures(count=2, **options):
        key = (count, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("pictures")
            tiny_sd3.images(made[key], count, **options)
        return made[key]

    return pictures


@pytest.fixture
def argv(checkpoints, pictures, tmp_path):
    """Gives the arguments of a short run, with changes.

    None and False leave a flag out, True is a bare flag, a list is several words.
    """

    def argv(**changes):
        flags = {
            "instance_prompt": "a photo of sks dog",
            "resolution": 32,
            "train_batch_size": 1,
            "max_train_steps": 2,
            "lr_warmup_steps": 0,
            "seed": 0,
            "report_to": "none",
            "output_dir": tmp_path / "out",
        } | changes
        if "pretrained_model_name_or_path" not in flags:
            flags["pretrained_model_name_or_path"] = checkpoints()
        if "dataset_name" not in flags:
            flags.setdefault("instance_data_dir", pictures())
        words = []
        for name, value in flags.items():
            if value is True:
                words.append(f"--{name}")
            elif isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            elif value is not None and value is not False:
                words += [f"--{name}", str(value)]
        return words

    return argv


@pytest.fixture
def run(argv):
    """Runs a script's main in this process and returns its output_dir; for the flags see `argv`."""

    def run(script, **flags):
        with isolated():
            args = script.parse_args(argv(**flags))
            script.main(args)
        return Path(args.output_dir)

    return run


@pytest.fixture
def refusal(script, argv, capsys, monkeypatch):
    """Runs a script that must refuse with exit code 2, and gives the one line that says so, less the script's name."""

    def refusal(**flags):
        monkeypatch.setattr(sys, "argv", ["script.py"])
        with isolated(), pytest.raises(SystemExit) as end:
            script.main(script.parse_args(argv(**flags)))
        assert end.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("script.py: error: ")]
        assert len(lines) == 1
        return lines[0].removeprefix("script.py: error: ")

    return refusal


@pytest.fixture
def refused(refusal, script, monkeypatch):
    """The same of a script that must refuse before it loads any part of a model."""

    def load(*args, **kwargs):
        raise AssertionError("a part is loaded")

    monkeypatch.setattr(script, "load_part", load)
    return refusal


@pytest.fixture
def few_steps(monkeypatch):
    import ranks

    ranks.draw_fast(monkeypatch)


def start_two_processes(folder, cases, **environment):
    """Runs the cases of support/ranks.py one after another in two processes, and sees that all end as they should.

    What rank R prints goes to the folder's log.R.
    """
    import processes
    import ranks

    def work():
        for case in cases:
            ranks.run_case(case)

    with isolated():
        codes = processes.watch(processes.start(work, 2, Path(folder, "log"), **environment), seconds=400)
    assert codes == [0, 0], "\n".join(Path(folder, f"log.{rank}").read_text()[-4000:] for rank in (0, 1))


@pytest.fixture
def in_two_processes(tmp_path):
    return functools.partial(start_two_processes, tmp_path)
