"""The last phases of a run: what was learnt and judged becomes a package.

Owns: which facts of a run its package tells, and that no path of this machine is among them; where a package lies that
did not pass its gate. Does not know: how packages are written (`package.py`). Place in a training run: after "judge".
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

from adapters.profile import GateFacts, RecordedProbe
from training.data.hub import SCHEME
from training.evaluation import Verdict
from training.loop.plots import PLOT
from training.package.package import PackageFacts, base_facts, processor_facts, write_package
from training.package.proof import Agreement, agreement, record_probes
from training.recipe.recipe import Recipe
from training.recipe.sources import recipe_as_dict
from training.run.rundir import RunFolder
from training.run.workbench import Trained, Workbench

LIBRARIES: Final = (
    "lorikeet",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "tokenizers",
)


@dataclass(frozen=True, slots=True)
class RunProof:
    """What the serving engine says of an adapter, before it is judged."""

    probes: tuple[RecordedProbe, ...]
    agreed: Agreement
    """How far the trainer's logits are from the served ones."""


def prove(bench: Workbench, trained: Trained) -> RunProof:
    """Ask the probes. Raises AdapterError."""
    processor = bench.bases.serving().processor
    with bench.generator() as generator:
        probes = record_probes(generator, processor, trained.adapter)
        return RunProof(probes, agreement(trained.logits, generator, processor, trained.adapter))


def write_run_package(
    folder: RunFolder,
    recipe: Recipe,
    bench: Workbench,
    trained: Trained,
    proof: RunProof,
    verdict: Verdict | None,
) -> Path:
    """Write the package, where its gate's outcome puts it; its folder. Raises FolderRefused."""
    base = bench.bases.serving()
    facts = PackageFacts(
        name=recipe.name,
        base=base_facts(base),
        processor=processor_facts(base.processor),
        recipe=published(recipe),
        data=bench.data_facts(),
        scores=verdict.adapter if verdict else {},
        base_scores=verdict.base if verdict else {},
        gate=GateFacts(verdict.passed, verdict.gate.lines) if verdict else None,
        environment=_environment(trained, proof.agreed),
        probes=proof.probes,
    )
    place, other = folder.package, folder.refused_package
    if verdict is not None and not verdict.passed:
        place, other = other, place
    written = write_package(place, trained.adapter, facts, beside=_beside(folder), replace=True)
    if other.exists():
        shutil.rmtree(other)
    return written


def published(recipe: Recipe) -> dict[str, object]:
    """The recipe as others may read it: files by their names alone."""
    values = {key: value for key, value in recipe_as_dict(recipe).items() if key != "data_root"}
    for key in ("data", "eval"):
        listed = getattr(recipe, key)
        values[key] = [source if source.startswith(SCHEME) else Path(source).name for source in listed]
    is_folder = Path(recipe.base).is_dir()
    return values | {"base": Path(recipe.base).resolve().name if is_folder else recipe.base}


def _beside(folder: RunFolder) -> list[Path]:
    """Loss curve and last samples, those of them that there are."""
    sheets = sorted(folder.root.glob("samples-*.png"))
    if sheets:
        shutil.copyfile(sheets[-1], folder.samples_sheet)
    found = (folder.root / PLOT, folder.samples_sheet, folder.samples)
    return [path for path in found if path.exists()]


def _environment(trained: Trained, agreed: Agreement) -> Mapping[str, object]:
    outcome = trained.outcome
    return {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu ({platform.machine()})",
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "steps": outcome.num_steps,
        "best_step": outcome.best_step,
        "seconds": round(outcome.seconds, 1),
        "tokens_per_s": round(outcome.tokens_per_s, 1),
        "peak_bytes": outcome.peak_bytes,
        "trainer_difference": agreed.max_difference,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
