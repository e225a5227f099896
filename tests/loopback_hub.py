"""A Hub on this machine: what of the Hub's HTTP protocol releasing and loading use, for tests with the real client.

The client asks, in this order (models only; REV is a quoted branch or commit):

    release   GET  /api/whoami-v2
              POST /api/repos/create                      409 where it exists
              POST /api/models/ID/branch/REV              where another branch than main is pushed to
              GET  /api/models/ID/tree/REV?recursive=true
              POST /api/validate-yaml                     the card
              POST /api/models/ID/preupload/REV           which files are large, and which are there already
              POST /ID.git/info/lfs/objects/batch         where the large ones go; nowhere if they are known
              PUT  /storage/SHA256[/PART]                 the bytes, without the token; POST completes many parts
              GET  /api/models/ID/xet-write-token/REV     instead of these two where hf_xet uploads
              POST /api/models/ID/commit/REV              JSON lines: header, file, lfsFile, deletedFile
    loading   GET  /api/models/ID[/revision/REV]          files and commit
              GET  /api/models/ID/tree/REV
              HEAD /ID/resolve/REV/PATH, then GET         ETag, X-Repo-Commit, Content-Length
    if not    GET  /api/models/ID/auth-check, /api/models/ID/refs

With `xet_folder`, hf_xet stores large files there in its own format, as it does on the Hub's servers; without it a
client must set HF_HUB_DISABLE_XET, which makes it upload them by the protocol of Git LFS.

What is refused is told by X-Error-Code and X-Error-Message, as the Hub does. `faults` makes any request fail as
networks and servers do.
"""

import base64
import hashlib
import json
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENCES = ("apache-2.0", "mit", "cc-by-nc-4.0", "cc0-1.0", "openrail", "other", "unknown")
"""Some of those that the Hub knows."""

PART_SIZE = 2_000_000
"""Larger files are uploaded in parts of so many bytes."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit."""

    content: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        """What git calls it; of a large file, git holds a pointer."""
        content = self.content
        if self.is_large:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            content = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_oid


