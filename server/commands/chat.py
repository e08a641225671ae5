"""`lorikeet chat`: talk to a running server in the terminal, about pictures too, through one adapter or several.

Owns the conversation and how it is shown; the answers come over HTTP like anybody's.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from server.commands.remote import DEFAULT_URL, Key, Remote, RemoteError, Url

HINTS = "/adapter NAME changes the adapter, /image FILE adds a picture, /reset forgets, /quit ends."
Turn = dict[str, Any]  # one message of the chat request


@dataclass(frozen=True, slots=True)
class Asking:
    """What each question is asked with. `adapters` holds one name, or several to compare; "base" is the base."""

    remote: Remote
    adapters: tuple[str, ...]
    model: str
    max_tokens: int
    temperature: float


@dataclass(slots=True)
class Conversation:
    """The turns so far, and the pictures that go with the next question."""

    system: str | None
    turns: list[Turn] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)

    def reset(self) -> None:
        self.turns.clear()
        self.pictures.clear()

    def asked(self, text: str) -> list[Turn]:
        """The messages of a request that asks `text` next; the conversation itself is unchanged."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in self.pictures]
        content: object = [*parts, {"type": "text", "text": text}] if parts else text
        return [*head, *self.turns, {"role": "user", "content": content}]

    def answered(self, messages: list[Turn], answer: str) -> None:
        """Keep the question, which is the last of `messages`, and its answer."""
        self.turns += [messages[-1], {"role": "assistant", "content": answer}]
        self.pictures.clear()


def command(
    message: Annotated[
        str | None, typer.Argument(metavar="MESSAGE", help="What to ask; without it, a conversation.")
    ] = None,
    adapter: Annotated[str, typer.Option(metavar="NAME", help="Adapter to ask; base is the base.")] = "base",
    image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Picture, a file or URL; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Ask several adapters the same: base,json,french.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="0 always takes the likeliest token.")
    ] = 0.0,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Chat with a running server, in one question or in a conversation."""
    remote = Remote(url, api_key)
    names = tuple(name.strip() for name in compare.split(",") if name.strip()) if compare else (adapter,)
    try:
        conversation = Conversation(system, pictures=[picture_url(name) for name in image or []])
        asking = Asking(remote, names, _base_id(remote), max_tokens, temperature)
        if message is not None:
            ask(asking, conversation, message)
        else:
            _converse(asking, conversation)
    except RemoteError as error:
        typer.echo(f"lorikeet: {error}", err=True)
        raise typer.Exit(1) from error


def ask(asking: Asking, conversation: Conversation, text: str) -> None:
    """Ask every adapter, write what they say as they say it, and remember the first one's answer."""
    messages = conversation.asked(text)
    answers = [_answer(asking, name, messages) for name in asking.adapters]
    conversation.answered(messages, answers[0])


def picture_url(name: str) -> str:
    """A picture as a URL that the server takes: a file's bytes, or the URL itself. Raises RemoteError for no file."""
    if name.startswith(("http://", "https://", "data:")):
        return name
    path = Path(name).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RemoteError(f"cannot read the picture {path}: {error.strerror}") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _answer(asking: Asking, name: str, messages: Sequence[Turn]) -> str:
    if len(asking.adapters) > 1:
        typer.secho(f"{name}: ", bold=True, nl=False)
    pieces = []
    try:
        for piece in _pieces(asking, name, messages):
            typer.echo(piece, nl=False)
            pieces.append(piece)
    finally:
        typer.echo()
    return "".join(pieces)


def _pieces(asking: Asking, name: str, messages: Sequence[Turn]) -> Iterator[str]:
    body = {
        "model": asking.model,
        "adapter": name,
        "messages": list(messages),
        "stream": True,
        "max_tokens": asking.max_tokens,
        "temperature": asking.temperature,
    }
    for frame in asking.remote.stream("/v1/chat/completions", body):
        for choice in frame.get("choices", []):
            yield choice["delta"].get("content") or ""


def _base_id(remote: Remote) -> str:
    """The base stands first in the list of models."""
    models = remote.call("GET", "/v1/models").get("data") or []
    if not models:
        raise RemoteError("the server lists no model: is it ready?")
    return str(models[0]["id"])


def _converse(asking: Asking, conversation: Conversation) -> None:
    typer.secho(f"{asking.model}, adapter {', '.join(asking.adapters)}. {HINTS}", dim=True)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if line == "/quit":
            return
        try:
            asking = _turn(asking, conversation, line)
        except RemoteError as error:
            typer.secho(str(error), fg="red", err=True)
        except KeyboardInterrupt:
            typer.echo(" (stopped)")


def _turn(asking: Asking, conversation: Conversation, line: str) -> Asking:
    """One line of the conversation: a word with a slash changes something, anything else is asked."""
    word, _, rest = line.partition(" ")
    if word == "/adapter" and rest:
        return replace(asking, adapters=(rest.strip(),))
    if word == "/image" and rest:
        conversation.pictures.append(picture_url(rest.strip()))
    elif word == "/reset":
        conversation.reset()
    elif word.startswith("/"):
        typer.secho(HINTS, dim=True)
    elif line:
        ask(asking, conversation, line)
    return asking
