"""A small stand-in for the Hugging Face Hub on localhost, strict about what the real one requires; faults to order.

Models and data sets, private or not; branches and commits; regular files and LFS objects (basic transfer, no Xet).
State is in memory. In a test: `with HubStandIn() as hub: ...`, then `hub.url` is what goes into HF_ENDPOINT. As a
script it serves until it is killed, and prints its address.
"""

import argparse
import base64
import binascii
import contextlib
import fnmatch
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.parquet", "*.arrow", "*.onnx", "*.npz", "*.zip", "*.pkl")
LARGEST_REGULAR_FILE = 10 * 1024 * 1024
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0", "openrail", "other"}
TASKS = {"image-classification", "image-feature-extraction", "text-classification"}
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,94}[A-Za-z0-9_]|[A-Za-z0-9_]")
REPOSITORY = r"(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
CODES = {401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 409: "Conflict", 413: "Payload Too Large"}


class Refusal(Exception):  # noqa: N818
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}
        self.body = {"error": message} if body is None else body


@dataclass
class Fault:
    """What goes wrong, and when.

    Attributes:
        path: Regular expression that is searched for in the request's path.
        method: None for any.
        status: Status to answer with, or None.
        message: Its error message.
        headers: Its headers.
        drop: `"before"` cuts the connection when the request has come (after `after_bytes` of its body), `"after"`
            does what was asked and cuts the connection instead of answering, `"close"` ends it in an orderly way.
        delay: Seconds to wait first.
        after_bytes: How much of the body is read before, or sent of the answer to a GET.
        skip: How many matching requests go well before.
        times: How often it happens.
    """

    path: str
    method: str | None = None
    status: int | None = None
    message: str = "something is wrong"
    headers: dict[str, str] = field(default_factory=dict)
    drop: str | None = None
    delay: float = 0.0
    after_bytes: int | None = None
    skip: int = 0
    times: int = 1_000_000


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        content = self.content
        if self.lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def size(self) -> int:
        return len(self.content)


@dataclass
class Commit:
    oid: str
    parent: str | None
    files: dict[str, Blob]
    title: str


@dataclass
class Repository:
    kind: str
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def add_commit(self, branch: str, files: dict[str, Blob], title: str) -> Commit:
        parent = self.branches.get(branch)
        listing = "".join(f"{path} {files[path].git_oid}\n" for path in sorted(files))
        text = f"{self.kind} {self.name} {parent} {title} {len(self.commits)}\n{listing}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, files, title)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[oid]


class HubStandIn:
    """The server and all it knows.

    Attributes:
        tokens: token -> (user, "read" or "write").
        repositories: (kind, "user/name") -> repository; kinds are "models" and "datasets".
        faults: What goes wrong.
        requests: Every request: `method`, `path` (with its query), `headers` (lower-case names), `size` of the body,
            `status` of the answer (0 for none).
    """

    def __init__(self, port: int = 0) -> None:
        self.tokens = {"hf_makerwrites": ("maker", "write"), "hf_makerreads": ("maker", "read")}
        self.tokens["hf_otherwrites"] = ("other", "write")
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        stand_in = self

        class BoundHandler(Handler):
            hub = stand_in

        self._server = Server(("127.0.0.1", port), BoundHandler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "HubStandIn":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            for connection in self.connections:
                # Some have ended.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections.clear()

    def fault(self, path: str, **options: Any) -> Fault:
        """Orders a fault; see `Fault`."""
        found = Fault(path, **options)
        with self.lock:
            self.faults.append(found)
        return found

    def create(self, name: str, *, kind: str = "models", private: bool = False) -> Repository:
        """Makes a repository, with its first commit."""
        repository = Repository(kind, name, private)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repository.add_commit("main", {".gitattributes": Blob(attributes.encode(), lfs=False)}, "initial commit")
        self.repositories[kind, name] = repository
        return repository

    def put(self, name: str, files: dict[str, bytes], *, kind: str = "datasets", private: bool = False) -> str:
        """Commits files to `main` past the network, in a repository that is made if need be; returns the commit."""
        repository = self.repositories.get((kind, name)) or self.create(name, kind=kind, private=private)
        blobs = {path: Blob(content, lfs=_is_lfs(path, content[:512], len(content))) for path, content in files.items()}
        repository.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
        return repository.add_commit("main", {**repository.at("main").files, **blobs}, "put").oid

    def files(self, name: str, revision: str = "main", *, kind: str = "models") -> dict[str, bytes]:
        """The files of a repository, but .gitattributes."""
        found = self.repositories[kind, name].at(revision).files
        return {path: blob.content for path, blob in found.items() if path != ".gitattributes"}

    def asked(self, pattern: str, method: str | None = None) -> list[dict[str, Any]]:
        """The requests whose path has the pattern."""
        return [
            request
            for request in self.requests
            if re.search(pattern, request["path"]) and method in (None, request["method"])
        ]


def _is_lfs(path: str, sample: bytes, size: int) -> bool:
    if size == 0:
        return False
    if size > LARGEST_REGULAR_FILE or any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], known) for known in LFS_PATTERNS):
        return True
    try:
        # The sample may end within a character.
        sample[: max(len(sample) - 3, 1)].decode("utf-8")
    except UnicodeDecodeError:
        return True
    return b"\0" in sample


