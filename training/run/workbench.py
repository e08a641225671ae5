"""Workbench: what the experiments of one data set share, and the steps that each goes through.

    model = bench.attach(recipe); bench.gradients(model, recipe)
    trained = bench.train(model, recipe, folder); verdict = bench.judge(trained, recipe)

A run is one experiment, a sweep several over the same base. Owns: the rows as examples, the base's answers (which never
change), and how training's pieces are put together. Does not know: run folders' names for things, gates' consequences,
packages. Place in a training run: from "attach" to "judge".
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from base.probes import probe_prompts
from training.data.labels import Labeller
from training.evaluation import AnswerMemory, Judging, SampleBook, Verdict, evaluate
from training.evaluation.text import plain
from training.generation import Generator, GeneratorFactory
from training.loop.observer import EvalHook, EvalReport, StepReport, TrainOutcome
from training.loop.ranks import Ranks
from training.loop.trainer import train
from training.loop.validation import Validation
from training.model.batch import Batch
from training.model.collator import Collator, Examples
from training.model.gradients import GradientTable, gradient_table
from training.model.model import AdaptedBase
from training.package.proof import trainer_logits
from training.recipe.recipe import Recipe
from training.run.bases import Bases
from training.run.data import RunData
from training.run.progress import Bar, Pace, Progress
from training.targets.targets import resolve_targets

WEIGHTS_DTYPE: Final = torch.float32
"""Of the adapter's file: the very bits that were trained, which a server on a CPU computes with."""


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter on disk, and what could only be asked of the model that trained it."""

    adapter: Path
    """A plain PEFT folder."""
    outcome: TrainOutcome
    losses: Mapping[bool, float]
    """Held out: with the adapter and without; empty without rows."""
    logits: tuple[Tensor, ...]  # each [V] float32
    """The trainer's own, of the probe prompts."""


