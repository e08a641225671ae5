"""`lorikeet adapters ...`: a running server's adapters, and the offline check of a package. Noun, then verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.commands import pointers, profiles, traffic
from server.commands.answers import ask, failed, report, write_json, write_table
from server.commands.pointers import Name
from server.commands.remote import DEFAULT_URL, AsJson, Key, Remote, RemoteError, Url, segment

COLUMNS = (
    "name",
    "version",
    "current",
    "kind",
    "rank",
    "tier",
    "state",
    "refs",
    "bytes",
    "aliases",
    "targets",
)
app = typer.Typer(help="List, add, promote, remove, load and check adapters.", no_args_is_help=True)
app.command("versions", short_help="Every version of an adapter, and which is current.")(pointers.versions)
app.command("promote", short_help="Make a version what the name means.")(pointers.promote)
app.command("rollback", short_help="Make a name mean what it meant before.")(pointers.rollback)
app.add_typer(profiles.profile_app, name="profile", short_help="Defaults of its requests: show, set, reset.")
app.add_typer(traffic.traffic_app, name="traffic", short_help="Splits of aliases: list, show, set, end.")
app.add_typer(pointers.alias_app, name="alias", short_help="Further names for versions: list, set, remove.")


@app.command("list", short_help="Registered adapters, and where their weights are.")
def list_adapters(url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show every registered adapter and where its weights are."""
    listing = ask(Remote(url, api_key), "GET", "/v1/adapters")
    rows = listing.get("data", [])
    if as_json:
        write_json(listing)
    elif rows:
        write_table(COLUMNS, rows)
    else:
        typer.echo("No adapter is registered. lorikeet adapters add NAME FOLDER adds one.")


@app.command("show", short_help="All that is known about one adapter.")
def show(name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show all that is known about one adapter."""
    report(ask(Remote(url, api_key), "GET", f"/v1/adapters/{segment(name)}"), as_json)


@app.command("add", short_help="Register a package under a name, and load it.")
def add(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder on the server's machine, under one of its --adapter-root; or here, with --upload. Or "
            "hf://org/name@revision, s3://bucket/folder, gs://..., az://..., where the server allows it.",
        ),
    ],
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Refuse the package unless this is its digest.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it on the device.")] = False,
    load: Annotated[
        bool, typer.Option(help="Bring it to the device now, which also proves that it acts.")
    ] = True,
    promote: Annotated[
        bool, typer.Option(help="Make it what the name means; otherwise it is NAME@VERSION alone.")
    ] = True,
    upload: Annotated[
        bool, typer.Option("--upload", help="Send the folder from this machine to the server.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Register a package under a name and load it; the same name again makes its next version."""
    remote, folder = Remote(url, api_key), Path(source)
    if upload:
        source = _upload(remote, folder)
    elif folder.is_dir():
        source = str(folder.resolve())
    body: dict[str, object] = {"name": name, "source": source}
    body |= {"sha256": sha256} if sha256 else {}
    body |= {"pin": True} if pin else {}
    body |= {} if load else {"load": False}
    body |= {} if promote else {"promote": False}
    report(ask(remote, "POST", "/v1/adapters", body), as_json)


def _upload(remote: Remote, folder: Path) -> str:
    """Send a package's files; the source to register."""
    from adapters.package import COPIED_NAMES

    found = [folder / name for name in COPIED_NAMES if (folder / name).is_file()]
    opened = ask(remote, "POST", "/v1/adapter-uploads", {})
    try:
        for path in found:
            remote.send_file(f"/v1/adapter-uploads/{opened['id']}/{path.name}", path)
    except RemoteError as error:
        raise failed(error) from error
    return str(opened["source"])


@app.command("remove", short_help="Unregister an adapter; what runs on it finishes.")
def remove(name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Unregister an adapter; requests that run on it finish."""
    report(ask(Remote(url, api_key), "DELETE", f"/v1/adapters/{segment(name)}"), as_json)


@app.command("load", short_help="Bring an adapter to the device before its first use.")
def load(name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Bring an adapter to the device before its first request."""
    _act("load", name, Remote(url, api_key), as_json)


@app.command("unload", short_help="Take an adapter off the device; it stays registered.")
def unload(name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Take an adapter off the device and say how many bytes came back; it stays registered."""
    _act("unload", name, Remote(url, api_key), as_json)


@app.command("pin", short_help="Keep an adapter on the device, used or not.")
def pin(name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Keep an adapter on the device however little it is used."""
    _act("pin", name, Remote(url, api_key), as_json)


@app.command("unpin", short_help="Let others have its slot again.")
def unpin(name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Let an adapter leave the device again when others need its slot."""
    _act("unpin", name, Remote(url, api_key), as_json)


@app.command("check", short_help="Would a server accept this package? Needs no server.")
def check(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="PEFT folder: adapter_config.json, adapter_model.safetensors."),
    ],
    base: Annotated[
        str, typer.Option(metavar="BASE", help="The base it is for: pocket, a hub id, or a folder.")
    ] = "pocket",
    max_rank: Annotated[int, typer.Option(metavar="RANK", help="The server's max_rank.", min=1)] = 64,
    as_json: AsJson = False,
) -> None:
    """Say in one line whether a server with this base would accept a package, and why not. Needs no server."""
    from server.commands.check import check_folder

    verdict = check_folder(folder, base, max_rank)
    if as_json:
        write_json(verdict.as_dict())
    else:
        typer.echo(verdict.text)
    raise typer.Exit(0 if verdict.is_accepted else 1)


def _act(verb: str, name: str, remote: Remote, as_json: bool) -> None:
    report(ask(remote, "POST", f"/v1/adapters/{segment(name)}/{verb}", {}), as_json)
