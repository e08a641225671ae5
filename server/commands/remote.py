"""Remote: a running server as the client commands see it. Owns the connection and the wording of its failures.

Knows the wire's error envelope and nothing of what the commands print. `LORIKEET_URL` and `LORIKEET_API_KEY` reach it
through the options' own environment names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast
from urllib.parse import quote

import typer

if TYPE_CHECKING:
    import httpx2

Url = Annotated[str, typer.Option(metavar="URL", help="Address of the server.", envvar="LORIKEET_URL")]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="KEY", help="Key, if the server asks for one.", envvar="LORIKEET_API_KEY"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 600.0
"""A load or a long answer may take minutes; the server has deadlines of its own."""
PIECE_BYTES = 1 << 20


class RemoteError(Exception):
    """The server refused or could not be reached; `str()` is what to tell the user."""


@dataclass(frozen=True, slots=True)
class Remote:
    url: str
    api_key: str | None = None

    def call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """One request, one JSON reply. Raises RemoteError."""
        import httpx2

        try:
            with self._client() as client:
                reply = client.request(method, path, json=body)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        if reply.status_code >= 400:
            raise RemoteError(_message(reply.status_code, reply.content))
        return _object(reply.content)

    def send_file(self, path: str, file: Path) -> dict[str, Any]:
        """PUT a file's bytes, a piece at a time. Raises RemoteError."""
        import httpx2

        try:
            with self._client() as client, file.open("rb") as opened:
                size = str(file.stat().st_size)
                headers = {"content-type": "application/octet-stream", "content-length": size}
                reply = client.put(path, content=iter(lambda: opened.read(PIECE_BYTES), b""), headers=headers)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        except OSError as error:
            raise RemoteError(f"{file} cannot be read: {error.strerror}") from error
        if reply.status_code >= 400:
            raise RemoteError(_message(reply.status_code, reply.content))
        return _object(reply.content)

    def stream(self, path: str, body: Mapping[str, object]) -> Iterator[dict[str, Any]]:
        """The frames of a streamed reply, `[DONE]` excluded. Raises RemoteError, also for an error frame."""
        import httpx2

        try:
            with self._client() as client, client.stream("POST", path, json=body) as reply:
                if reply.status_code >= 400:
                    raise RemoteError(_message(reply.status_code, reply.read()))
                yield from _frames(reply.iter_lines())
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error

    def _client(self) -> httpx2.Client:
        import httpx2

        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        root = self.url.rstrip("/").removesuffix("/v1")  # OpenAI's clients are told the address with it
        timeout = httpx2.Timeout(REPLY_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return httpx2.Client(base_url=root, headers=headers, timeout=timeout, trust_env=False)

    def _unreachable(self, error: Exception) -> RemoteError:
        reason = str(error) or type(error).__name__
        return RemoteError(
            f"no answer from {self.url} ({reason}). Is the server up (lorikeet serve), and --url right?"
        )


def segment(name: str) -> str:
    """A name as one path segment."""
    return quote(name, safe="")


def _frames(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        frame = _object(data.encode())
        if "error" in frame:
            raise RemoteError(_message(0, data.encode()))
        yield frame


def _object(content: bytes) -> dict[str, Any]:
    import orjson

    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise RemoteError("the reply is not JSON: is this a Lorikeet server?") from error
    if not isinstance(value, dict):
        raise RemoteError("the reply is not a JSON object: is this a Lorikeet server?")
    return cast(dict[str, Any], value)


def _message(status: int, content: bytes) -> str:
    """The envelope's message and code, and the details of a refused package."""
    try:
        error = _object(content).get("error", {})
    except RemoteError:
        error = {}
    if not isinstance(error, dict) or "message" not in error:
        return f"the server answered {status} without saying why"
    details = [f"\n  - {detail}" for detail in error.get("details", []) or []]
    code = f" [{error['code']}]" if error.get("code") else ""
    if error.get("code") == "invalid_api_key":
        return "this server asks for a valid key: give it with --api-key or in LORIKEET_API_KEY [invalid_api_key]"
    return f"{error['message']}{code}{''.join(details)}"