class Workbench:
    """One data set, its bases, and who writes answers."""

    def __init__(
        self, data: RunData, bases: Bases, make_generator: GeneratorFactory, progress: Progress, ranks: Ranks
    ) -> None:
        self.data, self.bases = data, bases
        self._make_generator, self._progress, self._ranks = make_generator, progress, ranks
        self._labeller = Labeller(data.processor)
        self._train = Examples(data.train, self._labeller)
        self._held_out = Examples(data.held_out, self._labeller) if data.held_out else None
        self._memory = AnswerMemory()
        """The serving base's answers."""

    def data_facts(self) -> dict[str, object]:
        """For a package: which rows, how many, and how many labels they had."""
        report = self.data.report
        return {
            "digest": report.train.digest,
            "rows": len(self.data.train),
            "labels": sum(self._train.num_labels),
            "held_out": len(self.data.held_out),
            "held_out_digest": report.eval.digest if report.eval else None,
            "bad_rows": report.num_bad_rows,
        }

    # ---- before the first step

    def attach(self, recipe: Recipe) -> AdaptedBase:
        """An adapter of ``recipe`` on the training base. Raises TargetsError, and as ``load_base``."""
        base = self.bases.training()
        with self._progress.phase("attach") as bar:
            model = AdaptedBase(base, resolve_targets(recipe, base.module), recipe)
            bar.advance(len(model.targets.modules), "linears")
        return model

    def gradients(self, model: AdaptedBase, recipe: Recipe) -> GradientTable:
        """Of the first rows, and the first one with a picture. Not checked yet."""
        chosen = list(range(min(recipe.micro_batch, len(self._train))))
        pictured = (index for index in range(len(self._train)) if self._train[index].row.pictures)
        first = next(pictured, None)
        chosen += [first] if first is not None and first not in chosen else []
        with self._progress.phase("check gradients"):
            return gradient_table(model, self._batch(self._train, chosen).to(model.base.device))

    # ---- the run

    def train(
        self, model: AdaptedBase, recipe: Recipe, folder: Path, *, is_resumed: bool = False
    ) -> TrainOutcome:
        """The loop, with samples at each evaluation. Raises what ``trainer.train`` does."""
        hook = self._sampling(model, recipe, folder) if self._ranks.is_first else None
        with self._progress.phase("train") as bar:
            observer = _Watcher(bar, self._progress)
            return train(
                model,
                self._train,
                self._held_out,
                recipe,
                folder,
                observer,
                eval_hook=hook,
                resume=is_resumed,
            )

    def finish(self, model: AdaptedBase, recipe: Recipe, outcome: TrainOutcome, folder: Path) -> Trained:
        """Write the weights, and ask the model what only it can say. On the first process, alone."""
        model.save(folder, WEIGHTS_DTYPE)
        losses: dict[bool, float] = {}
        if self._held_out is not None:
            held_out = Validation(self._held_out, Collator(self._labeller), recipe.micro_batch, Ranks())
            with self._progress.phase("held-out loss"):
                losses[True] = held_out.loss(model)
                with model.disabled():
                    losses[False] = held_out.loss(model)
        ask = trainer_logits(model)
        logits = tuple(ask(prompt) for prompt in probe_prompts(self.data.processor))
        return Trained(folder, outcome, losses, logits)

    def judge(self, trained: Trained, recipe: Recipe) -> Verdict:
        """By the answers of the serving engine on the serving base. The training model must be off its base.

        Raises EvaluationError, AdapterError, RowRejected.
        """
        base = self.bases.serving()
        with _Answering(self._progress) as told:
            return evaluate(
                self.generator,
                base.processor,
                self.data.held_out,
                trained.adapter,
                Judging.of(recipe, base.spec.name),
                losses=lambda rows, with_adapter: trained.losses[with_adapter],
                memory=self._memory,
                progress=told,
            )

    def generator(self) -> AbstractContextManager[Generator]:
        """Over the serving base."""
        return closing(self._make_generator(self.bases.serving()))

    # ---- between steps

    def _sampling(self, model: AdaptedBase, recipe: Recipe, folder: Path) -> EvalHook | None:
        """A few held-out rows answered at each evaluation, by the engine on the training base."""
        if not recipe.sample_rows or not self.data.held_out:
            return None
        book = SampleBook(
            folder, self.data.held_out, self.data.processor,
            num_rows=recipe.sample_rows, max_tokens=recipe.max_new_tokens,
        )  # fmt: skip

        def take(step: int) -> Mapping[str, float]:
            with tempfile.TemporaryDirectory(prefix="lorikeet-samples-") as place, model.bare():
                adapter = Path(place)
                model.save(adapter)
                with closing(self._make_generator(model.base)) as generator:
                    samples = book.take(step, generator, adapter)
            right = sum(plain(sample.adapter) == plain(sample.question.gold) for sample in samples)
            return {"samples_exact": right / len(samples)}

        return take

    def _batch(self, examples: Examples, indices: Sequence[int]) -> Batch:
        return Collator(self._labeller)([examples[index] for index in indices])


class _Watcher:
    """A TrainObserver that moves a bar."""

    def __init__(self, bar: Bar, progress: Progress) -> None:
        self._bar, self._progress = bar, progress

    def on_step(self, report: StepReport) -> None:
        pace = Pace(report.loss, report.tokens_per_s, report.memory_bytes, report.seconds_left)
        self._bar.reach(report.step, str(pace), report.num_steps)

    def on_eval(self, report: EvalReport) -> None:
        facts = {"held-out loss": report.loss, **report.scores}
        told = ", ".join(f"{name} {value:.4f}" for name, value in facts.items() if value is not None)
        self._progress.note(
            f"step {report.step}: {told or 'nothing held out'}{' (best)' if report.is_best else ''}"
        )

    def on_note(self, text: str) -> None:
        self._progress.note(text)


class _Answering:
    """Judging's phases as bars, one after another. Use as a context."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._open = ExitStack()
        self._bar: Bar | None = None

    def begin(self, phase: str, total: int) -> None:
        self._open.close()
        self._bar = self._open.enter_context(self._progress.phase(phase, total))

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance()

    def __enter__(self) -> _Answering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
