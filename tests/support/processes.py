"""Processes forked from this one, which has imported everything, or from a Python without threads.

Ranks are looked after as torchrun looks after its own: once one has failed, the others get SIGTERM, and SIGKILL where
that does not end them.
"""

import functools
import gc
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import datasets  # noqa: F401  accelerate imports it in each of several processes: here it costs 0.5 s once
import yaml
from tqdm import tqdm

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 30  # seconds between the two signals, torchrun's own


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fsdp2_environment():
    """What `accelerate launch --config_file configs/fsdp2.yaml` sets."""
    section = yaml.safe_load((ROOT / "configs/fsdp2.yaml").read_text())["fsdp_config"]
    section["fsdp_transformer_cls_to_wrap"] = section.pop("fsdp_transformer_layer_cls_to_wrap")
    flags = {"ACCELERATE_USE_FSDP": True, "ACCELERATE_USE_CPU": False, **section}
    return {
        name.upper(): str(value).lower() if isinstance(value, bool) else str(value) for name, value in flags.items()
    }


def become(rank, count, log, environment):
    """Makes this process rank `rank` of `count`, whose output goes to `log`."""
    os.environ.update(environment)
    if count > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        runpy.run_path(str(ROOT / "tests/support/fsdp2_without_gpu/sitecustomize.py"))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115  it stays open
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    if rank:  # a script that starts sets TQDM_DISABLE, which counts when tqdm is imported
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    logging.getLogger().handlers.clear()  # pytest's
    warnings.resetwarnings()  # those of a process that has just started
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


def start(work, count, logs, **environment):
    """Forks `count` processes that call work(); what they print goes to the file "{logs}.{rank}". Their numbers."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    gc.collect()
    gc.freeze()  # what the libraries have made: else each collection of a run looks through it
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            become(rank, count, f"{logs}.{rank}", {"ACCELERATE_USE_CPU": "true", **meeting, **environment})
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # the child must not go on as a second pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    return children


def watch(children, seconds=120):
    """Waits for the processes as torchrun does. Their exit codes, which of a signal are minus its number."""
    codes = {}
    deadline = time.monotonic() + seconds
    told = None
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        failed = any(codes.values()) or time.monotonic() > deadline
        if failed and told is None:
            told = time.monotonic()
            tell(set(children) - codes.keys(), signal.SIGTERM)
        if told and time.monotonic() > told + PATIENCE:
            tell(set(children) - codes.keys(), signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def tell(children, number):
    for child in children:
        os.kill(child, number)


# Each line that it reads is a program to run in a fork; the fork goes on below the loop, and ends as any Python does.
FORKING = """
import importlib, json, os, signal, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)

signal.alarm(300)  # seconds, then it is killed
program, words, folder, environment = json.loads(line)
for descriptor, name in enumerate((os.devnull, "said.out", "said.err")):
    os.dup2(os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
os.chdir(folder)
os.environ.update(environment)
sys.argv[1:] = words
exec(program, {"__name__": "__main__"})
"""


class ForkingPython:
    """A Python that imports modules once, which takes seconds, and runs each program in a fork of itself.

    It has no threads, unlike the tests' own process, a fork of which may wait for one that did not come along. What
    the modules read from the environment while they are imported is the same for all programs.
    """

    def __init__(self, modules, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING, *modules],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program, words, folder, environment):
        """What subprocess.run([python, "-c", program, *words]) gives in a folder, with more in the environment."""
        job = (program, [*map(str, words)], str(folder), environment)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        said = (Path(folder, name).read_text() for name in ("said.out", "said.err"))
        return subprocess.CompletedProcess(program, code, *said)

    def close(self):
        self.process.communicate()
