"""foresee: what a run will take of this machine, before anything is loaded, and whether there is so much.

Owns: which device and how much of its memory is free, which shape a base has. Does not know: how memory is reckoned
(`plan.py`). Place in a training run: after the data's check; and all of `lorikeet plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from base.checkpoint import open_checkpoint
from training.model.loading import training_dtype
from training.plan.peak import Device
from training.plan.plan import MemoryPlan, plan_memory
from training.plan.shape import BaseShape, known_shape, shape_of
from training.plan.time import DataSize, TimePlan, measured_rate, plan_time
from training.recipe.recipe import Recipe
from training.run.data import RunData, serving_config
from training.run.outcome import Refused


@dataclass(frozen=True, slots=True)
class Foresight:
    """What a run will take."""

    memory: MemoryPlan
    time: TimePlan

    def text(self) -> str:
        return f"{self.memory.text()}\n{self.time.text()}"

    def as_json(self) -> dict[str, object]:
        return {"memory": self.memory.as_json(), "time": self.time.as_json()}

    def check(self) -> None:
        """Raises Refused, with the ladder, for a run that does not fit."""
        if not self.memory.does_fit:
            raise Refused(f"the run does not fit in this machine's memory:\n{self.memory.text()}")


def foresee(recipe: Recipe, data: RunData) -> Foresight:
    """For the data's largest row and its mean one. Raises TargetsError, and as ``open_checkpoint``."""
    device, memory_bytes = this_device()
    shape, sizes = base_shape(recipe), data.report.train
    memory = plan_memory(
        shape,
        recipe,
        max_tokens=min(sizes.tokens.most, recipe.max_length),
        image_tokens=sizes.image_tokens.most,
        device=device,
        memory_bytes=memory_bytes,
    )
    count = max(1, sizes.tokens.count)
    size = DataSize(
        len(data.train),
        sizes.tokens.total / count,
        sizes.image_tokens.total / count,
        sizes.num_labels / count,
    )
    rate = measured_rate(device, training_dtype(recipe))
    return Foresight(memory, plan_time(shape, recipe, size, flops_per_s=rate))


def this_device() -> tuple[Device, int]:
    """What trains here, and how many bytes of it are free."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return "cuda", free
    return "cpu", psutil.virtual_memory().available


def base_shape(recipe: Recipe) -> BaseShape:
    """A published base's is known without a hub; else from the checkpoint's configuration.

    Raises as ``open_checkpoint``.
    """
    known = known_shape(recipe.base)
    if known is not None and not Path(recipe.base).exists():
        return known
    checkpoint = open_checkpoint(serving_config(recipe))
    return shape_of(checkpoint.config, checkpoint.name)
