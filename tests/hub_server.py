"""The Hub's endpoints for models on loopback: repositories, branches, commits, large files, downloads.

A real HTTP server, which huggingface_hub and transformers speak to as they do to the Hub. It can refuse, break off or
forget, as the Hub does on bad days: see `HubServer.faults`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import ModelCardData

TOKEN, USER = "hf_valid", "someone"
_NAME = re.compile(r"^(?!.*(?:--|\.\.))[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?$")
_LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    """Branches, each a list of commits `(message, files)`; a file is its bytes."""

    private: bool
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch, or of a commit by its sha."""
        for commits in self.branches.values():
            for number, (_, files) in enumerate(commits):
                if self.sha(files, number) == revision:
                    return files
        return self.branches[revision][-1][1]

    def head(self, revision: str) -> str:
        """The sha of a branch's last commit, or the revision itself if it is one."""
        commits = self.branches.get(revision)
        return revision if commits is None else self.sha(commits[-1][1], len(commits) - 1)

    @staticmethod
    def sha(files: dict[str, bytes], number: int) -> str:
        """A commit's name."""
        contents = [(name, blob_id(data)) for name, data in sorted(files.items())]
        return hashlib.sha1(repr((number, contents)).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """
    The server and what it holds.

    Attributes:
        repositories (`dict`): By `user/name`.
        large (`dict`): Bytes of uploaded large files by their SHA-256, whether or not they were committed.
        requests (`list`): `(method, path)` of every request.
        faults (`list`): `(method, pattern, status, message, error code)`: what the next such request
            gets instead of an answer, once each; status None breaks the connection off, 200 sends the message.
        longest_file (`int`): Bytes of the largest file that is within the quota.
        slow (`tuple`): `(method, pattern, seconds)`: what such requests wait for.
        datasets (`dict`): The metadata of data sets' cards by `user/name`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple] = []
        self.longest_file = 1 << 30
        self.datasets: dict[str, dict] = {}
        self.slow: tuple[str, str, float] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home) -> dict[str, str]:
        """What a process needs to take it for the Hub."""
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def uploads(self) -> int:
        """How many large files were sent so far."""
        return sum(method == "PUT" for method, _ in self.requests)


@contextmanager
def running_hub():
    """A [`HubServer`] that answers."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def blob_id(data: bytes) -> str:
    """What git calls a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class _Answered(Exception):
    """What is sent instead of the Hub's answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        """Nothing is printed."""

    def _answer(self):
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, unquote(path)))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._fail_as_asked(path)
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    answer(self, body, *map(unquote, match.groups()))
                    return
            raise _Refused(404, f"no such endpoint: {self.command} {path}")
        except _Refused as refusal:
            self._send(refusal.status, {"error": str(refusal)}, {"X-Error-Code": refusal.code} if refusal.code else {})
        except _Answered as answer:
            self._send(200, *answer.args)
        except ConnectionAbortedError:
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _fail_as_asked(self, path: str):
        if self.server.slow is not None:
            method, pattern, seconds = self.server.slow
            if method == self.command and re.search(pattern, path):
                time.sleep(seconds)
        for fault in list(self.server.faults):
            method, pattern, status, message, code = fault
            if method == self.command and re.search(pattern, path):
                self.server.faults.remove(fault)
                if status is None:
                    raise ConnectionAbortedError
                if status == 200:
                    raise _Answered(message)
                raise _Refused(status, message, code)

    def _send(self, status: int, content, headers: dict | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if isinstance(content, dict) and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _authorized(self) -> bool:
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            raise _Refused(401, "Invalid credentials in Authorization header")
        return token is not None

    def _writer(self):
        if not self._authorized():
            raise _Refused(401, "Invalid username or password.")

    def _repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._authorized()):
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return repository

    def _files(self, name: str, revision: str) -> dict[str, bytes]:
        try:
            return self._repository(name).files(revision)
        except KeyError:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    def whoami(self, body):
        self._writer()
        self._send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body):
        self._writer()
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            raise _Refused(
                403, f'You don\'t have the rights to create a model under the namespace "{name.split("/")[0]}"'
            )
        if not _NAME.fullmatch(asked["name"]):
            raise _Refused(400, f"Invalid name: {asked['name']}")
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            self._send(409, {"error": "You already created this model repo", "url": url})
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = Repository(
            bool(private), {"main": [("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})]}
        )
        self._send(200, {"url": url, "name": name, "id": name})

    def validate_yaml(self, body):
        """Refuses metadata that huggingface_hub's own classes cannot read."""
        errors = []
        content = json.loads(body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            data = ModelCardData(**yaml.safe_load(head.group(1)), ignore_metadata_errors=False)
            if data.eval_results is not None and not data.model_name:
                errors.append({"message": '"model-index[0].name" is required'})
        except Exception as error:
            errors.append({"message": str(error)})
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def information(self, body, name, revision="main"):
        repository = self._repository(name)
        files = self._files(name, revision)
        self._send(200, {
            "id": name, "modelId": name, "private": repository.private, "sha": repository.head(revision),
            "siblings": [{"rfilename": file} for file in files], "tags": [], "downloads": 0, "likes": 0,
        })  # fmt: skip

    def dataset(self, body, name):
        if name not in self.server.datasets:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        self._send(200, {"id": name, "cardData": self.server.datasets[name], "tags": []})

    def tree(self, body, name, revision):
        entries = [
            {"type": "file", "path": file, "size": len(data), "oid": blob_id(data)}
            for file, data in self._files(name, revision).items()
        ]
        self._send(200, entries)

    def branch(self, body, name, branch):
        self._writer()
        repository = self._repository(name)
        if branch in repository.branches:
            raise _Refused(409, f"Reference already exists: {branch}")
        repository.branches[branch] = list(repository.branches["main"])
        self._send(200, {})

    def delete_branch(self, body, name, branch):
        self._writer()
        del self._repository(name).branches[branch]
        self._send(200, {})

    def refs(self, body, name):
        repository = self._repository(name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": repository.head(branch)}
            for branch in repository.branches
        ]
        self._send(200, {"branches": branches, "converts": [], "tags": []})

    def preupload(self, body, name, revision):
        self._writer()
        files = self._files(name, revision)
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _known_id(files.get(file["path"]), file["path"]),
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": answers})

    def batch(self, body, name):
        self._writer()
        self._repository(name)
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["size"] > self.server.longest_file:
                entry["error"] = {"code": 422, "message": "Storage limit reached"}
            elif asked["oid"] not in self.server.large:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{asked['oid']}"}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the bytes are not those of the checksum")
        self.server.large[oid] = body
        self._send(200, {})

    def commit(self, body, name, revision):
        self._writer()
        files = dict(self._files(name, revision))
        message = ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repository = self._repository(name)
        repository.branches[revision].append((message, files))
        oid = repository.head(revision)
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def resolve(self, body, name, revision, file):
        files = self._files(name, revision)
        if file not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        head = self._repository(name).head(revision)
        self._send(
            200, files[file], {"ETag": f'"{blob_id(files[file])}"', "X-Repo-Commit": head, "Accept-Ranges": "none"}
        )


def _known_id(data: bytes | None, path: str) -> str | None:
    """A stored file's name as the Hub tells it: the SHA-256 of a large one, git's of another."""
    if data is None:
        return None
    return hashlib.sha256(data).hexdigest() if path.endswith(_LARGE) else blob_id(data)


_ID = r"([^/]+/[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"/api/models/{_ID}", _Handler.information),
    ("GET", f"/api/datasets/{_ID}", _Handler.dataset),
    ("GET", f"/api/models/{_ID}/revision/(.+)", _Handler.information),
    ("GET", f"/api/models/{_ID}/tree/([^/]+)(?:/.*)?", _Handler.tree),
    ("GET", f"/api/models/{_ID}/refs", _Handler.refs),
    ("POST", f"/api/models/{_ID}/branch/(.+)", _Handler.branch),
    ("DELETE", f"/api/models/{_ID}/branch/(.+)", _Handler.delete_branch),
    ("POST", f"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/large/([0-9a-f]{64})", _Handler.store),
    (("GET", "HEAD"), f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]  # fmt: skip
