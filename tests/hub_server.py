"""A stand-in for the Hugging Face hub on this machine, in as much of its protocol as is used here.

It serves directories as models, remembers every request, and refuses or breaks off on demand.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_PART = 2**14


@dataclass
class Hub:
    """What the stand-in serves, and what it has been asked.

    Attributes:
        endpoint: Its address, for ``HF_ENDPOINT``.
        models: Name to directory; each has one commit, under ``main`` and ``v1`` too.
        commit: That commit.
        token: The one that is asked for, if any.
        gated: Whether files other than the model card are refused to everybody.
        status: Answered to everything, if set.
        break_at: File to the number of its bytes after which a connection breaks; once for each
            entry of the list.
        files: ``METHOD FILE`` or ``METHOD FILE START-`` of each request for a file.
        paths: Of all requests.
    """

    endpoint: str
    models: dict[str, Path] = field(default_factory=dict)
    commit: str = COMMIT
    token: str | None = None
    gated: bool = False
    status: int | None = None
    break_at: dict[str, list[int]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def got(self) -> set[str]:
        """The files of which bytes were sent."""
        return {entry.split()[1] for entry in self.files if entry.startswith("GET")}


@contextmanager
def serving() -> Iterator[Hub]:
    """Runs a stand-in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = False  # so that closing the server waits for them
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sibling(path: Path, directory: Path) -> dict[str, Any]:
    """A file as a listing has it: weights are kept by Git LFS, others by git."""
    size = path.stat().st_size
    about = {"rfilename": path.relative_to(directory).as_posix(), "size": size}
    if path.suffix == ".safetensors":
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        about["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
    return about


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: stderr belongs to what is tested."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server.hub, unquote(self.path.partition("?")[0])
        hub.paths.append(path)
        if hub.status is not None:
            self._refuse(hub.status, "")
        elif hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            # The hub tells nobody whether a private model is there.
            self._refuse(401, "RepoNotFound")
        elif listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            if self._is_there(listing[1], listing[2]):
                self._list(hub.models[listing[1]], listing[1])
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if self._is_there(file[1], file[2]):
                self._file(hub.models[file[1]], file[3])
        else:
            self._refuse(404, "")

    def _is_there(self, name: str, revision: str) -> bool:
        if name not in self.server.hub.models:
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", "v1", self.server.hub.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _list(self, directory: Path, name: str) -> None:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        siblings = [_sibling(path, directory) for path in files]
        answer = {"id": name, "sha": self.server.hub.commit, "siblings": siblings}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, directory: Path, name: str) -> None:
        hub, span = self.server.hub, self.headers["Range"] or ""
        start = int(span.removeprefix("bytes=").rstrip("-") or 0)
        hub.files.append(f"{self.command} {name} {start}-" if span else f"{self.command} {name}")
        if not (directory / name).is_file():
            self._refuse(404, "EntryNotFound")
            return
        if hub.gated and name != "README.md":
            self._refuse(403, "GatedRepo")
            return
        data = (directory / name).read_bytes()
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            breaks = hub.break_at.get(name)
            end = breaks.pop(0) if breaks else len(data)
            for part in range(start, end, _PART):
                self.wfile.write(data[part : min(part + _PART, end)])

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
