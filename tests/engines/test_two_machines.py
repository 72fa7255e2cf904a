"""Two process groups with their own addresses on the loopback, as on two machines; and a process that refuses.

How the others end where one dies is in test_one_process_alone.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import psutil
import pytest
from conftest import SCRIPTS

pytestmark = pytest.mark.slow
# Nothing is compiled here: what PyTorch would import for that takes each process a second.
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "TORCHDYNAMO_DISABLE": "1"}


ALIAS = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


def machines(folder):
    """A prefix for the commands of each of two machines, with a name and an address of its own on the loopback."""
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.0.2 first\n127.0.0.3 second\n")
    prefixes = [["unshare", "--uts", "--mount", "sh", "-c", ALIAS, name, str(hosts)] for name in ("first", "second")]
    if shutil.which("unshare") is None or subprocess.run([*prefixes[0], "true"], check=False).returncode:
        pytest.skip("a host name of one's own takes unshare, and the right to use it")
    return prefixes


def listening():
    """Addresses that this machine's processes listen on."""
    return {connection.laddr.ip for connection in psutil.net_connections("tcp4") if connection.status == "LISTEN"}


def test_two_machines_are_one_run(argv, tmp_path):
    """Launched on each machine by the command of the README: a process each, and a checkpoint of two."""
    port, started, addresses = processes.free_port(), [], set()
    for rank, prefix in enumerate(machines(tmp_path)):
        command = [*prefix, sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        command += ["--num_machines", "2", "--machine_rank", str(rank), "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--main_process_ip", "127.0.0.2", "--main_process_port", str(port)]
        flags = argv(output_dir=tmp_path / "out", max_train_steps=2, checkpointing_steps=2)
        started.append(
            subprocess.Popen(
                [*command, str(SCRIPTS["lora"]), *flags],
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    with ThreadPoolExecutor() as pool:
        texts = [pool.submit(process.communicate, timeout=300) for process in started]
        while not all(text.done() for text in texts):
            addresses |= listening()
            time.sleep(0.1)
    said = [text.result()[0] for text in texts]
    assert [process.returncode for process in started] == [0, 0], said
    assert {"127.0.0.2", "127.0.0.3"} <= addresses
    manifest = json.loads(Path(tmp_path, "out/checkpoint-2/dreambooth.json").read_text())
    assert manifest["run"]["processes"] == 2
    assert ["The result is in" in text for text in said] == [True, False]
    assert ["Training: 100%" in text for text in said] == [True, False]
    assert [line for line in said[1].splitlines() if line.startswith("INFO") or "%|" in line or "it/s" in line] == []


REFUSING = f"""
import os, sys, time
from pathlib import Path

text = Path({str(SCRIPTS["lora"])!r}).read_text()
script = {{"__name__": "script"}}
exec(text[: text.index("import huggingface_hub")], script)  # what comes before the imports that take seconds

who = sys.argv[1]
Path(f"{{who}} {{os.environ['RANK']}}").touch()
while len(list(Path().glob(f"{{who}} *"))) < 2:  # on a busy machine one has imported long before the other
    time.sleep(0.01)
wait = time.sleep
if who == "01":  # two seconds are ten here: a busy machine takes long to end a process
    time.sleep = lambda seconds: wait(5 * seconds)
if os.environ["RANK"] in who:
    script["refuse"]("no")
wait(30)
"""


def test_a_refusal_is_said_once(tmp_path):
    """By a process that alone refuses, and by the first one where all do: the launcher ends the others before."""
    path = tmp_path / "refusing.py"
    path.write_text(REFUSING)
    launched = []
    for who in ("1", "01"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", path, who]
        launched.append(subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True))
    for launcher in launched:
        _, said = launcher.communicate(timeout=100)
        assert said.count("refusing.py: error: no\n") == 1
