"""The first phase of a run: its data found, checked, and split where no evaluation file is given.

Owns: how a recipe's words on data become checked rows, and what the run folder's data.json holds. Does not know:
models. Place in a training run: before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from base.config import BaseConfig
from base.loader import open_processor
from base.processor import Processor
from training.data.dataset import DataRejected, DataRules, check_data
from training.data.formats import Conversation
from training.data.heldout import hold_out
from training.data.hub import find_files
from training.data.report import DataReport
from training.loop.ranks import Ranks
from training.recipe.recipe import Recipe
from training.run.progress import Progress
from training.run.rundir import RunFolder


@dataclass(frozen=True, slots=True)
class RunData:
    """Rows to train on and to be judged on, and the processor that they were checked with."""

    train: tuple[Conversation, ...]
    held_out: tuple[Conversation, ...]
    report: DataReport
    processor: Processor

    def as_json(self) -> dict[str, object]:
        """The report, with how many of its training rows were held out."""
        num_split = 0 if self.report.eval is not None else len(self.held_out)
        return {
            **self.report.as_json(),
            "trained": len(self.train),
            "held_out": len(self.held_out),
            "split": num_split,
        }

    def text(self) -> str:
        if self.report.eval is not None:
            return self.report.text()
        if not self.held_out:
            return f"{self.report.text()}\nheld out: none of the rows, so nothing is judged: --eval FILE names some"
        return f"{self.report.text()}\nheld out: {len(self.held_out)} of the rows, chosen by what they ask"


def serving_config(recipe: Recipe) -> BaseConfig:
    """The base as a server would hold it: what an adapter is judged and probed on."""
    return BaseConfig(
        source=recipe.base,
        revision=recipe.revision,
        min_pixels=recipe.min_pixels,
        max_pixels=recipe.max_pixels,
    )


def gather(
    recipe: Recipe, hub_folder: Path, folder: RunFolder | None, progress: Progress, ranks: Ranks
) -> RunData:
    """Find, check and split; the first process fetches. ``folder`` gets the report, and the faults of rows left out.

    Raises DataSourceError for a file that cannot be had, DataRejected, and as ``open_processor`` does.
    """
    if not ranks.is_first:
        ranks.wait()
    train, held_out = (find_files(sources, hub_folder) for sources in (recipe.data, recipe.eval))
    if ranks.is_first:
        ranks.wait()
    processor = open_processor(serving_config(recipe))
    try:
        with progress.phase("check data") as bar:
            checked = check_data(train, processor, _rules(recipe, folder), eval=held_out, on_row=bar.advance)
    except DataRejected as rejected:
        if folder is not None:
            folder.write_json(folder.data, rejected.report.as_json())
        raise
    rows: tuple[Sequence[Conversation], Sequence[Conversation]] = (checked.train, checked.eval)
    if not recipe.eval:
        rows = hold_out(checked.train, recipe.eval_split)
    data = RunData(tuple(rows[0]), tuple(rows[1]), checked.report, processor)
    if folder is not None:
        folder.write_json(folder.data, data.as_json())
    return data


def _rules(recipe: Recipe, folder: RunFolder | None) -> DataRules:
    """Only a run folder has a place for what is put in quarantine; elsewhere it is left out alike."""
    is_kept = recipe.on_bad == "quarantine" and folder is not None
    return DataRules(
        max_length=recipe.max_length,
        on_bad="skip" if recipe.on_bad == "quarantine" and not is_kept else recipe.on_bad,
        quarantine=folder.quarantine if is_kept and folder is not None else None,
        root=recipe.data_root,
        kind=recipe.format,
        columns=recipe.columns,
    )
