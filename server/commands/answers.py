"""Answers: what the client commands ask a server for, and how they print it: a table, lines, or one JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from server.commands.columns import columns
from server.commands.remote import Remote, RemoteError


def ask(remote: Remote, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
    """As Remote.call; a failure is one line on stderr and status 1."""
    try:
        return remote.call(method, path, body)
    except RemoteError as error:
        raise failed(error) from error


def failed(error: RemoteError) -> typer.Exit:
    """Said on stderr; raise what comes back."""
    typer.echo(f"lorikeet: {error}", err=True)
    return typer.Exit(1)


def report(value: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        write_json(value)
        return
    for key, item in value.items():
        typer.echo(f"{key:<16} {shown(item)}")


def write_table(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    table = [tuple(names), *(tuple(shown(row.get(name)) for name in names) for row in rows)]
    typer.echo("\n".join(columns(table)))


def write_json(value: Mapping[str, Any]) -> None:
    import orjson

    typer.echo(orjson.dumps(value).decode())


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
