"""`lorikeet adapters versions|promote|rollback|alias`: what a name means on a running server, and moving it."""

from __future__ import annotations

from typing import Annotated

import typer

from server.commands.answers import ask, report, write_json, write_table
from server.commands.remote import DEFAULT_URL, AsJson, Key, Remote, Url, segment

VERSION_COLUMNS = (
    "version",
    "current",
    "aliases",
    "tier",
    "state",
    "refs",
    "bytes",
    "created",
    "digest",
    "source",
)
ALIAS_COLUMNS = ("alias", "target", "before")
Name = Annotated[str, typer.Argument(metavar="NAME", help="Adapter's name.")]
Load = Annotated[
    bool, typer.Option(help="Bring the version to the device and probe it before the name means it.")
]
alias_app = typer.Typer(help="Further names for versions: list, set, remove.", no_args_is_help=True)


def versions(name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show every version of an adapter, and which of them its name means."""
    remote = Remote(url, api_key)
    listing = ask(remote, "GET", "/v1/adapters").get("data", [])
    numbers = next((record["versions"] for record in listing if record.get("name") == name), None)
    if numbers is None:  # an unknown name: the server knows near ones
        numbers = ask(remote, "GET", f"/v1/adapters/{segment(name)}")["versions"]
    records = [ask(remote, "GET", f"/v1/adapters/{segment(f'{name}@{number}')}") for number in numbers]
    if as_json:
        write_json({"name": name, "versions": records})
    else:
        write_table(VERSION_COLUMNS, [{**record, "digest": record["digest"][:12]} for record in records])


def promote(
    name: Name,
    version: Annotated[
        str,
        typer.Argument(metavar="VERSION", help="Its number, or sha256: and the first digits of its digest."),
    ],
    load: Load = True,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make a version what the name means, once it is proven; requests in flight end on theirs."""
    body: dict[str, object] = {"version": version} | ({} if load else {"load": False})
    report(ask(Remote(url, api_key), "POST", f"/v1/adapters/{segment(name)}/promote", body), as_json)


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Adapter's name, or an alias.")],
    load: Load = True,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make a name or an alias mean what it meant before. Twice goes back twice."""
    body: dict[str, object] = {} if load else {"load": False}
    report(ask(Remote(url, api_key), "POST", f"/v1/adapters/{segment(name)}/rollback", body), as_json)


@alias_app.command("list", short_help="Every alias and what it means.")
def list_aliases(url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show every alias and what it means."""
    listing = ask(Remote(url, api_key), "GET", "/v1/aliases")
    if as_json:
        write_json(listing)
    elif listing.get("data"):
        write_table(ALIAS_COLUMNS, listing["data"])
    else:
        typer.echo("There is no alias. lorikeet adapters alias set ALIAS NAME@VERSION makes one.")


@alias_app.command("set", short_help="Make an alias, or move it.")
def set_alias(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as prod, canary or ft:my-model.")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="NAME@VERSION; a NAME is what it means now.")
    ],
    load: Load = True,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make an alias mean one version of one adapter, or move it there."""
    body: dict[str, object] = {"target": target} | ({} if load else {"load": False})
    report(ask(Remote(url, api_key), "PUT", f"/v1/aliases/{segment(alias)}", body), as_json)


@alias_app.command("remove", short_help="Forget an alias; what it means stays.")
def remove_alias(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The alias.")],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Forget an alias; the adapter that it means stays."""
    report(ask(Remote(url, api_key), "DELETE", f"/v1/aliases/{segment(alias)}"), as_json)
