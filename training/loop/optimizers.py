"""Optimizers: the recipe's, over the adapter's parameters in groups that show which part learns how fast.

A group is one part's A matrices, its B matrices (LoRA+ gives them a rate of their own), or its magnitudes (DoRA's; one
number an output, never decayed). Groups keep the names in the optimizer itself: ``group["part"]``, ``group["role"]``.

Owns: the groups, the choice of optimizer, each group's rate at each step, and an optimizer's memory as safetensors and
JSON. Does not know: gradients, steps taken. Place in a training run: made before the first step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from training.loop.stages import Timeline
    from training.recipe.recipe import Part, Recipe

Role = Literal["A", "B", "magnitude"]
Group = dict[str, Any]
"""As torch has it."""
_TENSORS: Final = "optimizer.safetensors"
_REST: Final = "optimizer.json"


class OptimizerUnavailable(Exception):
    """What the recipe names does not run here."""


def parameter_groups(
    trainable: Mapping[str, nn.Parameter], part_of: Callable[[str], Part], recipe: Recipe, timeline: Timeline
) -> list[Group]:
    """One for each part and role, in the order in which the parameters come; ``lr`` is the first stage's peak."""
    groups: dict[tuple[Part, Role], Group] = {}
    for name, parameter in trainable.items():
        key = part_of(name), _role(name, parameter)
        group = groups.setdefault(key, _group(*key, recipe, timeline))
        group["params"].append(parameter)
    return list(groups.values())


def _group(part: Part, role: Role, recipe: Recipe, timeline: Timeline) -> Group:
    return {
        "params": [],
        "lr": timeline.first_peak(part) * _times(role, recipe),
        "weight_decay": 0.0 if role == "magnitude" else recipe.weight_decay,
        "part": part,
        "role": role,
    }


def _role(name: str, parameter: nn.Parameter) -> Role:
    if parameter.dim() < 2 or "magnitude" in name:
        return "magnitude"
    return "B" if "lora_B" in name or "lora_embedding_B" in name else "A"


def _times(role: Role, recipe: Recipe) -> float:
    return recipe.lora_plus if role == "B" and recipe.lora_plus is not None else 1.0


def make_optimizer(groups: Iterable[Group], recipe: Recipe, device: torch.device) -> Optimizer:
    """Raises OptimizerUnavailable."""
    groups = list(groups)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=device.type == "cuda")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr)
    if recipe.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=recipe.lr, scale_parameter=False, relative_step=False)
    if recipe.optimizer == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    if device.type != "cuda":
        raise OptimizerUnavailable(
            f"optimizer {recipe.optimizer} keeps its memory in pages of a CUDA device, and the base is on"
            f" {device.type}: use adamw_8bit, or adafactor for less memory"
        )
    from bitsandbytes.optim.adamw import PagedAdamW8bit

    return PagedAdamW8bit(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


def make_scheduler(optimizer: Optimizer, recipe: Recipe, timeline: Timeline) -> LambdaLR:
    """Each group's rate as a share of its first stage's peak; a part that rests has rate 0."""

    def shares(group: Group) -> Callable[[int], float]:
        part: Part = group["part"]
        return lambda step: timeline.span_at(step).rate(part, step) / timeline.first_peak(part)

    return LambdaLR(optimizer, [shares(group) for group in optimizer.param_groups])


def rates_of(optimizer: Optimizer) -> dict[str, float]:
    """Part -> its rate now; ``part.B`` beside it where B has another."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        if group["role"] == "A":
            rates[group["part"]] = float(group["lr"])
    for group in optimizer.param_groups:
        if group["role"] == "B" and group["lr"] != rates.get(group["part"]):
            rates[f"{group['part']}.B"] = float(group["lr"])
    return rates


# ---- on disk, without pickles


def save_optimizer(optimizer: Optimizer, scheduler: LambdaLR, folder: Path) -> None:
    """All that both remember. Tensors by ``number of the parameter.name``, the rest as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, object]] = {}
    for number, memory in state["state"].items():
        for key, value in _flat(memory).items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{key}"] = value.detach().cpu().contiguous().clone()
            else:
                plain.setdefault(str(number), {})[key] = value
    save_file(tensors, folder / _TENSORS)
    rest = {"plain": plain, "groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / _REST).write_text(json.dumps(rest) + "\n", encoding="utf-8")


def load_optimizer(optimizer: Optimizer, scheduler: LambdaLR, folder: Path) -> None:
    """Raises ValueError when the groups are not those that were saved."""
    rest = json.loads((folder / _REST).read_bytes())
    memory: dict[int, dict[str, object]] = {
        int(number): dict(values) for number, values in rest["plain"].items()
    }
    for name, tensor in load_file(folder / _TENSORS).items():
        number, key = name.split(".", 1)
        memory.setdefault(int(number), {})[key] = tensor
    groups = [_as_saved(group) for group in rest["groups"]]
    optimizer.load_state_dict({"state": dict(sorted(memory.items())), "param_groups": groups})
    scheduler.load_state_dict(rest["scheduler"])


def _flat(memory: Mapping[str, object]) -> dict[str, object]:
    """Without the inner folder in which bitsandbytes hides its 8-bit tensors from FSDP; it reads both."""
    flat: dict[str, object] = {}
    for key, value in memory.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _as_saved(group: Group) -> Group:
    """With the tuples that JSON has as lists."""
    return {
        key: tuple(value) if isinstance(value, list) and key != "params" else value
        for key, value in group.items()
    }
