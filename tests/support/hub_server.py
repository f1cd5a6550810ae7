"""A real HTTP server on the loopback that speaks as much of the Hub's API as downloading needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One model repository: its commits with their files, and its branches."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    token: str | None = None
    """Required to see it; without one it is public."""
    gated: bool = False

    def commit_of(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Hub:
    """The server's content, and what it was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: int | None = None
    """Answer everything with this status."""
    cut: str = ""
    """Break off in the middle of files of this name."""
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the server; `hub.url` is its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} {path}")
            if hub.broken is not None:
                return self.fail(hub.broken, "")
            parts = path.split("/")
            self.shelf = hub.repositories
            if parts[:2] == ["api", "datasets"]:
                self.shelf, parts[1] = hub.datasets, "models"
            elif parts[0] == "datasets":
                self.shelf, parts = hub.datasets, parts[1:]
            if parts[:2] == ["api", "models"]:
                name, rest = "/".join(parts[2:4]), parts[4:]
                revision = "/".join(rest[1:]) if rest[:1] == ["revision"] else "main"
                return self.with_files(name, revision, lambda r, c: self.info(name, r, c, body))
            if len(parts) > 4 and parts[2] == "resolve":
                name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
                return self.with_files(name, revision, lambda r, c: self.file(r, c, file, body))
            return self.fail(404, "EntryNotFound")

        def with_files(self, name: str, revision: str, then: Any) -> None:
            repository = self.shelf.get(name)
            allowed = repository is not None and (
                repository.token is None
                or self.headers.get("Authorization") == f"Bearer {repository.token}"
            )
            if repository is None or (not allowed and not repository.gated):
                return self.fail(401, "RepoNotFound")
            if not allowed:
                return self.fail(403, "GatedRepo")
            commit = repository.commit_of(revision)
            if commit is None:
                return self.fail(404, "RevisionNotFound")
            return then(repository, commit)

        def info(self, name: str, repository: Repository, commit: str, body: bool) -> None:
            files = repository.commits[commit]
            siblings = [{"rfilename": f, "size": len(data)} for f, data in files.items()]
            value = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [],
                     "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
            self.send(json.dumps(value).encode(), "application/json", body, {})

        def file(self, repository: Repository, commit: str, file: str, body: bool) -> None:
            data = repository.commits[commit].get(file)
            if data is None:
                return self.fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
            etag = hashlib.sha256(data).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
            if body and hub.cut and file.endswith(hub.cut):
                return self.break_off(data, headers)
            return self.send(data, "application/octet-stream", body, headers)

        def break_off(self, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True

        def send(self, data: bytes, kind: str, body: bool, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "Content-Type": kind}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "X-Error-Code": code}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
