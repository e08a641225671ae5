"""`lorikeet sweep`: the same data through a grid of recipes, over one loaded base, ending in a table.

Owns: the command's own options, and how the table is told. Does not know: how an experiment is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from training.commands.parsing import AsJson, Out, RecipeFile, option, parse, value

if TYPE_CHECKING:
    from training.generation import GeneratorFactory

ABOUT: Final = """Train and judge an adapter for each point of a grid, the base loaded once; compare them in a table.

    lorikeet sweep --data rows.jsonl --grid r=8,16 --grid alpha=16,32

Axes multiply. A finished experiment is not run again when the sweep is. Each key of a recipe is a flag."""
OPTIONS: Final = (
    option("recipe", RecipeFile),
    option("out", Out),
    value("grid", list[str] | None, "KEY=VALUES|FILE", "r=8,16; may be repeated. Or a YAML file of axes."),
    value("best_by", str | None, "METRIC", "The number that the best has most of.  [default: bleu]"),
    option("as_json", AsJson, False),
)


def sweep_command(make_generator: GeneratorFactory) -> Callable[[typer.Context], None]:
    """The command; ``make_generator`` is the serving engine's."""

    def command(ctx: typer.Context) -> None:
        """Train and judge a grid of recipes over one loaded base. --help lists every key of a recipe."""
        parse(ctx.args, "sweep", ABOUT, partial(_sweep, make_generator), OPTIONS)

    return command


def _sweep(make_generator: GeneratorFactory, flags: Mapping[str, object], own: Mapping[str, object]) -> None:
    from training.commands.ending import ending
    from training.commands.train import folder_of, resolve
    from training.loop.processes import join_processes
    from training.run.outcome import Exit, RunResult
    from training.run.progress import open_progress
    from training.run.run import Surroundings
    from training.run.sweeping import SweepRequest, sweep
    from training.sweep.sweep import experiments_of, parse_axis, read_axes

    with ending() as end:
        end.is_told = True
        resolved = resolve(flags, own)
        grid = own["grid"]
        axes = [
            axis
            for text in (grid if isinstance(grid, list) else [])
            for axis in (read_axes(Path(text)) if "=" not in text else (parse_axis(text),))
        ]
        request = SweepRequest(
            resolve=lambda changes: resolve({**flags, **changes}, own),
            resolved=resolved,
            experiments=experiments_of(axes),
            folder=folder_of(own, f"{resolved.recipe.name or 'adapter'}-sweep"),
            best_by=str(own["best_by"] or "bleu"),
        )
        table = sweep(request, Surroundings(make_generator, open_progress(), join_processes()))
        typer.echo(json.dumps(table.as_json()) if own["as_json"] else table.text())
        end.result = RunResult(Exit.DONE if table.best is not None else Exit.FAILED, request.folder)
