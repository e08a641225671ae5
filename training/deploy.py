"""deploy: a package goes to a running server, proves itself there, and becomes what its name means.

Owns the client's side of it: upload, register, and asking the server what it now serves. Knows the HTTP API of
docs/api.md and nothing of the server's inside; it may run on another machine. Place in a training run: the last phase,
after the gate. Requests in flight on the old version end on it; whatever fails here leaves the old version current.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from adapters.errors import AdapterError
from adapters.package import COPIED_NAMES, open_package_file, package_digest

_log = logging.getLogger("lorikeet.training")

UPLOADS_PATH = "/v1/adapter-uploads"
ADAPTERS_PATH = "/v1/adapters"
CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 300.0
"""A load may wait for a slot; the server has a deadline of its own for that."""
BUSY_TIMEOUT_S = 60.0
"""A server that says 429 is asked again for so long, as often as it says."""
PIECE_BYTES = 1 << 20

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Deployed:
    """What the server serves now."""

    ref: str
    """``invoice@2``."""
    seconds: float
    """From the call until the server said that the name means it."""
    digest: str
    is_new: bool
    """False if the name meant this very content before."""


class DeployError(Exception):
    """The package is not live, and what was live before still is; ``str()`` says why and what to do."""

    def __init__(
        self, message: str, *, code: str = "", reason: str = "", details: tuple[str, ...] = ()
    ) -> None:
        self.code = code
        """The server's error code; empty if it never answered."""
        self.reason = reason
        """Why a package was refused: one of docs/api.md's list."""
        self.details = details
        super().__init__("\n  - ".join((message, *details)))


def deploy(package: Path, name: str, url: str, api_key: str | None, on_note: Note) -> Deployed:
    """Upload a package, have it registered, loaded, probed and promoted under ``name``, and verify.

    ``on_note`` is told each step. Raises DeployError.
    """
    begin_s = time.monotonic()
    digest = _digest(package)
    with _connect(url, api_key) as client:
        server = _Server(client, url, on_note)
        source = _upload(server, package, on_note)
        try:
            on_note(f"registering {name}: the server copies, checks, loads and probes it")
            wanted = {"name": name, "source": source, "sha256": digest}
            status, record = server.call("POST", ADAPTERS_PATH, wanted)
        except BaseException:
            _give_up(client, source)
            raise
        ref = _verify(server, name, digest, record)
    deployed = Deployed(ref, time.monotonic() - begin_s, digest, is_new=status == 201)
    _log.info("adapter.deployed ref=%s digest=%s took_s=%.2f", ref, digest, deployed.seconds)
    on_note(f"{ref} is live after {deployed.seconds:.1f} s")
    return deployed


def _digest(package: Path) -> str:
    try:
        return package_digest(package)
    except (AdapterError, OSError) as error:
        raise DeployError(f"the package {package} cannot be read: {error}") from error


