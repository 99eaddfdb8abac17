"""A local hub for huggingface_hub's client. A test can choose faults in the hub's answers.

The protocol follows the requests of huggingface_hub 2.4 (hf_api.py, file_download.py). As on the
real hub, a request for a large file (here: weights) is redirected to another path, which contains
the file's sha256. A small file is sent at once, with its git hash as the ETag.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")


@dataclass
class Fault:
    """A fault in some answers. It affects each request whose "METHOD /path" matches `where`."""

    where: str
    times: int = 1_000_000
    status: int = 0  # if not 0, answer with this status, and send no file
    code: str = ""  # the header X-Error-Code of that answer
    keep: int | None = None  # send this many bytes of the body, then close the connection
    body: bytes | None = None  # send this body instead of the file
    stated: int | None = None  # give this file length in the headers, in place of the true one


@dataclass
class Hub:
    """A fake hub. `repositories` is {"owner/name": {revision: {path: contents}}}."""

    url: str = ""
    store: str = ""  # a second host name of this server; the real hub also has two hosts
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or of a commit, or None if there is no such revision."""
        branches = self.repositories[repository]
        return branches.get(revision) or next(
            (files for files in branches.values() if commit(files) == revision), None
        )

    def fault(self, request: str) -> Fault:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.where, request):
                fault.times -= 1
                return fault
        return Fault("")


def commit(files: dict[str, bytes]) -> str:
    """The hash of a commit, computed from its files."""
    text = "".join(f"{path} {sha256(data)}\n" for path, data in sorted(files.items()))
    return hashlib.sha1(text.encode()).hexdigest()


@lru_cache(maxsize=1000)  # a lookup is quick, because Python computes hash(data) only once
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at `hub.url` until the `with` statement ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        hub.store = f"http://localhost:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            yield hub
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.fault = self.hub.fault(request)
        if self.fault.status:
            return self.answer(self.fault.status, {"X-Error-Code": self.fault.code})
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, path):
                return method(self, *found.groups())
        self.answer(404)

    do_HEAD = do_POST = do_PUT = do_GET

    # ---------------------------------------------------------------------------------- downloads

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a revision. If it does not exist, send the reason and return None."""
        if repository not in self.hub.repositories:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif (files := self.hub.files(repository, revision)) is not None:
            return files
        else:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def info(self, repository: str, revision: str | None) -> None:
        files = self.files(repository, revision or "main")
        if files is not None:
            siblings = [{"rfilename": path} for path in files]
            if "blobs=" in urlsplit(self.path).query:
                siblings = [_sibling(path, data) for path, data in files.items()]
            self.json({"id": repository, "sha": commit(files), "siblings": siblings})

    def tree(self, repository: str, revision: str) -> None:
        files = self.files(repository, revision)
        if files is not None:
            self.json([_entry(path, data) for path, data in files.items()])

    def resolve(self, repository: str, revision: str, path: str) -> None:
        files = self.files(repository, revision)
        if files is None:
            return
        headers = {"X-Repo-Commit": commit(files)}
        if path not in files:
            return self.answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        data = files[path]
        if not path.endswith(LARGE):
            return self.file(data, headers | {"ETag": f'"{git_hash(data)}"'})
        stated = len(data) if self.fault.stated is None else self.fault.stated
        place = f"{self.hub.store}/stored/{sha256(data)}/{path}"
        headers |= {"X-Linked-ETag": f'"{sha256(data)}"', "X-Linked-Size": str(stated)}
        self.answer(302, headers | {"Location": place})

    def stored(self, hash: str) -> None:
        everything = [f for branches in self.hub.repositories.values() for f in branches.values()]
        for data in (data for files in everything for data in files.values()):
            if sha256(data) == hash:
                return self.file(data, {"ETag": f'"{hash}"'})
        self.answer(404)

    def file(self, data: bytes, headers: dict[str, str]) -> None:
        data = data if self.fault.body is None else self.fault.body
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, headers, data)
        start = int(wanted[1])
        headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.answer(206, headers, data[start:])

    # ------------------------------------------------------------------------------------ uploads

    def create(self) -> None:
        asked = json.loads(self.asked)
        name = "/".join(filter(None, (asked.get("organization", "nobody"), asked["name"])))
        self.hub.repositories.setdefault(name, {"main": {}})
        self.json({"id": name, "name": name, "url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, repository: str) -> None:
        modes = [
            {"path": file["path"], "shouldIgnore": False, "oid": None}
            | {"uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
            for file in json.loads(self.asked)["files"]
        ]
        self.json({"files": modes})

    def batch(self, repository: str) -> None:
        objects = [
            {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}}
            for wanted in json.loads(self.asked)["objects"]
        ]
        self.json({"transfer": "basic", "objects": objects})

    def upload(self, hash: str) -> None:
        self.hub.uploads[hash] = self.asked
        self.answer(200 if sha256(self.asked) == hash else 400)

    def commit(self, repository: str, revision: str) -> None:
        files = dict(self.hub.repositories[repository][revision])
        for line in map(json.loads, self.asked.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        self.hub.repositories[repository][revision] = files
        url = f"{self.hub.url}/{repository}/commit/{commit(files)}"
        self.json({"success": True, "commitOid": commit(files), "commitUrl": url})

    # ------------------------------------------------------------------------------------ answers

    def json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.fault.keep])
            self.close_connection = self.close_connection or self.fault.keep is not None


_REPOSITORY = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (rf"/api/models/{_REPOSITORY}(?:/revision/(.+))?", _Handler.info),
    (rf"/api/models/{_REPOSITORY}/tree/([^/]+)", _Handler.tree),
    (rf"/{_REPOSITORY}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (r"/stored/(\w+)/.+", _Handler.stored),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_REPOSITORY}/preupload/main", _Handler.preupload),
    (rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/upload/(\w+)", _Handler.upload),
    (rf"/api/models/{_REPOSITORY}/commit/(main)", _Handler.commit),
]


def _sibling(path: str, data: bytes) -> dict[str, object]:
    sibling = {"rfilename": path, "size": len(data), "blobId": git_hash(data)}
    if path.endswith(LARGE):
        sibling["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
    return sibling


def _entry(path: str, data: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return entry
