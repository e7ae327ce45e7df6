"""A small hub on this machine: it speaks as much of the hub's HTTP as huggingface_hub's client asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "beef"


@dataclass
class Repository:
    """One model on the hub, at one commit."""

    directory: Path
    revisions: frozenset[str] = frozenset({"main", COMMIT})
    gated: int | None = None
    """The status that files are refused with: 401 to a client without a token, 403 to one that may not read them."""
    refused: tuple[int, str] | None = None
    """The status and the hub's code that everything is answered with."""
    cut: set[str] = field(default_factory=set)
    """Files whose first answer ends after half of its bytes."""
    held: set[str] = field(default_factory=set)
    """Files whose answers stop after half of their bytes until `released`."""
    released: threading.Event = field(default_factory=threading.Event)

    def tree(self) -> list[dict[str, object]]:
        files = sorted(path for path in self.directory.rglob("*") if path.is_file())
        names = {str(path.relative_to(self.directory)): path.stat().st_size for path in files}
        return [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in names.items()]


@dataclass
class Hub:
    """Repositories by id, and what was asked for: `(method, path, Range header)`."""

    repositories: dict[str, Repository]
    url: str = ""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def fetched(self) -> set[str]:
        """The names of the files that were downloaded, in whole or in part."""
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return {path.split(f"/resolve/{COMMIT}/")[1] for path in paths}


@contextmanager
def running(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve these repositories, by their ids, on a free port."""
    hub = Hub(repositories)

    class Handler(_Handler):
        found = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        for repository in repositories.values():
            repository.released.set()
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    found: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.found.asked.append((self.command, path, self.headers.get("Range")))
        words = path.removeprefix("/api/models").strip("/").split("/")
        repository, rest = self.found.repositories.get("/".join(words[:2])), words[2:]
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif repository.refused is not None:
            self._refuse(*repository.refused)
        elif len(rest) < 2 or rest[1] not in repository.revisions:
            self._refuse(404, "RevisionNotFound")
        elif rest[0] == "revision":
            self._json({"id": "/".join(words[:2]), "sha": COMMIT, "siblings": []})
        elif rest[0] == "tree":
            self._json(repository.tree())
        elif repository.gated is not None:
            self._refuse(repository.gated, "GatedRepo")
        elif not (repository.directory / "/".join(rest[2:])).is_file():
            self._refuse(404, "EntryNotFound")
        else:
            self._file(repository, "/".join(rest[2:]))

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"X-Error-Code": code, "Content-Length": "0"})

    def _json(self, document: object) -> None:
        raw = json.dumps(document).encode()
        self._answer(200, {"Content-Type": "application/json", "Content-Length": str(len(raw))}, raw)

    def _file(self, repository: Repository, name: str) -> None:
        raw = (repository.directory / name).read_bytes()
        begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].rstrip("-"))
        head = {"ETag": f'"{hashlib.sha256(raw).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        head["Content-Length"] = str(len(raw) - begin)
        if begin:
            head["Content-Range"] = f"bytes {begin}-{len(raw) - 1}/{len(raw)}"
        half = len(raw) // 2
        if self.command == "GET" and name in repository.cut:
            repository.cut.remove(name)
            self._answer(200, head, raw[:half])
            self.close_connection = True
        elif self.command == "GET" and name in repository.held:
            self._answer(200, head, raw[:half])
            repository.released.wait(60)
            self.wfile.write(raw[half:])
        else:
            self._answer(206 if begin else 200, head, raw[begin:])

    def _answer(self, status: int, head: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in head.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()
