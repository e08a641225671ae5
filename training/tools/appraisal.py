"""appraise: a finished adapter judged on rows that it has not seen, beside its base. The work of ``adapters eval``.

Owns: how a package becomes what ``evaluation.judge`` asks for: its loss on the training base, its answers by the
serving engine, one base in memory at a time. Does not know: engines (a factory is given), what is done with a verdict.
Place in a training run: none; after it, also for adapters that were trained elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from torch import Tensor

from adapters.sites import Site
from base.errors import PromptError
from base.loader import open_processor
from training.data.dataset import DataRules, check_data
from training.data.formats import Conversation
from training.data.hub import find_files
from training.data.labels import Labeller
from training.evaluation import HeldOutLoss, Judging, Verdict, check_judging, evaluate
from training.evaluation.answers import Progress as AnswerProgress
from training.evaluation.loss import unaugmented
from training.generation import Generator, GeneratorFactory
from training.model.model import AdaptedBase
from training.recipe.recipe import Recipe
from training.run.bases import Bases
from training.run.data import serving_config
from training.run.progress import Progress
from training.targets.pattern import pattern_of
from training.targets.targets import Target, Targets
from training.tools.base_files import base_meant, open_base
from training.tools.plain import ReadAdapter, part_of, read_adapter
from training.tools.refusals import ToolRefused

_WRAPPER: Final = "base_model.model."


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What is judged, and by what. ``recipe`` says base, rows, metrics, gate and bounds, as it does for a run."""

    adapter: Path
    recipe: Recipe
    """Its ``eval`` names the rows; an empty ``base`` is the one that the adapter names."""
    has_loss: bool = True


def appraise(
    asked: Appraisal,
    make_generator: GeneratorFactory,
    progress: Progress,
    answering: AnswerProgress,
    work: Path,
) -> Verdict:
    """Judge a package. ``work`` is a folder for what is fetched from the hub.

    Raises ToolRefused, AdapterError, DataRejected, DataSourceError, EvaluationError, BaseError.
    """
    recipe = _with_base(asked)
    files = find_files(recipe.eval, work)
    with open_base(recipe.base, recipe.revision) as base:
        read, sites, name = read_adapter(asked.adapter, base.sites), base.sites, base.checkpoint.name
    judging = Judging.of(recipe, name)
    processor = open_processor(serving_config(recipe))
    with progress.phase("check data") as bar:
        rows = check_data(files, processor, _rules(recipe), on_row=bar.advance).train
    check_judging(judging, rows, has_loss=asked.has_loss)  # before minutes go into it
    bases = Bases(recipe, progress)
    losses = _losses(recipe, bases, read, sites, rows, progress) if asked.has_loss else None
    return evaluate(
        _opener(bases, make_generator),
        processor,
        rows,
        asked.adapter,
        judging,
        losses=losses,
        progress=answering,
    )


def _with_base(asked: Appraisal) -> Recipe:
    source = base_meant(read_adapter(asked.adapter).manifest.base_name, asked.recipe.base or None)
    if not source:
        raise ToolRefused("the adapter does not say which base it is for: name it with --base")
    if not asked.recipe.eval:
        raise ToolRefused("no rows to judge it on: name a file with --data")
    return replace(asked.recipe, base=source)


def _rules(recipe: Recipe) -> DataRules:
    return DataRules(
        max_length=recipe.max_length,
        on_bad="skip" if recipe.on_bad == "skip" else "error",
        root=recipe.data_root,
        kind=recipe.format,
        columns=recipe.columns,
    )


def _losses(
    recipe: Recipe,
    bases: Bases,
    read: ReadAdapter,
    sites: Mapping[str, Site],
    rows: Sequence[Conversation],
    progress: Progress,
) -> Callable[[Sequence[Conversation], bool], float]:
    """Both losses, computed now, so that the training base is free before the serving base is loaded."""
    base = bases.training()
    model = AdaptedBase(base, targets_of(read, sites), recipe)
    model.load_state(state_of(read))
    try:
        loss = HeldOutLoss(model, unaugmented(Labeller(base.processor), recipe.micro_batch))
        with progress.phase("loss", 2) as bar:
            found = {}
            for with_adapter in (True, False):
                found[with_adapter] = loss(rows, with_adapter)
                bar.advance()
    except PromptError as error:
        raise ToolRefused(f"a row cannot be made into a prompt for this base: {error}") from error
    finally:
        model.detach()
    return lambda _, with_adapter: found[with_adapter]


def targets_of(read: ReadAdapter, sites: Mapping[str, Site]) -> Targets:
    """The modules that a package acts on, its scales folded into B: alpha is the rank everywhere."""
    modules = tuple(
        Target(
            name=name,
            part=part_of(name),
            leaf=sites[name].leaf,
            in_features=sites[name].in_features,
            out_features=sites[name].out_features,
            r=weights.a.shape[0],
            alpha=float(weights.a.shape[0]),
        )
        for name, weights in read.weights.sites.items()
    )
    pattern = pattern_of([sites[target.name] for target in modules], sites)
    return Targets(modules, pattern, rslora=False, dora=read.manifest.use_dora, dropout=0.0)


def state_of(read: ReadAdapter) -> dict[str, Tensor]:
    """A package's weights by the names of PEFT's file in today's layout, float32, scales folded into B."""
    state: dict[str, Tensor] = {}
    for name, site in read.weights.sites.items():
        state[f"{_WRAPPER}{name}.lora_A.weight"] = site.a
        state[f"{_WRAPPER}{name}.lora_B.weight"] = site.b
        if site.magnitude is not None:
            state[f"{_WRAPPER}{name}.lora_magnitude_vector"] = site.magnitude
    return state


def _opener(
    bases: Bases, make_generator: GeneratorFactory
) -> Callable[[], AbstractContextManager[Generator]]:
    @contextmanager
    def opened() -> Iterator[Generator]:
        with closing(make_generator(bases.serving())) as generator:
            yield generator

    return opened
