"""EngineConfig: the engine's budgets, frozen. Built by the server's settings; derived numbers are properties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from base.config import CpuAdapters

DEFAULT_KV_BYTES = 256 << 20
"""Where neither its size nor a budget for all is given."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """How much of the device's memory may be used: ``num_bytes``, or a ``share`` of what the device has."""

    num_bytes: int | None = None
    share: float | None = None

    def of(self, device_bytes: int) -> int:
        """Bytes, on a device with ``device_bytes``."""
        if self.num_bytes is not None:
            return self.num_bytes
        return int(device_bytes * (1.0 if self.share is None else self.share))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Every field is a budget with a unit; see docs/settings.md for how a server sets them."""

    num_slots: int = 8
    """Adapters that can be on the device at once."""
    max_rank: int = 64
    block_size: int = 16
    """Tokens per KV block; 16 is the field's usual compromise between waste and table length."""
    device_memory: MemoryBudget | None = None
    """Of everything together: weights, slots, KV, images, a step's own. None takes 0.9 of a GPU whose
    ``kv_bytes`` is open; otherwise nothing is bounded."""
    kv_bytes: int | None = None
    """Bytes for keys and values of all layers together; None takes what ``device_memory`` leaves, 256 MiB without."""
    max_model_len: int | None = None
    """Longest prompt plus output in tokens; None takes the base's own limit. Never more than the KV cache holds."""
    max_batch_tokens: int = 512
    """Token budget of one step: the longest that a prefill can delay everybody's next token."""
    prefill_chunk: int = 256
    """Most tokens of one prompt in one step. Pieces end where ``tiling`` allows: no answer depends on it."""
    prefill_beside_decodes: int | None = None
    """Most tokens of all prompts in a step in which sequences decode; None leaves it to ``max_batch_tokens``."""
    prefix_cache: bool = True
    """Whether prompts that begin alike share the keys and values of what they have in common."""
    max_running: int = 64
    """Sequences that decode at once."""
    max_waiting: int = 256
    max_waiting_tokens: int = 262_144
    max_image_patches_per_step: int = 16_384
    """Vision budget of one step; one larger image still goes alone."""
    device_adapter_bytes: int | None = None
    """Bytes of the slots' pages; None leaves them to ``num_slots`` and ``max_rank``."""
    host_adapter_bytes: int = 1 << 30
    """Bytes of adapter weights kept in host memory behind the slots."""
    vision_cache_bytes: int = 256 << 20
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Whether decodes are recorded and replayed; auto: where the device and its attention can."""
    step_ahead: Literal["auto", "off"] = "auto"
    """Whether a decode may be started before the tokens of the one before it were read; auto: where it is recorded."""
    cpu_adapters: CpuAdapters = "auto"
    """Who computes adapters on a CPU: the compiled kernel, or batched products of torch. ``auto`` takes the first where
    it was compiled and agrees with the second when it is tried at start; ``native`` makes it an error otherwise. Not
    used on other devices."""
    load_on_demand: bool = True
    """Whether a request may bring its adapter to the device; otherwise it must have been loaded before."""
    starvation_s: float = 1.0
    """A sequence that waited this long for a slot stops the least used adapter's new sequences until it gets one."""
