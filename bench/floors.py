"""The floors: bytes and operations that a decode step cannot go without, and what LoRA may therefore cost. Pure.

Formulas are those of docs/benchmarks.md, so that anybody can recompute them. A step reads every weight once, whatever
its rows; each distinct adapter's weights once; each row's keys and values. It computes two operations a weight and row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a parameter with double quantisation: 4 bits, an 8-bit scale for 64, a 32-bit one for 256 scales: 0.5159."""
BF16_BYTES = 2.0
FP32_BYTES = 4.0


@dataclass(frozen=True, slots=True)
class LanguageShape:
    """What decides a decode step's bytes and operations."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) of a layer's linears."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.hidden, query),
            "k": (self.hidden, key),
            "v": (self.hidden, key),
            "o": (query, self.hidden),
            "gate": (self.hidden, self.mlp),
            "up": (self.hidden, self.mlp),
            "down": (self.mlp, self.hidden),
        }

    @property
    def num_linear_weights(self) -> int:
        return self.layers * sum(width * out for width, out in self.linears.values())

    @property
    def num_head_weights(self) -> int:
        return self.vocab * self.hidden

    def num_lora_weights(self, rank: int, targets: tuple[str, ...] | None = None) -> int:
        """Of one adapter, on all linears unless some are named."""
        wanted = [size for name, size in self.linears.items() if targets is None or name in targets]
        return self.layers * rank * sum(width + out for width, out in wanted)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


def read_shape(checkpoint: Path) -> LanguageShape:
    """From a checkpoint's config.json, in either layout. Raises KeyError for one that is no such model's."""
    outer = json.loads((checkpoint / "config.json").read_text("utf-8"))
    text = outer.get("text_config") or outer
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    return LanguageShape(
        hidden=hidden,
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or hidden // heads,
        mlp=text["intermediate_size"],
        vocab=text["vocab_size"],
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine reaches, measured by the bench itself."""

    bytes_per_s: float
    flops_per_s: float
    """Of the base's matrix products."""
    lora_flops_per_s: float
    """Of the adapters' products: on a CPU they are in fp32."""
    wide_flops_per_s: float | None = None
    """Of the base's products in fp32, where it may be computed so from 4 bits: on a CPU. The floor is the faster."""

    @property
    def most_flops_per_s(self) -> float:
        return max(self.flops_per_s, self.wide_flops_per_s or 0.0)


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step: so many rows, over so many distinct adapters, at a context."""

    rows: int
    num_adapters: int = 0
    rank: int = 16
    context: int = 512
    base_weight_bytes: float = NF4_BYTES
    """Of a linear's weight as it is read: NF4, or 2 where a CPU keeps a 16-bit copy."""
    targets: tuple[str, ...] | None = None


def base_seconds(shape: LanguageShape, step: Step, machine: Machine) -> float:
    """What the base alone takes at least: its weights, its head, the rows' keys and values; the faster way of both."""
    ways = [(step.base_weight_bytes, BF16_BYTES, machine.flops_per_s)]
    if machine.wide_flops_per_s is not None:
        ways.append((NF4_BYTES, BF16_BYTES, machine.wide_flops_per_s))
    kv_bytes = step.rows * step.context * shape.kv_bytes_per_token
    flops = 2.0 * step.rows * (shape.num_linear_weights + shape.num_head_weights)
    return min(
        max(
            (shape.num_linear_weights * weight + shape.num_head_weights * head + kv_bytes)
            / machine.bytes_per_s,
            flops / rate,
        )
        for weight, head, rate in ways
    )


def lora_seconds(shape: LanguageShape, step: Step, machine: Machine) -> float:
    """What the adapters add at least: each distinct one's weights once, in 16 bits, and every row's products."""
    if not step.num_adapters:
        return 0.0
    weights = shape.num_lora_weights(step.rank, step.targets)
    num_bytes = min(step.num_adapters, step.rows) * weights * BF16_BYTES
    return max(num_bytes / machine.bytes_per_s, 2.0 * step.rows * weights / machine.lora_flops_per_s)


@dataclass(frozen=True, slots=True)
class Work:
    """What a run computed: so many prompt tokens at once, and output tokens in steps of ``step.rows`` rows."""

    prompt_tokens: float
    output_tokens: float
    step: Step


def base_run_seconds(shape: LanguageShape, work: Work, machine: Machine) -> float:
    """The floor of a run on the base alone: prompts by operations, answers step by step."""
    prompts = 2.0 * work.prompt_tokens * shape.num_linear_weights / machine.most_flops_per_s
    return prompts + work.output_tokens / work.step.rows * base_seconds(shape, work.step, machine)


def lora_run_seconds(shape: LanguageShape, work: Work, machine: Machine) -> float:
    """What adapters add to it at least."""
    if not work.step.num_adapters:
        return 0.0
    weights = shape.num_lora_weights(work.step.rank, work.step.targets)
    prompts = 2.0 * work.prompt_tokens * weights / machine.lora_flops_per_s
    return prompts + work.output_tokens / work.step.rows * lora_seconds(shape, work.step, machine)


def possible_ratio(shape: LanguageShape, work: Work, machine: Machine) -> float:
    """Of throughput with adapters to the base's: 1 is free."""
    base = base_run_seconds(shape, work, machine)
    return base / (base + lora_run_seconds(shape, work, machine))


def run_seconds(shape: LanguageShape, work: Work, machine: Machine) -> float:
    """The floor of a run with its adapters."""
    return base_run_seconds(shape, work, machine) + lora_run_seconds(shape, work, machine)


def lora_efficiency(measured_ratio: float, shape: LanguageShape, work: Work, machine: Machine) -> float:
    """The measured ratio as a share of the possible one."""
    return measured_ratio / possible_ratio(shape, work, machine)
