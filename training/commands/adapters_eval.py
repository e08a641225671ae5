"""`lorikeet adapters eval`: a package judged on held-out rows, and whether it may pass.

Owns its options and what they mean in a recipe's words. Statuses as in ``commands/adapters.py``; 3 where a rule of the
gate does not hold. Imports what it needs when it runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from training.generation import GeneratorFactory
    from training.recipe.recipe import Recipe

FAILED, REFUSED, GATE = 1, 2, 3
DEFAULT_GATE = "loss <= base"


def eval_command(make_generator: GeneratorFactory) -> Callable[..., None]:
    """The command, with the engine that it generates by."""

    def eval_(
        adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT adapter.")],
        data: Annotated[
            list[str],
            typer.Option(metavar="FILE", help="Held-out rows, of any format that trains; repeatable."),
        ],
        base: Annotated[
            str,
            typer.Option(
                metavar="BASE", help="pocket, a folder or a hub id. Default: what the adapter names."
            ),
        ] = "",
        revision: Annotated[str | None, typer.Option(metavar="REV", help="Of a hub id.")] = None,
        gate: Annotated[
            list[str] | None,
            typer.Option(
                metavar="RULE", help=f"Such as 'exact_match >= base + 0.1'. Default: {DEFAULT_GATE}."
            ),
        ] = None,
        metric: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="Of answers; repeatable. Default: all that apply."),
        ] = None,
        rows: Annotated[
            int, typer.Option(metavar="N", min=1, help="Rows that answers are generated for.")
        ] = 200,
        max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Of an answer.")] = 256,
        max_length: Annotated[
            int, typer.Option(metavar="N", min=8, help="Tokens of a row, pictures included.")
        ] = 2048,
        micro_batch: Annotated[int, typer.Option(metavar="N", min=1, help="Rows at once, for the loss.")] = 4,
        data_root: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Pictures lie in it.")] = None,
        columns: Annotated[
            list[str] | None, typer.Option(metavar="FILE=FORMAT", help="Rename a column; repeatable.")
        ] = None,
        skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave faulty rows out.")] = False,
        loss: Annotated[bool, typer.Option(help="Compute the held-out loss too.")] = True,
        out: Annotated[
            Path | None, typer.Option(metavar="FOLDER", help="Write scores and all answers there.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
    ) -> None:
        """Judge a package on held-out rows beside its base: loss, answers, use of pictures, general ability.

        Ends with status 3 when a rule of the gate does not hold: the default refuses an adapter worse than the base.
        """
        from training.recipe.recipe import Recipe

        recipe = Recipe(
            base=base,
            revision=revision,
            eval=tuple(data),
            data_root=data_root,
            columns=_pairs(columns or []),
            on_bad="skip" if skip_bad else "error",
            metrics=tuple(metric or ()),
            gate=tuple(gate or ((DEFAULT_GATE,) if loss else ())),
            eval_rows=rows,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            micro_batch=micro_batch,
        )
        _judge(adapter, recipe, loss, make_generator, out, as_json)

    return eval_


def _judge(
    adapter: Path,
    recipe: Recipe,
    has_loss: bool,
    make_generator: GeneratorFactory,
    out: Path | None,
    as_json: bool,
) -> None:
    with _refusing(), tempfile.TemporaryDirectory() as work:
        from training.commands.phases import Phases
        from training.run.progress import open_progress
        from training.tools.appraisal import Appraisal, appraise

        with Phases(open_progress()) as phases:
            asked = Appraisal(adapter, recipe, has_loss)
            verdict = appraise(asked, make_generator, phases, phases, Path(work))
        if out is not None:
            verdict.write(out)
    if as_json:
        import orjson

        typer.echo(orjson.dumps(verdict.as_json()).decode())
    else:
        typer.echo(verdict.text())
    if not verdict.passed:
        raise typer.Exit(GATE)


def _pairs(columns: list[str]) -> dict[str, str]:
    pairs = dict(column.partition("=")[::2] for column in columns)
    wrong = [name for name, meant in pairs.items() if not name or not meant]
    if wrong:
        raise typer.BadParameter(f"--columns takes NAME=FIELD, not {wrong[0]!r}")
    return pairs


@contextmanager
def _refusing() -> Iterator[None]:
    """What cannot be judged is one message on stderr: status 2, or 1 when judging broke off."""
    from adapters.errors import AdapterError
    from base.errors import BaseError
    from training.data.dataset import DataRejected
    from training.data.faults import RowRejected
    from training.data.hub import DataSourceError
    from training.evaluation.errors import EvaluationError
    from training.tools.refusals import ToolRefused

    try:
        yield
    except (ToolRefused, AdapterError, BaseError, DataRejected, DataSourceError, EvaluationError) as error:
        typer.echo(f"lorikeet: {error}", err=True)
        raise typer.Exit(REFUSED) from error
    except (OSError, RowRejected) as error:
        typer.echo(f"lorikeet: judging broke off: {error}", err=True)
        raise typer.Exit(FAILED) from error
