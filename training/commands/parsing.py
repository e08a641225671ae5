"""How the commands that take a whole recipe read their arguments: one flag a key, built only when the command runs.

The outer command takes its arguments unread and hands them to a second parser; so `lorikeet --help` imports nothing of
this room but typer. Owns: that, and the options that these commands share. Does not know: what they do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training.recipe.flags import Action

PASS_THROUGH: Mapping[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
"""Context settings of the outer command."""

RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="Recipe in YAML, or the name of one that comes with us."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Run folder.  [default: runs/NAME]")
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")]


def parse(
    args: Sequence[str], name: str, about: str, action: Action, others: Sequence[inspect.Parameter]
) -> None:
    """Read ``args`` as flags of a recipe and ``others``, and call ``action``; raises what typer does."""
    from training.recipe.flags import CONTEXT, flags_command

    parser = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=CONTEXT
    )
    parser.command(name, help=about)(flags_command(action, others))
    parser(args=list(args), prog_name=f"lorikeet {name}")


def option(name: str, annotation: object, default: object = None) -> inspect.Parameter:
    """One of the command's own."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def value(name: str, kind: object, metavar: str, about: str, **limits: Any) -> inspect.Parameter:
    """One that takes a value, and is None without."""
    taken = typer.Option(metavar=metavar, help=about, **limits)
    return option(name, Annotated[kind, taken])


def switch(name: str, about: str) -> inspect.Parameter:
    """One that is on or off."""
    return option(name, Annotated[bool, typer.Option(f"--{name.replace('_', '-')}", help=about)], False)
