"""MemoryPlan: what the device's memory will be used for, decided once, before anything of it is taken.

Owns the arithmetic from a budget to bytes by part, and the refusal of what cannot fit. Knows sizes only: no tensor is
made here. The KV cache is what may grow: it gets what all others leave, unless its size was asked for.

Place in a request's way: none; once, at start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adapters.sites import Site, SiteTable
from adapters.slots import bank_bytes
from base.spec import BaseSpec
from engine.config import DEFAULT_KV_BYTES, EngineConfig, MemoryBudget
from engine.kv import kv_bytes_per_token

if TYPE_CHECKING:
    from base.model import BaseModel

CUDA_BUDGET = MemoryBudget(share=0.9)
"""Where nothing was asked for: what fragments and other libraries need of a GPU's memory is left to them."""
LIVE_HIDDEN = 6
"""[T, H] tensors alive at once inside a layer: residual, normed, query, attention's output, and two of the sums."""
LIVE_WIDE = 3
"""[T, W] tensors alive at once in an MLP: gate, up and their product; W is the widest linear's output."""
LOGIT_COPIES = 3
"""[L, V] float32 tensors alive while sampling: logits, their logarithms or sorted values, one for the next."""
WEIGHT_COPIES = 2
"""Widest linears in 16 bits at once, where 4-bit ones are dequantised to be multiplied: gate and up, merged."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a device has, and what this process cannot give out: other processes' and the driver's part."""

    num_bytes: int
    outside_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    parts: Mapping[str, int]
    """Bytes by part, for people. Adapter slots and the step are upper bounds: taken when used."""
    kv_bytes: int
    """Of the requests' blocks; the probe's come on top and are part of ``parts``."""
    budget_bytes: int | None
    """None where nothing bounds the sum: a CPU without ``device_memory``."""

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values())


def plan_memory(
    config: EngineConfig,
    base: BaseModel,
    sites: SiteTable,
    slot_dtype: torch.dtype,
    num_probe_blocks: int,
    graph_bytes: int = 0,
) -> MemoryPlan:
    """graph_bytes: what recorded decodes take; 0 where there are none.

    Raises ValueError, saying what takes how much and what to change, where the budget cannot hold it.
    """
    device = device_memory(base.device, sum(base.memory_by_part.values()))
    block_bytes = kv_bytes_per_token(base.spec, base.dtype) * config.block_size
    weights = base.memory_by_part
    fixed = {
        **weights,
        "adapter slots": config.device_adapter_bytes
        or bank_bytes(sites, config.num_slots, config.max_rank, slot_dtype.itemsize),
        "image cache": config.vision_cache_bytes,
        "one step": step_bytes(config, base.spec, sites, base.dtype.itemsize)
        + (0 if base.memory_by_part["copies"] else copy_bytes(sites)),
        "probe": num_probe_blocks * block_bytes,
        **({"graphs": graph_bytes} if graph_bytes else {}),
        "outside": device.outside_bytes,
    }
    budget_bytes = _budget_bytes(config, base.device, device)
    kv_bytes = _kv_bytes(config, fixed, budget_bytes)
    if kv_bytes < block_bytes:
        raise ValueError(_too_small(config, fixed, block_bytes, budget_bytes))
    parts = {"KV cache": kv_bytes // block_bytes * block_bytes, **fixed}
    if budget_bytes is not None and sum(parts.values()) > budget_bytes:
        raise ValueError(_too_large(parts, budget_bytes))
    order = [*weights, "adapter slots", "KV cache", "image cache", "one step", "probe", "graphs", "outside"]
    return MemoryPlan({name: parts[name] for name in order if name in parts}, kv_bytes, budget_bytes)


def step_bytes(config: EngineConfig, spec: BaseSpec, sites: SiteTable, itemsize: int) -> int:
    """Upper bound of what a step takes and gives back, by shapes: the language's part or the vision tower's, of which
    one runs at a time, and the logits. Attention is counted as fused: it keeps no scores."""
    language = [site for site in sites.values() if site.part == "language"]
    vision = [site for site in sites.values() if site.part == "vision"]
    rows = config.max_batch_tokens + config.max_running
    language_bytes = rows * (LIVE_HIDDEN * spec.hidden_size + LIVE_WIDE * _widest(language)) * itemsize
    narrow = min((site.out_features for site in vision), default=0)
    patches = config.max_image_patches_per_step
    vision_bytes = patches * (LIVE_HIDDEN * narrow + LIVE_WIDE * _widest(vision)) * itemsize
    logit_rows = max(
        config.max_running, config.max_batch_tokens
    )  # every row of a prompt with log-probabilities
    logits_bytes = logit_rows * spec.vocab_size * 4 * LOGIT_COPIES
    return max(language_bytes + logits_bytes, vision_bytes)


def copy_bytes(sites: SiteTable) -> int:
    """The 16-bit copies of 4-bit weights that a step makes, where the base does not hold the room for them already."""
    weights = (site.in_features * site.out_features for site in sites.values() if site.part == "language")
    return WEIGHT_COPIES * max(weights, default=0) * 2


def device_memory(device: torch.device, base_bytes: int) -> DeviceMemory:
    """The device's size now. On a GPU, ``outside`` is what is taken by anything but the base."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left behind is nobody's
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, max(0, total - free - base_bytes))
    return DeviceMemory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0)


def _budget_bytes(config: EngineConfig, device: torch.device, memory: DeviceMemory) -> int | None:
    """Who gives ``kv_memory`` and no budget has chosen the sum; what does not fit then fails where it is taken."""
    budget = config.device_memory
    if budget is None and config.kv_bytes is None and device.type == "cuda":
        budget = CUDA_BUDGET
    return None if budget is None else min(budget.of(memory.num_bytes), memory.num_bytes)


def _kv_bytes(config: EngineConfig, fixed: Mapping[str, int], budget_bytes: int | None) -> int:
    if config.kv_bytes is not None:
        return config.kv_bytes
    return DEFAULT_KV_BYTES if budget_bytes is None else budget_bytes - sum(fixed.values())


def _widest(sites: list[Site]) -> int:
    return max((site.out_features for site in sites), default=0)


def _too_small(
    config: EngineConfig, fixed: Mapping[str, int], block_bytes: int, budget_bytes: int | None
) -> str:
    if config.kv_bytes is not None:
        return f"kv_memory is {config.kv_bytes} bytes; one block of this base takes {block_bytes}: raise kv_memory"
    used = _listed(fixed)
    return (
        f"device_memory allows {_gib(budget_bytes or 0)} and {used} leave nothing for the KV cache: "
        "raise device_memory, or lower num_slots, max_rank, max_batch_tokens, max_image_patches or vision_cache_memory"
    )


def _too_large(parts: Mapping[str, int], budget_bytes: int) -> str:
    return (
        f"device_memory allows {_gib(budget_bytes)}; {_listed(parts)} take {_gib(sum(parts.values()))}: "
        "lower kv_memory (or leave it out: it is then what is left), num_slots or max_rank, or raise device_memory"
    )


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB" if num_bytes >= 1 << 27 else f"{num_bytes / (1 << 20):.1f} MiB"