def _connect(url: str, api_key: str | None) -> httpx2.Client:
    root = url.rstrip("/").removesuffix("/v1")  # OpenAI's clients are told the address with it
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx2.Timeout(REPLY_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        return httpx2.Client(base_url=root, headers=headers, timeout=timeout, trust_env=False)
    except (httpx2.InvalidURL, ValueError) as error:
        raise DeployError(
            f"{url!r} is no address of a server ({error}): give one such as http://host:8000"
        ) from error


# ---- the steps -------------------------------------------------------------------------------------------------


def _upload(server: _Server, package: Path, on_note: Note) -> str:
    """Send the package's files; the source under which they can be registered."""
    _, upload = server.call("POST", UPLOADS_PATH, {})
    if "id" not in upload or "source" not in upload:
        raise DeployError(f"{server.url} answered without an upload's id: is it a Lorikeet server?")
    try:
        for file in COPIED_NAMES:
            with suppress(FileNotFoundError):
                _send(server, f"{UPLOADS_PATH}/{upload['id']}/{file}", package, file, on_note)
    except BaseException:
        _give_up(server.client, upload["source"])
        raise
    return str(upload["source"])


def _send(server: _Server, path: str, package: Path, file: str, on_note: Note) -> None:
    try:
        opened = open_package_file(package, file)
    except AdapterError as error:
        raise DeployError(f"{file} of the package cannot be sent: {error}") from error
    with opened:
        num_bytes = opened.seek(0, 2)
        on_note(f"uploading {file} ({num_bytes / 1e6:.1f} MB)")
        headers = {"content-type": "application/octet-stream", "content-length": str(num_bytes)}
        server.send("PUT", path, lambda: _pieces(opened), headers)


def _pieces(opened: Any) -> Iterator[bytes]:
    opened.seek(0)
    while piece := opened.read(PIECE_BYTES):
        yield piece


def _verify(server: _Server, name: str, digest: str, record: dict[str, Any]) -> str:
    """Ask anew what the name means: a version that somebody else promoted meanwhile is told, not hidden."""
    _, current = server.call("GET", f"{ADAPTERS_PATH}/{quote(name, safe='')}")
    if current.get("digest") != digest:
        raise DeployError(
            f"{name}@{record.get('version')} is registered, but {name} means {name}@{current.get('version')}: somebody "
            f"else promoted that; promote yours with POST {ADAPTERS_PATH}/{name}/promote"
        )
    return f"{current['name']}@{current['version']}"


def _give_up(client: httpx2.Client, source: str) -> None:
    """What was uploaded is of no use; the server would delete it by itself, later."""
    with suppress(httpx2.HTTPError):
        client.delete(f"{UPLOADS_PATH}/{source.partition(':')[2]}", timeout=CONNECT_TIMEOUT_S)


# ---- the server ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Server:
    """Calls that answer or raise DeployError; a busy server is asked again."""

    client: httpx2.Client
    url: str
    on_note: Note

    def call(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON object."""
        content = b"" if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"content-type": "application/json"}
        reply = self.send(method, path, lambda: content, headers)
        return reply.status_code, _object(reply, self.url)

    def send(
        self, method: str, path: str, content: Callable[[], bytes | Iterator[bytes]], headers: dict[str, str]
    ) -> httpx2.Response:
        """``content`` is called anew for each attempt."""
        deadline_s = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                reply = self.client.request(method, path, content=content(), headers=headers)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise _unreachable(self.url, error) from error
            if reply.status_code != 429 or time.monotonic() > deadline_s:
                break
            wait_s = min(_retry_after_s(reply), max(0.0, deadline_s - time.monotonic()))
            self.on_note(f"the server is busy; asking again in {wait_s:.0f} s")
            time.sleep(wait_s)
        if reply.status_code >= 400:
            raise _refusal(reply, self.url)
        return reply


def _retry_after_s(reply: httpx2.Response) -> float:
    text = reply.headers.get("retry-after", "1")
    return float(text) if text.isdigit() else 1.0


def _object(reply: httpx2.Response, url: str) -> dict[str, Any]:
    try:
        value = reply.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DeployError(
            f"{url} answered {reply.status_code} without a JSON object: is it a Lorikeet server?"
        )
    return value


def _unreachable(url: str, error: Exception) -> DeployError:
    reason = str(error) or type(error).__name__
    return DeployError(
        f"no answer from {url} ({reason}): is the server up (lorikeet serve), and the address right?"
    )


def _refusal(reply: httpx2.Response, url: str) -> DeployError:
    """What the server's error envelope says, and what to do about it."""
    try:
        error = _object(reply, url).get("error")
    except DeployError:
        error = None
    if not isinstance(error, dict) or "message" not in error:
        return DeployError(f"{url} answered {reply.status_code}: is it a Lorikeet server?")
    code, message = str(error.get("code", "")), str(error["message"])
    advice = {
        "invalid_api_key": "; give a key with the scope admin (--api-key or LORIKEET_API_KEY)",
        "insufficient_scope": "; use a key with the scope admin",
        "draining": "; deploy again when it is back",
    }.get(code, "")
    if code == "not_found" and UPLOADS_PATH in str(reply.url.path):
        advice = "; a server that takes uploads is needed: update it"
    return DeployError(
        f"{url} refused it: {message}{advice} [{error.get('reason') or code}]",
        code=code,
        reason=str(error.get("reason") or ""),
        details=tuple(map(str, error.get("details") or ())),
    )
