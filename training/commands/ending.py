"""ending: how the commands of a run end: a word or a JSON line, and the status of the process.

Owns: that every end has one of the documented statuses. What is not a known error keeps its traceback: it is ours.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from training.run.failures import refusing
from training.run.outcome import Broken, Exit, Refused, RunResult


@dataclass(slots=True)
class Ending:
    """What the command will say last."""

    result: RunResult | None = None
    is_told: bool = False
    """Whether the command says its result itself."""
    is_silent: bool = False
    """On all processes but the first."""


@contextmanager
def ending(*, is_json: bool = False) -> Iterator[Ending]:
    """Run the block, then say its result and exit with its status."""
    _quiet_libraries()
    end = Ending()
    reason = ""
    try:
        with refusing():
            yield end
    except Refused as error:
        end.result, reason = RunResult(Exit.REFUSED, None), str(error)
    except Broken as error:
        end.result, reason = RunResult(Exit.FAILED, None), str(error)
    except KeyboardInterrupt:
        end.result, reason = RunResult(Exit.INTERRUPTED, None), "interrupted"
    result = end.result or RunResult(Exit.FAILED, None)
    if not end.is_silent:
        _say(result, reason, is_json=is_json, is_told=end.is_told and not reason)
    raise typer.Exit(int(result.status))


def _say(result: RunResult, reason: str, *, is_json: bool, is_told: bool) -> None:
    if reason:
        typer.echo(f"lorikeet: {reason}", err=True)
    if is_json:
        said = result.as_json() | ({"error": reason} if reason else {})
        typer.echo(json.dumps(said, ensure_ascii=False))
    elif not reason and not is_told:
        typer.echo(_told(result))


def _told(result: RunResult) -> str:
    """What is left to say when the phases have said theirs."""
    facts = result.facts or {}
    places = {"run folder": result.folder, "package": result.package, "live": facts.get("ref")}
    return "\n".join(
        [result.status.meaning, *(f"{name}: {place}" for name, place in places.items() if place)]
    )


def _quiet_libraries() -> None:
    """What libraries say to their own developers is not for whoever trains an adapter."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
