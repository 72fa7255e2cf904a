"""The Hub's stand-in against the real client, each test in its own process."""

import json
import os
import random
import struct
import subprocess
import sys

import pytest
from hub_stand_in import HubStandIn

UPLOAD = """
from huggingface_hub import create_repo, upload_folder
repository = create_repo("model", private=True, exist_ok=True).repo_id
upload_folder(repo_id=repository, folder_path="result", ignore_patterns=["checkpoint-*", "logs/*"])
"""
READ_BACK = """
from pathlib import Path
from huggingface_hub import hf_hub_download, model_info, snapshot_download
print(sorted(file.rfilename for file in model_info("user/model").siblings))
print(Path(hf_hub_download("user/model", "a.safetensors")).read_bytes())
print(sorted(path.name for path in Path(snapshot_download("user/model")).iterdir()))
"""
CLEAN = """
from huggingface_hub import CommitOperationDelete, create_commit
operations = [CommitOperationDelete("a.txt"), CommitOperationDelete("folder/", is_folder=True)]
create_commit("user/model", operations=operations, commit_message="Clean")
"""
CREATE = "from huggingface_hub import create_repo; create_repo('model')"
FILES = {
    "README.md": b"---\nlicense: other\n---\n# A model\n",
    "weights.safetensors": random.Random(0).randbytes(300_000) + bytes(range(256)) * 100,  # of several chunks
    "floats.safetensors": b"".join(struct.pack("<f", 1 + n / 70_000) for n in range(70_000)),
    "images/0.png": b"\x89PNG and so on",
    "checkpoint-1/optimizer.bin": b"stays here",
    "logs/events": b"stays here",
}


@pytest.fixture
def hub():
    with HubStandIn() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Runs a program against the hub and returns the finished process."""

    def client(program, token=None, xet=False):
        environment = {**os.environ, **hub.environment(tmp_path / "home", token, xet)}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return client


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_upload_keeps_every_byte_and_leaves_out_what_is_ignored(hub, client, tmp_path, xet):
    for name, data in FILES.items():
        path = tmp_path / "result" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for _ in range(2):  # the second time the repository and the LFS objects are there already
        done = client(UPLOAD, xet=xet)
        assert done.returncode == 0, done.stderr
    assert bool(hub.xorbs) == xet
    repository = hub.repositories["user/model"]
    assert repository["private"]
    kept = {name: data for name, data in FILES.items() if not name.startswith(("checkpoint", "logs"))}
    uploaded = {name: data for name, data in repository["files"].items() if name != ".gitattributes"}
    assert uploaded == kept
    tokens = {token for method, path, token in hub.requests if not path.startswith(("/lfs", "/xet"))}
    assert tokens == {hub.token}


def test_files_read_back(hub, client):
    hub.add("user/model", {"a.safetensors": b"weights", "b.json": b"{}"})
    done = client(READ_BACK)
    assert done.stdout.splitlines() == ["['a.safetensors', 'b.json']", "b'weights'", "['a.safetensors', 'b.json']"]


def test_commit_deletes(hub, client):
    hub.add("user/model", {"a.txt": b"", "b.txt": b"", "folder/c.txt": b"", "folder.txt": b""})
    done = client(CLEAN)
    assert done.returncode == 0, done.stderr
    assert hub.repositories["user/model"]["files"].keys() == {"b.txt", "folder.txt"}
    assert hub.repositories["user/model"]["commits"] == ["Clean"]


@pytest.mark.parametrize(
    ("token", "status", "code", "error"),
    [
        pytest.param("hf_wrong", None, None, "401", id="wrong token"),
        pytest.param(None, 401, None, "401", id="401"),
        pytest.param(None, 403, None, "403", id="403"),
        pytest.param(None, 403, "GatedRepo", "GatedRepoError", id="gated"),
        pytest.param(None, 500, None, "500", id="500"),
    ],
)
def test_errors_reach_the_client(hub, client, token, status, code, error):
    if status:
        hub.fail("POST /api/repos/create", status, code)
    done = client(CREATE, token)
    assert done.returncode == 1
    assert error in done.stderr
    assert not hub.repositories


def test_no_answer_at_all(hub, client):
    hub.fail("POST /api/repos/create", None)
    done = client(CREATE)
    assert "RemoteProtocolError" in done.stderr


def test_requests_are_listed_in_order(hub, client):
    client(CREATE)
    client("from huggingface_hub import whoami; print(whoami()['name'])")
    assert [request for request in json.loads(json.dumps(hub.requests)) if "/api/agent" not in request[1]] == [
        ["POST", "/api/repos/create", hub.token],
        ["GET", "/api/whoami-v2", hub.token],
    ]
