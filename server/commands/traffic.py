"""`lorikeet adapters traffic ...`: how a running server splits its aliases between versions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.commands.answers import ask, write_json, write_table
from server.commands.remote import DEFAULT_URL, AsJson, Key, Remote, Url, segment

traffic_app = typer.Typer(
    help="Splits of aliases between versions: list, show, set, end.", no_args_is_help=True
)
COLUMNS = ("alias", "target", "shares", "sticky", "shadow")
Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="The alias.")]


@traffic_app.command("list", short_help="Every alias that is split.")
def list_traffic(url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show every alias that is split, its shares and its shadow."""
    listing = ask(Remote(url, api_key), "GET", "/v1/traffic")
    if as_json:
        write_json(listing)
    elif listing.get("data"):
        write_table(COLUMNS, [_row(record) for record in listing["data"]])
    else:
        typer.echo("No alias is split. lorikeet adapters traffic set ALIAS 3=95 4=5 splits one.")


@traffic_app.command("show", short_help="One alias.")
def show(alias: Alias, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show where an alias's requests go."""
    _print(ask(Remote(url, api_key), "GET", f"/v1/traffic/{segment(alias)}"), as_json)


@traffic_app.command("set", short_help="Split an alias by weight: set prod 3=95 4=5.")
def set_traffic(
    alias: Alias,
    weights: Annotated[list[str], typer.Argument(metavar="VERSION=WEIGHT...", help="Such as 3=95 4=5.")],
    sticky: Annotated[
        str, typer.Option(metavar="WHERE", help="A caller's key: user, header:NAME or metadata:KEY.")
    ] = "user",
    salt: Annotated[str | None, typer.Option(metavar="TEXT", help="Another one deals all keys anew.")] = None,
    shadow: Annotated[
        int | None, typer.Option(metavar="VERSION", help="Gets copies in idle time, to be compared.")
    ] = None,
    share: Annotated[float, typer.Option(metavar="SHARE", help="Of requests that the shadow gets.")] = 1.0,
    shadow_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens a minute that the shadow may have.")
    ] = None,
    load: Annotated[bool, typer.Option(help="Load and probe each version before.")] = True,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Split an alias between versions of its adapter; requests in flight keep theirs."""
    body: dict[str, object] = {"weights": dict(map(_weight, weights)), "sticky": sticky}
    body |= {"salt": salt} if salt else {}
    if shadow is not None:
        budget = {} if shadow_tokens is None else {"tokens_per_minute": shadow_tokens}
        body["shadow"] = {"version": shadow, "share": share, **budget}
    body |= {} if load else {"load": False}
    _print(ask(Remote(url, api_key), "PUT", f"/v1/traffic/{segment(alias)}", body), as_json)


@traffic_app.command("end", short_help="All to the alias's own version again.")
def end(alias: Alias, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """End an alias's split and its shadow; what the alias means stays."""
    _print(ask(Remote(url, api_key), "DELETE", f"/v1/traffic/{segment(alias)}"), as_json)


def _print(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        write_json(record)
    else:
        write_table(COLUMNS, [_row(record)])


def _row(record: dict[str, Any]) -> dict[str, Any]:
    shares = [f"{number}:{100 * share:g}%" for number, share in record["shares"].items()]
    shadow = record["shadow"]
    copied = None if shadow is None else f"{shadow['version']}:{100 * shadow['share']:g}%"
    return {**record, "shares": shares, "shadow": copied}


def _weight(word: str) -> tuple[str, float]:
    number, _, weight = word.partition("=")
    try:
        return number, float(weight)
    except ValueError:
        raise typer.BadParameter(f"{word!r} is not VERSION=WEIGHT") from None
