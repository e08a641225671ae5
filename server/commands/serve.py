"""`lorikeet serve`: one flag for each setting, generated from the settings themselves, so none can be missing or stale.

The outer command takes its arguments unread and hands them to a second parser, which is built only when the command
runs: the settings bring pydantic, and `lorikeet --help` need not wait for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_origin

import typer

if TYPE_CHECKING:
    from server.sources import SettingDoc

WIDE = {"max_content_width": 110}
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def command(ctx: typer.Context) -> None:
    """Serve a base and its adapters over HTTP until SIGTERM or Ctrl-C. --help lists every setting."""
    parser = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=WIDE
    )
    parser.command("serve", help=HELP)(flags_command(run))
    parser(args=list(ctx.args), prog_name="lorikeet serve")


HELP = """Serve a base and its adapters over HTTP until SIGTERM or Ctrl-C (twice ends at once).

Each setting is a flag, an environment name and a key of the TOML file; the flag wins, then the environment, then
the file. Sizes take units: 512MiB, 2GB. docs/settings.md gives the reasons."""


def run(flags: Mapping[str, object], config: Path | None) -> None:
    """Resolve the settings and serve; ends with status 2 and the list of what is wrong when they are."""
    from server.sources import SettingsError, resolve

    try:
        settings = resolve(flags, config)
    except SettingsError as error:
        typer.echo(f"lorikeet serve: {error}", err=True)
        raise typer.Exit(2) from error
    from server.serve import run_server

    run_server(settings)


def flags_command(action: Callable[[Mapping[str, object], Path | None], None]) -> Callable[..., None]:
    """A function whose signature has one option for each setting; it calls `action` with those that were given."""
    from server.sources import describe

    def serve(**values: object) -> None:
        config = values.pop("config")
        given = {name: _flatten(value) for name, value in values.items() if value not in (None, [], ())}
        action(given, config if isinstance(config, Path) else None)

    parameters = [_config_parameter(), *(_parameter(doc) for doc in describe())]
    serve.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return serve


def _config_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--config", help="TOML file of settings.  [env: LORIKEET_CONFIG]", show_default=False
    )
    annotation = Annotated[Path | None, option]
    return inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(doc: SettingDoc) -> inspect.Parameter:
    kind: object = str | None
    spelling = doc.flag
    if doc.is_flag_only:
        kind, spelling = bool | None, f"{doc.flag}/--no-{doc.flag.removeprefix('--')}"
    elif _is_list(doc.name):
        kind = list[str] | None
    text = f"{doc.reason}  [{doc.unit}; default: {doc.default}; env: {doc.environment}]"
    option = typer.Option(
        spelling, help=text, show_default=False, metavar=None if doc.is_flag_only else "VALUE"
    )
    annotation = Annotated[kind, option]  # type: ignore[valid-type]
    return inspect.Parameter(doc.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _is_list(name: str) -> bool:
    from server.settings import Settings

    return get_origin(Settings.model_fields[name].annotation) is tuple


def _flatten(value: object) -> object:
    """A repeated flag may hold commas too: `--adapter-root a,b --adapter-root c` is three folders."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
