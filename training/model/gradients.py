"""gradient_table: does everything that should learn get a gradient? Asked once, of one real batch, before step 1.

An adapter whose merger sits behind a cut graph trains without an error and learns nothing there. So each module is
judged by the gradient of its B: at the start B is 0, and A's gradient with it, whatever the graph. Owns: that
judgement, and its excuses: a batch without pictures says nothing of the merger and the vision tower.

Does not know: optimizers, files. Place in a training run: after attaching, before the first step; kept in the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

import torch
from torch import Tensor

from adapters.sites import PARTS
from training.model.batch import Batch
from training.model.model import AdaptedBase
from training.recipe.recipe import Part

_SHOWN: Final = 5
_SEES: Final[tuple[Part, ...]] = ("merger", "vision")


class DeadModules(Exception):
    """Modules of the adapter that would learn nothing. Carries the table."""

    def __init__(self, table: GradientTable) -> None:
        self.table = table
        names = [name for row in table.rows for name in row.dead]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        super().__init__(
            f"{len(names)} modules of the adapter get no gradient: {', '.join(names[:_SHOWN])}{more}; "
            f"they would learn nothing. Take their part out of the preset, or report this with the table:\n"
            f"{table.text()}"
        )


@dataclass(frozen=True, slots=True)
class PartGradients:
    """What one part of the adapter got from one batch."""

    part: Part
    num_tensors: int
    num_parameters: int
    norm: float
    """Of all its gradients together, of the mean loss."""
    dead: tuple[str, ...]
    """Modules whose B got none."""
    excuse: str = ""
    """Why its modules are not judged by this batch."""


@dataclass(frozen=True, slots=True)
class GradientTable:
    """One row for each part that learns."""

    rows: tuple[PartGradients, ...]
    loss: float
    """Mean per label."""
    num_labels: int
    num_images: int

    def text(self) -> str:
        lines = [f"{'part':<10}{'tensors':>8}{'numbers':>14}{'norm':>12}  dead"]
        for row in self.rows:
            dead = row.excuse or (", ".join(row.dead[:_SHOWN]) if row.dead else "none")
            more = f" and {len(row.dead) - _SHOWN} more" if len(row.dead) > _SHOWN else ""
            lines.append(
                f"{row.part:<10}{row.num_tensors:>8}{row.num_parameters:>14,}{row.norm:>12.3e}  {dead}{more}"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def check(self) -> None:
        """Raises DeadModules if a module that learns got no gradient."""
        if any(row.dead for row in self.rows):
            raise DeadModules(self)


def gradient_table(model: AdaptedBase, batch: Batch) -> GradientTable:
    """One forward and backward pass as a step makes them; weights, gradients and random numbers stay as they were."""
    parameters = model.trainable()
    devices = [model.base.device] if model.base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        loss = model(batch)
        mean = loss.total / loss.num_labels
        found = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
    gradients = dict(zip(parameters, found, strict=True))
    rows = tuple(_row(model, part, gradients, batch) for part in PARTS if part in model.learning)
    return GradientTable(rows, float(mean.detach()), loss.num_labels, len(batch.grids))


def _row(
    model: AdaptedBase, part: Part, gradients: Mapping[str, Tensor | None], batch: Batch
) -> PartGradients:
    own = {name: gradient for name, gradient in gradients.items() if model.part_of(name) == part}
    parameters = model.trainable()
    is_excused = part in _SEES and not batch.grids
    norms = [gradient.float().norm() for gradient in own.values() if gradient is not None]
    return PartGradients(
        part=part,
        num_tensors=len(own),
        num_parameters=sum(parameters[name].numel() for name in own),
        norm=float(torch.stack(norms).norm()) if norms else 0.0,
        dead=() if is_excused else _dead(own),
        excuse="no picture in this batch" if is_excused else "",
    )


def _dead(gradients: Mapping[str, Tensor | None]) -> tuple[str, ...]:
    return tuple(
        name.split("base_model.model.")[-1].split(".lora_B")[0]
        for name, gradient in gradients.items()
        if ".lora_B." in name and (gradient is None or not bool(gradient.any()))
    )