@dataclass
class Repository:
    """A model: commits by their hash, and where its branches stand."""

    private: bool = False
    gated: bool = False
    allowed: set[str] = field(default_factory=set)
    """Users who have accepted the terms of a gated one."""
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, StoredFile], message: str) -> str:
        """Puts files as the newest commit of a branch; returns its hash."""
        text = json.dumps([message, len(self.commits), sorted((name, file.etag) for name, file in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return {name: file.content for name, file in self.commits[self.branches[revision]].items()}


@dataclass
class Fault:
    """What happens to requests instead of an answer.

    Attributes:
        method: Of the requests, such as "PUT".
        path: Pattern that their paths hold.
        times: How many of them.
        status: Answer with this status; None: the connection is cut.
        message: Answer with these words.
        after_bytes: Cut the connection after reading so many bytes of the body.
        when_done: Do what is asked, and cut the connection instead of answering.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    after_bytes: int | None = None
    when_done: bool = False


@dataclass(frozen=True)
class Asked:
    """A request: what was asked by whom, and the status of the answer; None where there was none."""

    method: str
    path: str
    token: str | None
    status: int | None


class Refusal(Exception):
    """An answer other than what was asked for."""

    def __init__(self, status: int, code: str, message: str, **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.more = status, code, message, more


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that were killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class LoopbackHub:
    """The server, with everything that it was given and asked; `with LoopbackHub() as hub` runs it.

    Attributes:
        tokens: Users and roles ("read", "write") by token.
        repositories: By "owner/name".
        blobs: Uploaded large files by SHA-256.
        asked: All requests.
        xet_folder: Where hf_xet stores large files; None: it cannot.
        faults: What is to go wrong; a fault is gone once it has happened `times` times.
    """

    def __init__(self) -> None:
        self.tokens = {
            "hf_write": ("alice", "write"),
            "hf_read": ("alice", "read"),
            "hf_other": ("bob", "write"),
        }
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []
        self.xet_folder: Path | None = None
        self.lock = threading.RLock()
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), name="hub", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repository:
        """A new model with the Hub's first commit."""
        repository = Repository(private, gated)
        repository.commit("main", {".gitattributes": StoredFile(b"*.safetensors filter=lfs\n", False)}, "initial")
        self.repositories[repo_id] = repository
        return repository

    def times_asked(self, method: str, path: str) -> int:
        """How many requests had this method and a path with this pattern in it."""
        return sum(each.method == method and re.search(path, each.path) is not None for each in self.asked)

    def fault_of(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets, which has happened once more then."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    if not fault.times:
                        self.faults.remove(fault)
                    return fault
        return None


@contextmanager
def running_hub() -> Iterator[LoopbackHub]:
    """A Hub that ends with its block."""
    with LoopbackHub() as hub:
        yield hub


Route = Callable[["_Handler", Any], None]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, path: str) -> Callable[[Route], Route]:
    """Registers what answers a method and a path; `{id}` is a model, `{rev}` a revision."""
    pattern = path.replace("{id}", r"(?P<id>[\w.-]+/[\w.-]+)").replace("{rev}", r"(?P<rev>[^/]+)")

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(f"^{pattern}$"), function))
        return function

    return register


def _handler(the_hub: LoopbackHub) -> type["_Handler"]:
    class Handler(_Handler):
        hub = the_hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub
    query: dict[str, list[str]]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Says nothing: the tests look at `asked`."""

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    # What every request goes through

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        self.answered: int | None = None
        fault = self.hub.fault_of(self.command, path)
        try:
            if fault is None:
                self.body = self.read_body()
                self.dispatch(path)
            elif fault.status is not None:
                self.read_body()
                self.send(fault.status, {"error": fault.message})
            else:
                self.lose(fault, path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.hub.asked.append(Asked(self.command, path, self.token, self.answered))

    def lose(self, fault: Fault, path: str) -> None:
        """Cuts the connection: at once, in the middle of the body, or when all is done."""
        if fault.when_done:
            self.body = self.read_body()
            self.send = lambda *_, **__: None  # type: ignore[method-assign]
            self.dispatch(path)
        elif fault.after_bytes is not None:
            self.rfile.read(fault.after_bytes)
        self.close_connection = True
        self.connection.close()

    def dispatch(self, path: str) -> None:
        for method, pattern, function in ROUTES:
            found = pattern.match(path)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                try:
                    with self.hub.lock:
                        function(self, {name: unquote(value) for name, value in found.groupdict("").items()})
                except Refusal as refusal:
                    headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                    self.send(refusal.status, {"error": refusal.message, **refusal.more}, headers)
                return
        self.send(404, {"error": f"Sorry, we can't find the page you are looking for: {path}"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, answer: object = None, headers: dict[str, str] | None = None) -> None:
        """Answers with JSON, or bytes as they are."""
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.answered = status
        self.send_response(status)
        if not isinstance(answer, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks, and for what

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    def user(self) -> tuple[str, str] | None:
        """Name and role; None for a stranger."""
        if self.token is None:
            return None
        if self.token not in self.hub.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[self.token]

    def writer(self, owner: str) -> str:
        """The name of who may write to what is `owner`'s."""
        user = self.user()
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        name, role = user
        if role != "write" or name != owner:
            raise Refusal(403, "", "You don't have the rights to create a model under the namespace " + repr(owner))
        return name

    def repository(self, repo_id: str) -> Repository:
        """A model that the asker may know of."""
        repository, user = self.hub.repositories.get(repo_id), self.user()
        owner = repo_id.split("/")[0]
        if repository is None or (repository.private and (user is None or user[0] != owner)):
            status, message = (401, "Invalid username or password.") if user is None else (404, "Repository not found")
            raise Refusal(status, "RepoNotFound", message)
        return repository

    def readable(self, repo_id: str) -> Repository:
        """A model whose files the asker may read."""
        repository, user = self.repository(repo_id), self.user()
        if repository.gated and (user is None or user[0] not in {repo_id.split("/")[0], *repository.allowed}):
            words = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise Refusal(401 if user is None else 403, "GatedRepo", words)
        return repository

    def writable(self, repo_id: str) -> Repository:
        """A model that the asker may change."""
        repository = self.repository(repo_id)
        self.writer(repo_id.split("/")[0])
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def json(self) -> Any:
        return json.loads(self.body)


@route("GET", "/api/whoami-v2")
def whoami(request: _Handler, _: Any) -> None:
    user = request.user()
    if user is None:
        raise Refusal(401, "", "Invalid username or password.")
    request.send(200, {"type": "user", "name": user[0], "auth": {"accessToken": {"role": user[1]}}})


@route("POST", "/api/repos/create")
def create_repository(request: _Handler, _: Any) -> None:
    wanted, user = request.json(), request.user()
    owner = wanted.get("organization") or (user[0] if user else "")
    request.writer(owner)
    repo_id = f"{owner}/{wanted['name']}"
    if repo_id in request.hub.repositories:
        raise Refusal(409, "", "You already created this model repo", url=f"{request.hub.url}/{repo_id}")
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    request.hub.create(repo_id, private=private)
    request.send(200, {"url": f"{request.hub.url}/{repo_id}", "name": repo_id, "id": "0"})


@route("POST", "/api/validate-yaml")
def validate_card(request: _Handler, _: Any) -> None:
    block = re.match(r"^---\n(.*?)\n---", request.json()["content"], re.DOTALL)
    data = yaml.safe_load(block[1]) if block else {}
    errors = []
    if data.get("license", "mit") not in LICENCES:
        errors.append(f'"license" must be one of [{", ".join(LICENCES)}]')
    for model in data.get("model-index", []):
        for result in model["results"]:
            lacks = {"task", "dataset", "metrics"} - set(result)
            errors += [f'"model-index[0].results[0].{part}" is required' for part in lacks]
            errors += ['"metrics.type" is required' for metric in result["metrics"] if "type" not in metric]
    answer = {"errors": [{"message": error} for error in errors], "warnings": []}
    request.send(400 if errors else 200, answer)


@route("POST", "/api/models/{id}/branch/{rev}")
def create_branch(request: _Handler, found: Any) -> None:
    repository = request.writable(found["id"])
    if found["rev"] in repository.branches:
        raise Refusal(409, "", "Reference already exists")
    repository.branches[found["rev"]] = repository.branches["main"]
    request.send(200, {})


@route("POST", "/api/models/{id}/preupload/{rev}")
def preupload(request: _Handler, found: Any) -> None:
    repository = request.writable(found["id"])
    known = repository.commits[request.commit_of(repository, found["rev"])]
    files = []
    for file in request.json()["files"]:
        is_large = file["path"].endswith(".safetensors") or b"\0" in base64.b64decode(file["sample"])
        there = known.get(file["path"])
        mode = "lfs" if is_large else "regular"
        oid = there.etag if there else None
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    request.send(200, {"files": files})


@route("POST", "/{id}.git/info/lfs/objects/batch")
def large_files(request: _Handler, found: Any) -> None:
    request.writable(found["id"])
    objects: list[dict[str, Any]] = []
    for wanted in request.json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in request.hub.blobs:
            place = f"{request.hub.url}/storage/{oid}"
            upload: dict[str, Any] = {"href": f"{place}?X-Amz-Signature=secret"}
            if size > PART_SIZE:
                count = -(-size // PART_SIZE)
                upload["header"] = {"chunk_size": str(PART_SIZE)}
                upload["header"] |= {f"{part:05}": f"{place}/{part}?X-Amz-Signature=secret" for part in range(count)}
            answer["actions"] = {"upload": upload}
        objects.append(answer)
    request.send(200, {"transfer": "basic", "objects": objects})


@route("PUT", "/storage/(?P<oid>[0-9a-f]+)")
def store(request: _Handler, found: Any) -> None:
    assert request.token is None, "the storage must not see the token"
    if hashlib.sha256(request.body).hexdigest() != found["oid"]:
        raise Refusal(400, "", "other bytes than were announced")
    request.hub.blobs[found["oid"]] = request.body
    request.send(200, {})


@route("PUT", "/storage/(?P<oid>[0-9a-f]+)/(?P<part>[0-9]+)")
def store_part(request: _Handler, found: Any) -> None:
    assert request.token is None, "the storage must not see the token"
    request.hub.parts[found["oid"], int(found["part"])] = request.body
    request.send(200, {}, {"ETag": hashlib.md5(request.body).hexdigest()})


@route("POST", "/storage/(?P<oid>[0-9a-f]+)")
def complete(request: _Handler, found: Any) -> None:
    content = b""
    for part in request.json()["parts"]:
        chunk = request.hub.parts.pop((found["oid"], part["partNumber"] - 1))
        if hashlib.md5(chunk).hexdigest() != part["etag"]:
            raise Refusal(400, "", "another part than was stored")
        content += chunk
    if hashlib.sha256(content).hexdigest() != found["oid"]:
        raise Refusal(400, "", "other bytes than were announced")
    request.hub.blobs[found["oid"]] = content
    request.send(200, {})


@route("GET", "/api/models/{id}/xet-write-token/{rev}")
def xet_token(request: _Handler, found: Any) -> None:
    request.writable(found["id"])
    if request.hub.xet_folder is None:
        raise Refusal(404, "", "Xet is not enabled")
    expires = int(time.time()) + 3600
    request.send(200, {"accessToken": "xet", "exp": expires, "casUrl": f"local://{request.hub.xet_folder}"})


def xet_files(folder: Path) -> dict[str, bytes]:
    """All files that hf_xet has stored in a folder, by their SHA-256.

    A shard lists files as entries of 48 bytes: one with the file's hash, flags and the number of its segments, these,
    as many again to verify them if flag 31 is set, and one with the SHA-256 if flag 30 is set. A hash of ones ends the
    list. Hashes are written as four little-endian numbers.
    """
    import hf_xet

    found = {}
    for shard in folder.glob("xet/shard-cache/*.mdb"):
        data, at = shard.read_bytes(), 48
        while data[at : at + 32] != b"\xff" * 32:
            flags, segments = struct.unpack_from("<II", data, at + 32)
            file_hash = _xet_hash(data[at : at + 32])
            size = sum(struct.unpack_from("<I", data, at + 48 * (1 + index) + 36)[0] for index in range(segments))
            at += 48 * (1 + segments * (2 if flags >> 31 else 1))
            if flags >> 30 & 1:
                found[_xet_hash(data[at : at + 32])] = (file_hash, size)
                at += 48
    contents = {}
    for sha256, (file_hash, size) in found.items():
        target = folder / sha256
        with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{folder}") as group:
            group.start_download_file(hf_xet.XetFileInfo(file_hash, size), str(target))
        contents[sha256] = target.read_bytes()
    return contents


def _xet_hash(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


@route("POST", "/api/models/{id}/commit/{rev}")
def commit(request: _Handler, found: Any) -> None:
    repository = request.writable(found["id"])
    files = dict(repository.commits[request.commit_of(repository, found["rev"])])
    message = ""
    for line in request.body.splitlines():
        entry = json.loads(line)
        kind, value = entry["key"], entry["value"]
        if kind == "header":
            message = value["summary"]
        elif kind == "file":
            files[value["path"]] = StoredFile(base64.b64decode(value["content"]), False)
        elif kind == "lfsFile":
            if value["oid"] not in request.hub.blobs and request.hub.xet_folder is not None:
                request.hub.blobs |= xet_files(request.hub.xet_folder)
            if value["oid"] not in request.hub.blobs:
                raise Refusal(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
            files[value["path"]] = StoredFile(request.hub.blobs[value["oid"]], True)
        elif kind == "deletedFile":
            del files[value["path"]]
        else:
            raise Refusal(400, "", f"unknown operation {kind}")
    sha = repository.commit(found["rev"], files, message)
    url = f"{request.hub.url}/{found['id']}/commit/{sha}"
    request.send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


@route("GET", "/api/models/{id}/auth-check")
def check_access(request: _Handler, found: Any) -> None:
    request.readable(found["id"])
    request.send(200, {})


@route("GET", "/api/models/{id}/refs")
def references(request: _Handler, found: Any) -> None:
    repository = request.repository(found["id"])
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repository.branches.items()
    ]
    request.send(200, {"branches": branches, "converts": [], "tags": []})


@route("GET", "/api/models/{id}(/revision/{rev})?")
def model_info(request: _Handler, found: Any) -> None:
    repository = request.repository(found["id"])
    sha = request.commit_of(repository, found["rev"] or "main")
    names = sorted(repository.commits[sha])
    about = {"id": found["id"], "modelId": found["id"], "sha": sha, "private": repository.private, "tags": []}
    request.send(200, {**about, "siblings": [{"rfilename": name} for name in names]})


@route("GET", "/api/models/{id}/tree/{rev}(/.*)?")
def tree(request: _Handler, found: Any) -> None:
    recursive = [value.lower() for value in request.query["recursive"]]
    assert recursive == ["true"], "the files of a folder alone are not served"
    repository = request.readable(found["id"])
    entries = []
    for name, file in sorted(repository.commits[request.commit_of(repository, found["rev"])].items()):
        entry: dict[str, Any] = {"type": "file", "path": name, "oid": file.git_oid, "size": len(file.content)}
        if file.is_large:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        entries.append(entry)
    request.send(200, entries)


@route("GET", "/{id}/resolve/{rev}/(?P<path>.+)")
def resolve(request: _Handler, found: Any) -> None:
    repository = request.readable(found["id"])
    sha = request.commit_of(repository, found["rev"])
    file = repository.commits[sha].get(found["path"])
    if file is None:
        raise Refusal(404, "EntryNotFound", "Entry not found")
    headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if file.is_large:
        headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
    asked_for = re.match(r"bytes=(\d+)-(\d*)$", request.headers.get("Range", ""))
    if asked_for is None:
        request.send(200, file.content, headers)
        return
    first, last = int(asked_for[1]), int(asked_for[2] or len(file.content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(file.content)}"
    request.send(206, file.content[first : last + 1], headers)
