"""A base that is tiny and random, rows for it, and a run of a few steps; shared by the tests of the loop."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from base.model import BaseModel
from tests.support.checkpoints import make_checkpoint
from tests.training.learnable import make_base, pictured, row
from training.data.formats import Conversation
from training.data.labels import Labeller
from training.loop.observer import EvalHook, EvalReport, StepReport, TrainOutcome
from training.loop.trainer import train
from training.model.collator import Examples
from training.model.model import AdaptedBase
from training.recipe.recipe import Recipe
from training.targets.targets import resolve_targets


@lru_cache(maxsize=1)
def tiny_base() -> BaseModel:
    """In fp32; one for all tests, each of which attaches and detaches."""
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(str(make_checkpoint(Path(folder) / "tiny", hidden=64, mlp=96, vocab=448, seed=3)))
    gc.collect()
    gc.freeze()  # transformers' loop collects garbage at its start, through all that was ever imported
    return base


def words(count: int) -> list[Conversation]:
    """Text rows with answers of one to four words."""
    told = "circle fox dog image"
    return [row(f"How many {i}?", " ".join(told.split()[: 1 + i % 4]), line=i + 1) for i in range(count)]


def mixed(count: int) -> list[Conversation]:
    """Every other row with a picture."""
    return [one for pair in zip(words(count), pictured(count), strict=True) for one in pair][:count]


def tiny_recipe(**fields: object) -> Recipe:
    """Twelve rows make three steps an epoch."""
    small: dict[str, object] = {
        "r": 4, "alpha": 8.0, "dropout": 0.1, "lr": 1e-2, "epochs": 2, "micro_batch": 2, "accumulation": 2,
        "precision": "fp32", "warmup_steps": 0,
    }  # fmt: skip
    displaced = {"epochs": None} if "max_steps" in fields or "stages" in fields else {}
    return Recipe(**{**small, **displaced, **fields})  # type: ignore[arg-type]


@dataclass(slots=True)
class Listener:
    """Hears everything; ``then`` is called after each step with its number."""

    then: Callable[[int], None] | None = None
    steps: list[StepReport] = field(default_factory=list)
    evals: list[EvalReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)
        if self.then is not None:
            self.then(report.step)

    def on_eval(self, report: EvalReport) -> None:
        self.evals.append(report)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


@contextmanager
def adapted(recipe: Recipe, base: BaseModel | None = None) -> Iterator[AdaptedBase]:
    base = tiny_base() if base is None else base
    model = AdaptedBase(base, resolve_targets(recipe, base.module), recipe)
    try:
        yield model
    finally:
        model.detach()


def examples(rows: Sequence[Conversation], base: BaseModel | None = None) -> Examples:
    return Examples(rows, Labeller((tiny_base() if base is None else base).processor))


@dataclass(frozen=True, slots=True)
class Run:
    """What one run left."""

    outcome: TrainOutcome
    state: Mapping[str, object]
    """The adapter."""
    heard: Listener


def run(
    folder: Path,
    recipe: Recipe,
    rows: Sequence[Conversation] | None = None,
    held_out: Sequence[Conversation] | None = None,
    *,
    listener: Listener | None = None,
    hook: EvalHook | None = None,
    resume: bool = False,
) -> Run:
    """On a fresh adapter."""
    heard = Listener() if listener is None else listener
    with adapted(recipe) as model:
        outcome = train(
            model, examples(words(12) if rows is None else rows), None if held_out is None else examples(held_out),
            recipe, folder, heard, eval_hook=hook, resume=resume,
        )  # fmt: skip
        return Run(outcome, model.state(), heard)
