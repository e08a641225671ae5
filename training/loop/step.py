"""GradientStep: the gradient of one optimizer step, however many micro-batches and processes share its rows.

The loss of a step is the sum over its labels divided by their number, all micro-batches and all processes counted. A
mean of the micro-batches' means would weigh a label the more the fewer stand beside it; here each counts once, so the
gradient is that of one big batch. Processes add their gradients after their last micro-batch: a parameter that no
process used keeps none, as it would alone, and a process without rows or without a graph in this step waits for nobody.

Each micro-batch draws its dropout from a stream of its own, seeded by the recipe's seed, the step and its place in the
step. So a resumed run, a run with evaluations in between, and a run on more processes draw the same, and the streams of
whoever called are left as they were.

Owns: that arithmetic, clipping, and the refusal of what is no number. Does not know: optimizers, stages, files.
Place in a training run: once for each optimizer step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from training.loop.observer import NonFiniteLoss

if TYPE_CHECKING:
    from training.data.faults import Origin
    from training.loop.ranks import Ranks
    from training.model.batch import Batch
    from training.model.model import AdaptedBase
    from training.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True, eq=False)
class StepInput:
    """What one process has of one step."""

    step: int
    """From 0."""
    batches: tuple[Batch, ...]
    """May be none, where a step has fewer micro-batches than there are processes."""
    places: tuple[int, ...]
    """Of each batch, its number among the step's micro-batches."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of all processes together."""

    loss: float
    grad_norm: float
    """Before clipping."""
    num_labels: int
    num_tokens: int


class GradientStep:
    """Leaves gradients in the parameters; takes no step."""

    def __init__(self, model: AdaptedBase, recipe: Recipe, ranks: Ranks) -> None:
        self._model = model
        self._recipe = recipe
        self._ranks = ranks
        self._device = model.base.device

    def run(self, step: StepInput) -> StepResult:
        """Add the step's gradient to the parameters' (which are None). Raises NonFiniteLoss on every process."""
        num_labels, num_tokens = self._counts(step.batches)
        totals = [
            self._micro(step.step, place, batch, num_labels)
            for place, batch in zip(step.places, step.batches, strict=True)
        ]
        parameters = list(self._model.trainable().values())
        sum_gradients(parameters, self._ranks)
        norm = self._clip(parameters)
        loss = self._loss(totals, num_labels)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(step.step + 1, loss, norm, self._suspects(step, totals))
        return StepResult(loss, norm, num_labels, num_tokens)

    def _micro(self, step: int, place: int, batch: Batch, num_labels: int) -> Tensor:
        """[] float32, the sum over the batch's labels; its gradient divided by the step's labels."""
        with stream(self._recipe.seed, step, place, self._device):
            total: Tensor = self._model(batch.to(self._device)).total
            if (
                total.requires_grad
            ):  # not for rows that reach no learning part, such as text when the tower learns
                (total / num_labels).backward()
        return total.detach()

    def _counts(self, batches: Sequence[Batch]) -> tuple[int, int]:
        own = [sum(batch.num_labels for batch in batches), sum(batch.num_tokens for batch in batches)]
        counts = self._ranks.summed(torch.tensor(own, device=self._device)) if self._ranks.count > 1 else own
        return int(counts[0]), int(counts[1])

    def _loss(self, totals: Sequence[Tensor], num_labels: int) -> float:
        own = torch.zeros((), dtype=torch.float64, device=self._device)
        for total in totals:
            own = own + total.double()
        return float(self._ranks.summed(own)) / num_labels

    def _clip(self, parameters: Sequence[nn.Parameter]) -> float:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return 0.0
        norm = get_total_norm(gradients)
        if self._recipe.max_grad_norm > 0:
            clip_grads_with_norm_(parameters, self._recipe.max_grad_norm, norm)
        return float(norm)

    def _suspects(self, step: StepInput, totals: Sequence[Tensor]) -> list[Origin]:
        """Rows of the micro-batches whose loss is no number; all rows of the step if each is one."""
        bad = [
            not math.isfinite(float(total)) for total in totals
        ]  # read one by one: the run is over, speed is nothing
        own = [
            origin
            for batch, is_bad in zip(step.batches, bad, strict=True)
            if is_bad
            for origin in batch.origins
        ]
        found = [origin for part in self._ranks.everyones(own) for origin in part]
        if found:
            return found
        own = [origin for batch in step.batches for origin in batch.origins]
        return [origin for part in self._ranks.everyones(own) for origin in part]


def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Each parameter's gradient becomes the sum over all processes; None where no process has one."""
    if ranks.count == 1 or not parameters:
        return
    has = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device)
    num_having = ranks.summed(has.to(torch.int32)).tolist()
    used = [parameter for parameter, count in zip(parameters, num_having, strict=True) if count]
    if not used:
        return
    flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in used])
    ranks.summed(flat)
    for parameter, piece in zip(used, flat.split([parameter.numel() for parameter in used]), strict=True):
        parameter.grad = piece.view_as(parameter)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@contextmanager
def stream(seed: int, step: int, place: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from the stream of this micro-batch; outside, from where it drew before."""
    digest = hashlib.sha256(f"{seed} {step} {place}".encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