class Server(ThreadingHTTPServer):
    """Serves; a client that hangs up is nothing to report."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError | ConnectionResetError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    ROUTES = (
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", rf"/api/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/api/{REPOSITORY}/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", rf"/api/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"/api/{REPOSITORY}/refs", "references"),
        ("GET", rf"/api/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
        ("GET", rf"/api/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<prefix>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/verify", "lfs_verify"),
        ("GET", r"/(?P<prefix>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("POST", r"/_stand_in/faults", "order_faults"),
        ("GET", r"/_stand_in/requests", "list_requests"),
    )

    # Requests and answers

    def setup(self) -> None:
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self) -> None:
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        self.entry = {"method": self.command, "path": self.path, "size": 0, "status": 0}
        self.entry["headers"] = {name.lower(): value for name, value in self.headers.items()}
        with self.hub.lock:
            self.hub.requests.append(self.entry)
        fault = self._fault()
        if fault is not None:
            # Not by sleeping, which tests replace.
            threading.Event().wait(fault.delay)
            if fault.drop in ("before", "close") and not (self.command == "GET" and fault.after_bytes):
                self._read(min(fault.after_bytes or 0, int(self.headers.get("Content-Length", 0))))
                self._cut(reset=fault.drop == "before")
                return
        self.body = self._read(int(self.headers.get("Content-Length", 0)))
        try:
            if fault is not None and fault.status is not None:
                raise Refusal(fault.status, fault.message, headers=fault.headers)
            if self.headers.get("Transfer-Encoding"):
                raise Refusal(501, "A header you provided implies functionality that is not implemented")
            status, body, headers = self._route()
        except Refusal as refusal:
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            status, body = refusal.status, refusal.body
            said = {"X-Error-Message": refusal.message} if refusal.message.isprintable() else {}
            headers = {**said, **code, **refusal.headers}
        if fault is not None and fault.drop == "after":
            self._cut(reset=True)
            return
        cut = fault.after_bytes if fault is not None and fault.drop and self.command == "GET" else None
        self._answer(status, body, headers, cut)

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.method not in (None, self.command) or not re.search(fault.path, self.path):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def _read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self.rfile.read(min(size, 1 << 16))):
            parts.append(part)
            size -= len(part)
            self.entry["size"] += len(part)
        return b"".join(parts)

    def _cut(self, *, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.flush()
        # Closing is not enough: reader and writer hold the socket too.
        self.rfile.close()
        if not reset:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def _answer(self, status: int, body: Any, headers: dict[str, str], cut: int | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.entry["status"] = status
        self.send_response(status, CODES.get(status))
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json; charset=utf-8")
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self._cut(reset=True)

    def _route(self) -> tuple[int, Any, dict[str, str]]:
        split = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        self.user, self.may_write = self._who()
        method = "GET" if self.command == "HEAD" else self.command
        for known, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, split.path)
            if known == method and match:
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "prefix" in match.groupdict():
                    found["kind"] = "datasets" if found.pop("prefix", None) else "models"
                if name in ("lfs_put", "order_faults", "list_requests"):
                    return getattr(self, name)(**found)
                with self.hub.lock:
                    return getattr(self, name)(**found)
        raise Refusal(404, f"Sorry, we can't find the page you are looking for: {method} {split.path}")

    def _who(self) -> tuple[str | None, bool]:
        given = self.headers.get("Authorization")
        if given is None:
            return None, False
        token = given.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        user, role = self.hub.tokens[token]
        return user, role == "write"

    def _json(self) -> dict[str, Any]:
        if "json" not in self.headers.get("Content-Type", ""):
            raise Refusal(400, "Content-Type must be application/json")
        try:
            found = json.loads(self.body)
        except ValueError as error:
            raise Refusal(400, f"Unexpected token in JSON: {error}") from None
        if not isinstance(found, dict):
            raise Refusal(400, "the body must be an object")
        return found

    def _repository(self, kind: str, repo: str, *, write: bool = False) -> Repository:
        found = self.hub.repositories.get((kind, repo))
        owner = repo.split("/")[0]
        if found is None or (found.private and self.user != owner):
            if self.user is None:
                raise Refusal(401, "Invalid username or password.", code="RepoNotFound")
            raise Refusal(404, "Repository not found", code="RepoNotFound")
        if write and self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and (self.user != owner or not self.may_write):
            raise Refusal(403, "Forbidden: pass a token that can write to this repository")
        return found

    # Accounts and repositories

    def who_am_i(self) -> tuple[int, Any, dict[str, str]]:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if self.may_write else "read"
        token = {"displayName": "token", "role": role}
        return 200, {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": token}}, {}

    def create_repository(self) -> tuple[int, Any, dict[str, str]]:
        wanted = self._json()
        kind = {"model": "models", "dataset": "datasets"}[wanted.get("type", "model")]
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = wanted.get("organization") or self.user
        name = f"{owner}/{wanted['name']}"
        if owner != self.user or not self.may_write:
            raise Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        if not NAME.fullmatch(wanted["name"]):
            raise Refusal(400, "Invalid repo name")
        address = f"{self.hub.url}/{'datasets/' * (kind == 'datasets')}{name}"
        if (kind, name) in self.hub.repositories:
            message = f"You already created this {kind[:-1]} repo: {name}"
            raise Refusal(409, message, body={"error": message, "url": address})
        self.hub.create(name, kind=kind, private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
        return 200, {"url": address, "name": name}, {}

    def create_branch(self, kind: str, repo: str, branch: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(kind, repo, write=True)
        start = repository.at(self._json().get("startingPoint", "main"))
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        if re.fullmatch(r"[0-9a-f]{40}", branch) or not re.fullmatch(r"[\w./-]+", branch):
            raise Refusal(400, "Invalid reference for a branch")
        repository.branches[branch] = start.oid
        return 201, {}, {}

    def references(self, kind: str, repo: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(kind, repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repository.branches.items()
        ]
        return 200, {"branches": branches, "converts": [], "tags": [], "pullRequests": []}, {}

    def info(self, kind: str, repo: str, revision: str = "main") -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(kind, repo)
        commit = repository.at(revision)
        sizes = self.query.get("blobs") in ("1", "true", "True")
        siblings = [
            {"rfilename": path} | ({"size": blob.size, "blobId": blob.git_oid} if sizes else {})
            for path, blob in sorted(commit.files.items())
        ]
        answer = {
            "_id": "0" * 24, "id": repo, "author": repo.split("/")[0], "sha": commit.oid, "private": repository.private,
            "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
            "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip
        return 200, answer | ({"modelId": repo} if kind == "models" else {}), {}

    # Files

    def _entry(self, path: str, blob: Blob) -> dict[str, Any]:
        entry = {"type": "file", "oid": blob.git_oid, "size": blob.size, "path": path}
        return entry | ({"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.lfs else {})

    def _folders(self, files: dict[str, Blob]) -> set[str]:
        parts = [path.split("/")[:-1] for path in files]
        return {"/".join(names[: end + 1]) for names in parts for end in range(len(names))}

    def tree(self, kind: str, repo: str, revision: str, path: str = "") -> tuple[int, Any, dict[str, str]]:
        files = self._repository(kind, repo).at(revision).files
        prefix = f"{path.rstrip('/')}/" if path else ""
        if path and not any(name.startswith(prefix) for name in files):
            raise Refusal(404, f"{path} does not exist on {revision!r}", code="EntryNotFound")
        deep = self.query.get("recursive") in ("1", "true", "True")
        folders = [
            {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
            for name in sorted(self._folders(files))
            if name.startswith(prefix) and (deep or "/" not in name[len(prefix) :])
        ]
        found = [
            self._entry(name, blob)
            for name, blob in sorted(files.items())
            if name.startswith(prefix) and (deep or "/" not in name[len(prefix) :])
        ]
        return 200, folders + found, {}

    def paths_info(self, kind: str, repo: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        files = self._repository(kind, repo).at(revision).files
        if "json" in self.headers.get("Content-Type", ""):
            wanted = self._json()["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        found = []
        for path in [wanted] if isinstance(wanted, str) else wanted:
            if path in files:
                found.append(self._entry(path, files[path]))
            elif path in self._folders(files):
                found.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        return 200, found, {}

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> tuple[int, Any, dict[str, str]]:
        commit = self._repository(kind, repo).at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", code="EntryNotFound", headers={"X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        tag = f'"{blob.sha256 if blob.lfs else blob.git_oid}"'
        headers = {"ETag": tag, "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream" if blob.lfs else "text/plain; charset=utf-8"
        headers["Content-Disposition"] = f'inline; filename="{path.rsplit("/", 1)[-1]}"'
        if blob.lfs:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": tag}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or self.command == "HEAD":
            return 200, blob.content, headers
        first, last = wanted.groups()
        start = int(first) if first else max(blob.size - int(last), 0)
        end = min(int(last) + 1, blob.size) if first and last else blob.size
        if start >= blob.size:
            raise Refusal(416, "Range Not Satisfiable")
        return 206, blob.content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{blob.size}"}

    # Uploads

    def preupload(self, kind: str, repo: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(kind, repo, write=True)
        commit = repository.at(revision)
        answer = []
        for file in self._json()["files"]:
            _check_path(file["path"])
            sample = base64.b64decode(file["sample"], validate=True)
            if len(sample) != min(file["size"], 512):
                raise Refusal(400, f"the sample of {file['path']} must be its first 512 bytes")
            entry: dict[str, Any] = {"path": file["path"], "shouldIgnore": False}
            entry["uploadMode"] = "lfs" if _is_lfs(file["path"], sample, file["size"]) else "regular"
            known = commit.files.get(file["path"])
            if known is not None:
                entry["oid"] = known.sha256 if known.lfs else known.git_oid
            answer.append(entry)
        return 200, {"files": answer, "commitOid": commit.oid}, {}

    def lfs_batch(self, kind: str, repo: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(kind, repo, write=True)
        if "application/vnd.git-lfs+json" not in self.headers.get("Accept", ""):
            raise Refusal(406, "Accept must be application/vnd.git-lfs+json")
        wanted = self._json()
        if wanted.get("operation") != "upload" or "basic" not in wanted.get("transfers", ["basic"]):
            raise Refusal(422, "only uploads, by the basic transfer")
        if wanted.get("hash_algo", "sha256") != "sha256":
            raise Refusal(409, "only sha256")
        repository.at(wanted.get("ref", {"name": "main"})["name"])
        objects = []
        for item in wanted["objects"]:
            oid, size = item["oid"], item["size"]
            if not re.fullmatch(r"[0-9a-f]{64}", oid) or not isinstance(size, int) or size < 1:
                raise Refusal(422, "an object needs its oid and size")
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in repository.objects:
                place = f"{self.hub.url}/lfs/{kind}/{repo}"
                upload = {"href": f"{place}/{oid}?size={size}&signature={_signature(oid, size)}"}
                entry |= {"authenticated": True, "actions": {"upload": upload, "verify": {"href": f"{place}/verify"}}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects, "hash_algo": "sha256"}, {}

    def lfs_put(self, kind: str, repo: str, oid: str) -> tuple[int, Any, dict[str, str]]:
        if "Authorization" in self.headers:
            raise Refusal(400, "only one way of authentication is allowed: the address is signed")
        if self.query.get("signature") != _signature(oid, int(self.query.get("size", -1))):
            raise Refusal(403, "SignatureDoesNotMatch")
        if len(self.body) != int(self.query["size"]) or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "XAmzContentSHA256Mismatch")
        with self.hub.lock:
            self.hub.repositories[kind, repo].objects[oid] = self.body
        return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def lfs_verify(self, kind: str, repo: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(kind, repo, write=True)
        wanted = self._json()
        if len(repository.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "object not found")
        return 200, {}, {}

    def commit(self, kind: str, repo: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(kind, repo, write=True)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        if self.headers.get("Content-Type") != "application/x-ndjson":
            raise Refusal(400, "Content-Type must be application/x-ndjson")
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            raise Refusal(400, "the first line must be the header, with a summary")
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repository.branches[revision]:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.at(revision).files)
        for line in lines[1:]:
            _apply(line["key"], line["value"], files, repository)
        if len(lines) == 1 or files == repository.at(revision).files:
            raise Refusal(400, "Your proposed changes are empty")
        if "README.md" in files:
            errors, _ = check_card(files["README.md"].content.decode("utf-8"))
            if errors:
                raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))
        commit = repository.add_commit(revision, files, lines[0]["value"]["summary"])
        url = f"{self.hub.url}/{'datasets/' * (kind == 'datasets')}{repo}/commit/{commit.oid}"
        return 200, {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}, {}

    def validate_card(self) -> tuple[int, Any, dict[str, str]]:
        wanted = self._json()
        if wanted.get("repoType") not in ("model", "dataset", "space") or not isinstance(wanted.get("content"), str):
            raise Refusal(400, "content and repoType are needed")
        errors, warnings = check_card(wanted["content"])
        answer = {kind: [{"message": text} for text in texts] for kind, texts in _named(errors, warnings)}
        return (400 if errors else 200), answer, {}

    # The stand-in itself

    def order_faults(self) -> tuple[int, Any, dict[str, str]]:
        with self.hub.lock:
            self.hub.faults = [Fault(**fault) for fault in json.loads(self.body)]
        return 200, {}, {}

    def list_requests(self) -> tuple[int, Any, dict[str, str]]:
        with self.hub.lock:
            return 200, self.hub.requests[:-1], {}


def _named(errors: list[str], warnings: list[str]) -> list[tuple[str, list[str]]]:
    return [("errors", errors), ("warnings", warnings)]


def _signature(oid: str, size: int) -> str:
    return hashlib.sha256(f"signed {oid} {size}".encode()).hexdigest()[:16]


def _check_path(path: str) -> None:
    parts = path.split("/")
    if not path or path.startswith("/") or any(part in ("", ".", "..", ".git") for part in parts):
        raise Refusal(400, f"Invalid path: {path}")


def _apply(key: str, value: dict[str, Any], files: dict[str, Blob], repository: Repository) -> None:
    """Makes one change of a commit."""
    path = value["path"]
    _check_path(path)
    if key == "file":
        if value.get("encoding") != "base64":
            raise Refusal(400, "encoding must be base64")
        try:
            content = base64.b64decode(value["content"], validate=True)
        except binascii.Error:
            raise Refusal(400, f"{path} is not base64") from None
        if len(content) > LARGEST_REGULAR_FILE or _is_lfs(path, content[:512], len(content)):
            raise Refusal(400, f"{path} must be uploaded as an LFS object")
        files[path] = Blob(content, lfs=False)
    elif key == "lfsFile":
        found = repository.objects.get(value["oid"])
        if value.get("algo") != "sha256" or found is None or len(found) != value.get("size", len(found)):
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = Blob(found, lfs=True)
    elif key == "deletedFile":
        if path not in files:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
        del files[path]
    else:
        raise Refusal(400, f"unknown operation {key}")


def check_card(text: str) -> tuple[list[str], list[str]]:
    """What the Hub has against a card's front matter: errors and warnings."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, flags=re.DOTALL)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        found = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not isinstance(found, dict):
        return ["metadata must be an object"], []
    errors = []
    texts = ("library_name", "pipeline_tag", "license", "license_name", "license_link", "thumbnail")
    errors += [f'"{key}" must be a string' for key in texts if not isinstance(found.get(key, ""), str)]
    if isinstance(found.get("license"), str) and found["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if found.get("license") == "other" and not found.get("license_name"):
        errors.append('"license_name" is required if "license" is "other"')
    if isinstance(found.get("pipeline_tag"), str) and found["pipeline_tag"] not in TASKS:
        errors.append(f'"pipeline_tag" must be one of {sorted(TASKS)}')
    for key in ("tags", "language", "datasets", "base_model", "metrics"):
        values = found.get(key, [])
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) and value for value in values):
            errors.append(f'"{key}" must be a string or a list of strings')
        elif key in ("datasets", "base_model"):
            errors += [f'"{key}" with value "{v}" is not valid' for v in values if not _is_repository(v)]
        elif key == "language":
            errors += [f'"{key}" must be an ISO 639 code' for v in values if not re.fullmatch(r"[a-z]{2,3}|code", v)]
    emissions = found.get("co2_eq_emissions", 0)
    if isinstance(emissions, dict):
        emissions = emissions.get("emissions")
    if not isinstance(emissions, int | float) or isinstance(emissions, bool):
        errors.append('"co2_eq_emissions" must be a number, or have a number "emissions"')
    for number, example in enumerate(found.get("widget", [])):
        if not isinstance(example, dict) or not isinstance(example.get("src", ""), str):
            errors.append(f'"widget[{number}]" must be an object with "src"')
    return errors + _check_index(found.get("model-index", [])), []


def _is_repository(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(NAME.fullmatch(part) for part in parts)


def _check_index(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        here = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model["name"]:
            errors.append(f'"{here}.name" is required')
            continue
        if not isinstance(model.get("results"), list):
            errors.append(f'"{here}.results" must be an array')
            continue
        for j, result in enumerate(model["results"]):
            where = f"{here}.results[{j}]"
            if not isinstance((result.get("task") or {}).get("type"), str):
                errors.append(f'"{where}.task.type" is required')
            for key in ("type", "name"):
                if not isinstance((result.get("dataset") or {}).get(key), str):
                    errors.append(f'"{where}.dataset.{key}" is required')
            for number, metric in enumerate(result.get("metrics") or [{}]):
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    errors.append(f'"{where}.metrics[{number}]" needs type and value')
                elif isinstance(metric["value"], float) and metric["value"] != metric["value"]:
                    errors.append(f'"{where}.metrics[{number}].value" must not be NaN')
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    with HubStandIn(parser.parse_args().port) as running:
        print(running.url, flush=True)
        threading.Event().wait()
