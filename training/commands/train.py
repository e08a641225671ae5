"""`lorikeet train-adapter`: from a data file to a live, proven adapter.

Owns: what of the command is not the recipe's (where, again, how far), and how its end is told. Does not know: phases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from training.commands.parsing import AsJson, Out, RecipeFile, option, parse, switch, value

if TYPE_CHECKING:
    from training.generation import GeneratorFactory
    from training.recipe.sources import ResolvedRecipe

RUNS: Final = Path("runs")
ABOUT: Final = """Train an adapter on the base that serves, judge it beside the base, pack it; --deploy puts it live.

    lorikeet train-adapter --data rows.jsonl --name invoice --deploy http://127.0.0.1:8000

Each key of a recipe is a flag; the flag wins, then the recipe, then the default. docs/recipes.md gives the reasons,
docs/training-data.md the formats of data, docs/cookbook.md the way from ten pictures to a live adapter."""
OPTIONS: Final = (
    option("recipe", RecipeFile),
    option("out", Out),
    value("deploy", str | None, "URL", "Server to put the adapter on if it passes its gate."),
    value(
        "api_key",
        str | None,
        "KEY",
        "Key with the scope admin, if that server asks.",
        envvar="LORIKEET_API_KEY",
    ),
    switch("resume", "Go on with the run in the folder."),
    switch("overwrite", "Delete the run in the folder, begin anew."),
    switch("dry_run", "Check recipe, data and memory; train nothing."),
    option("as_json", AsJson, False),
)


def train_command(make_generator: GeneratorFactory) -> Callable[[typer.Context], None]:
    """The command; ``make_generator`` is the serving engine's."""

    def command(ctx: typer.Context) -> None:
        """Train an adapter: data checked, trained, judged, packed, deployed. --help lists every key of a recipe."""
        parse(ctx.args, "train-adapter", ABOUT, partial(_run, make_generator), OPTIONS)

    return command


def _run(make_generator: GeneratorFactory, flags: Mapping[str, object], own: Mapping[str, object]) -> None:
    from training.commands.ending import ending
    from training.loop.processes import join_processes
    from training.run.progress import SilentProgress, open_progress
    from training.run.run import DeployTo, RunRequest, Surroundings, run

    with ending(is_json=bool(own["as_json"])) as end:
        resolved = resolve(flags, own)
        ranks = join_processes()
        progress = open_progress() if ranks.is_first else SilentProgress()
        end.is_silent = not ranks.is_first
        url, key = own["deploy"], own["api_key"]
        request = RunRequest(
            resolved,
            folder_of(own, resolved.recipe.name),
            is_resumed=bool(own["resume"]),
            is_overwritten=bool(own["overwrite"]),
            is_dry=bool(own["dry_run"]),
            deploy_to=DeployTo(str(url), str(key) if key else None) if url else None,
        )
        end.result = run(request, Surroundings(make_generator, progress, ranks))


def resolve(flags: Mapping[str, object], own: Mapping[str, object]) -> ResolvedRecipe:
    """The recipe of the flags over the file; with --resume and no file, over the run's own. Raises RecipeError."""
    from training.recipe.sources import resolve_recipe
    from training.run.rundir import RECIPE, RunFolderError

    file = own["recipe"]
    if file is None and own.get("resume"):
        folder = folder_of(own, str(flags.get("name", "")))
        file = folder / RECIPE
        if not file.is_file():
            raise RunFolderError(f"{folder} holds no run to go on with: name its folder with --out")
    return resolve_recipe(Path(str(file)) if file is not None else None, flags)


def folder_of(own: Mapping[str, object], name: str) -> Path:
    """The run folder. A slash in a name is no folder in another run's, which --overwrite would empty."""
    return Path(str(own["out"])) if own["out"] is not None else RUNS / (name or "unnamed").replace("/", "--")
