"""`lorikeet adapters profile ...`: what a running server asks an adapter with where a request says nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from server.commands.answers import ask, report, write_json, write_table
from server.commands.remote import DEFAULT_URL, AsJson, Key, Remote, Url, segment

profile_app = typer.Typer(help="Defaults of an adapter's requests: show, set, reset.", no_args_is_help=True)
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Adapter's name, for all its versions; NAME@VERSION for one.")
]


@profile_app.command("show", short_help="Every field, its value, and where it comes from.")
def show(name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show every field of an adapter's profile, with its value and where that comes from."""
    shown = ask(Remote(url, api_key), "GET", f"/v1/adapters/{segment(name)}")["effective"]
    if as_json:
        write_json(shown)
    else:
        rows = [
            {"field": field, **{key: _text(item[key]) for key in ("value", "from")}}
            for field, item in shown.items()
        ]
        write_table(("field", "value", "from"), rows)


@profile_app.command("set", short_help="Set fields: temperature=0.2 stop='[\"END\"]' system_prompt=@file.")
def set_fields(
    name: Name,
    fields: Annotated[
        list[str],
        typer.Argument(
            metavar="FIELD=VALUE...", help="JSON, or a text as it is; @FILE reads the value from a file."
        ),
    ],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Set fields of an adapter's profile. A request's own fields still win."""
    _patch(Remote(url, api_key), name, dict(map(_field, fields)), as_json)


@profile_app.command("reset", short_help="Take fields back, or all that was set.")
def reset(
    name: Name,
    fields: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD...]", help="None takes back all that was set.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Take fields back, so that the package's own hold again; without fields all that was set here."""
    _patch(Remote(url, api_key), name, dict.fromkeys(fields) if fields else None, as_json)


def _patch(
    remote: Remote, name: str, changes: dict[str, object] | dict[str, None] | None, as_json: bool
) -> None:
    record = ask(remote, "PATCH", f"/v1/adapters/{segment(name)}", {"profile": changes})
    report({key: record[key] for key in ("name", "version", "profile", "profile_from")}, as_json)


def _field(word: str) -> tuple[str, object]:
    name, has_value, text = word.partition("=")
    if not has_value:
        raise typer.BadParameter(f"{word!r} is not FIELD=VALUE")
    if text.startswith("@"):
        return name, _read(Path(text[1:]))
    try:
        return name, json.loads(text)
    except json.JSONDecodeError:
        return name, text


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error


def _text(value: object) -> str:
    return (
        value if isinstance(value, str) else "-" if value is None else json.dumps(value, ensure_ascii=False)
    )
