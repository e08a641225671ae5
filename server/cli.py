"""The server's commands: serve, adapters, chat, doctor, version. `lorikeet.py` is the door to them.

Owns names, help texts and their grouping. Every command imports what it needs when it runs; at the top of this module
and of `server/commands/*` stands only what the parser needs, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from server.commands import adapters, chat, doctor, serve

app = typer.Typer(
    help="Lorikeet serves many LoRA adapters from one resident 4-bit Qwen2.5-VL.",
    epilog="Start here: lorikeet serve, then in another terminal: lorikeet chat 'Who are you?'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)
app.command(
    "serve",
    short_help="Serve a base and its adapters over HTTP.",
    context_settings=serve.PASS_THROUGH,
    add_help_option=False,
)(serve.command)
app.add_typer(adapters.app, name="adapters")
app.command("chat", short_help="Ask a running server, once or in a conversation.")(chat.command)
app.command("doctor", short_help="What this machine has, what fits, what to mend.")(doctor.command)


@app.command("version", short_help="Lorikeet's version, and its libraries'.")
def version(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Print the versions of Lorikeet and of the libraries that decide its numbers."""
    from server.commands.versions import installed_versions

    found = installed_versions()
    if as_json:
        import orjson

        typer.echo(orjson.dumps(found).decode())
        return
    typer.echo("\n".join(f"{name} {number}" for name, number in found.items()))
