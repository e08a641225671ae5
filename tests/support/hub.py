"""A hub in miniature: one HTTP server that lists repositories and gives their files, as huggingface.co does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(slots=True)
class Hub:
    """Files by repository; knobs for what may go wrong. ``requests`` are "METHOD path" with the token, if one came."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    announced: dict[str, int] = field(default_factory=dict)
    """By file: a size other than the true one."""
    digests: dict[str, str] = field(default_factory=dict)
    """By file: the SHA-256 that is announced for it."""
    moved: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gate: threading.Event | None = None
    """Files wait for it."""

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for path, _ in self.requests if "/resolve/" in path]

    def info(self, repo: str, commit: str) -> dict[str, object]:
        siblings = []
        for name, data in self.repos[repo].items():
            sibling: dict[str, object] = {"rfilename": name, "size": self.announced.get(name, len(data))}
            if name.endswith(".safetensors"):
                sha256 = self.digests.get(name, hashlib.sha256(data).hexdigest())
                sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        return {"id": self.moved.get(repo, repo), "sha": commit, "siblings": siblings}


@contextmanager
def serving_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = self.headers.get("authorization")
            hub.requests.append((f"GET {path}", token))
            if hub.token is not None and token != f"Bearer {hub.token}":
                self.answer(401, b"{}", "x-error-code", "RepoNotFound")
                return
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.list("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
            else:
                self.give("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        def list(self, repo: str, revision: str) -> None:
            if repo not in hub.repos:
                self.answer(404, b"{}", "x-error-code", "RepoNotFound")
            elif revision not in hub.revisions:
                self.answer(404, b"{}", "x-error-code", "RevisionNotFound")
            else:
                body = json.dumps(hub.info(repo, hub.revisions[revision])).encode()
                self.answer(200, body, "content-type", "application/json")

        def give(self, repo: str, commit: str, name: str) -> None:
            assert commit == COMMIT, "files are asked for by commit"
            if hub.gate is not None:
                hub.gate.wait(20)
            self.answer(200, hub.repos[repo][name], "x-repo-commit", commit)

        def answer(self, status: int, body: bytes, header: str, value: str) -> None:
            self.send_response(status)
            self.send_header(header, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return None

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that has given up is part of some tests."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
