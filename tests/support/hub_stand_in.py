"""A Hugging Face Hub on the loopback: what create_repo, upload_folder, model_info and hf_hub_download talk to.

It records every request and every byte, refuses a wrong token, and fails on demand. huggingface_hub reads its settings
when it is imported, so a client must be a separate process, started with `HubStandIn.environment`:

    with HubStandIn() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})
    hub.repositories["user/model"]["files"]["README.md"]
"""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import xet_store

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """The server. `repositories` maps an id to {"private": bool, "files": {path: bytes}, "commits": [summary]}.

    `requests` lists (method, path, token) in the order they came; a token is None where none was sent.
    """

    def __init__(self, token="hf_stand_in", user="user", port=0):
        self.token, self.user = token, user
        self.repositories, self.requests, self.faults = {}, [], []
        self.objects, self.xorbs = {}, {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=None, xet=False):
        """Variables of a client: this hub, a token ("" for none), and a Hugging Face home that is its own.

        Large files travel by xet, the client's choice wherever hf_xet is there, or as LFS objects.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": str(int(not xet)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def add(self, repository, files, private=False):
        """Puts a repository there beforehand."""
        self.repositories[repository] = {"private": private, "files": dict(files), "commits": []}

    def fail(self, pattern, status, error_code=None):
        """Answers requests whose "METHOD /path" matches `pattern` with `status`, or with nothing where that is None.

        `error_code` is the Hub's own name for it, such as GatedRepo with 403.
        """
        self.faults.append((re.compile(pattern), status, error_code))


class _Handler(BaseHTTPRequestHandler):
    """One request. The routes stand in a table; what a route returns is sent as JSON, or raw where it is bytes."""

    protocol_version = "HTTP/1.1"
    hub = None
    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/models/(?P<repository>[^/]+/[^/]+)(/revision/[^/]+)?", "info"),
        ("GET", r"/api/models/(?P<repository>[^/]+/[^/]+)/tree/[^/]+", "tree"),
        ("GET", r"/api/models/(?P<repository>[^/]+/[^/]+)/auth-check(/write)?", "allow"),
        ("POST", r"/api/models/(?P<repository>[^/]+/[^/]+)/preupload/[^/]+", "preupload"),
        ("POST", r"/api/models/(?P<repository>[^/]+/[^/]+)/commit/[^/]+", "commit"),
        ("POST", r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "store"),
        ("GET", r"/api/models/(?P<repository>[^/]+/[^/]+)/xet-write-token/[^/]+", "permit"),
        ("POST", r"/xet/v1/xorbs/[^/]+/(?P<name>[0-9a-f]{64})", "store_xorb"),
        ("POST", r"/xet(?:/v1)?/shards", "store_shard"),
        ("HEAD|GET", r"/(?P<repository>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)", "resolve"),
    )

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, path, token))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        for pattern, status, code in self.hub.faults:
            if pattern.search(f"{self.command} {path}"):
                return self.send_error_code(status, code)
        for methods, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                if not name.startswith("store") and token != self.hub.token:  # an upload has a permit of its own
                    return self.send_error_code(401, None)
                return self.answer(name, match.groupdict())
        return self.send_error_code(404, None)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, name, found):
        repository = found.get("repository")
        if repository is not None:
            if repository not in self.hub.repositories:
                return self.send_error_code(404, "RepoNotFound")
            found["repository"] = self.hub.repositories[repository]
            found["name"] = repository
        return getattr(self, name)(**found)

    def read_chunks(self):
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error_code(self, status, code):
        if status is None:
            self.close_connection = True
            return
        headers = {"X-Error-Message": f"the stand-in answers {status}"} | ({"X-Error-Code": code} if code else {})
        self.send({"error": headers["X-Error-Message"]}, status, headers)

    def log_message(self, *args):
        """Nothing: a test reads `requests`."""

    def whoami(self):
        self.send({"type": "user", "name": self.hub.user, "fullname": self.hub.user, "orgs": [], "auth": {}})

    def validate(self):
        self.send({"errors": [], "warnings": []})

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repositories:
            return self.send({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(name, {}, private)
        return self.send({"url": url, "name": name})

    def allow(self, repository, name):
        self.send({})

    def info(self, repository, name):
        asked = "blobs=" in self.path  # sizes are told to those who ask
        files = sorted(repository["files"].items())
        siblings = [{"rfilename": path} | ({"size": len(data)} if asked else {}) for path, data in files]
        self.send({"id": name, "sha": COMMIT, "private": repository["private"], "siblings": siblings, "tags": []})

    def tree(self, repository, name):
        files = sorted(repository["files"].items())
        self.send([{"type": "file", "path": path, "size": len(data), "oid": COMMIT} for path, data in files])

    def preupload(self, repository, name):
        """Which files travel inside the commit, and which as LFS objects: the Hub's rule, by size and by ending."""
        large = (".safetensors", ".bin", ".png", ".jpg", ".pt", ".model")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(large) or file["size"] > 10_000_000 else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send({"files": files})

    def batch(self, repository, name):
        """How large files travel: by xet where the client offers it, as the Hub chooses. Newer clients do not ask."""
        asked = json.loads(self.body)
        if "xet" in asked.get("transfers", ()):
            return self.send({"transfer": "xet", "objects": asked["objects"]})
        objects = [
            {"oid": item["oid"], "size": item["size"]}
            | ({} if item["oid"] in self.hub.objects else self.upload_action(item["oid"]))
            for item in asked["objects"]
        ]
        return self.send({"transfer": "basic", "objects": objects})

    def upload_action(self, oid):
        return {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{oid}"}}}

    def store(self, oid):
        self.hub.objects[oid] = self.body
        self.send({})

    def permit(self, repository, name):
        """Where to send xet's blocks, and a token until so many seconds since 1970: in the body and in headers."""
        url, until = f"{self.hub.endpoint}/xet", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": until}
        self.send({"casUrl": url, "accessToken": "xet", "exp": until}, headers=headers)

    def store_xorb(self, name):
        self.hub.xorbs[name] = self.body
        self.send({"was_inserted": True})

    def store_shard(self):
        self.hub.objects.update(xet_store.read_files(self.body, self.hub.xorbs))
        self.send({"result": 1})

    def commit(self, repository, name):
        """Applies the lines of a commit in order."""
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            files, path = repository["files"], value.get("path")
            if key == "header":
                repository["commits"].append(value["summary"])
            elif key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[path] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(path, None)
            elif key == "deletedFolder":
                repository["files"] = {name: data for name, data in files.items() if not name.startswith(path)}
        self.send({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def resolve(self, repository, name, path):
        if path not in repository["files"]:
            return self.send_error_code(404, "EntryNotFound")
        data = repository["files"][path]  # the client keeps one file an ETag
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.send(data, headers={"ETag": etag, "X-Repo-Commit": COMMIT})
