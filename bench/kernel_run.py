"""A kernel run: this machine's limits first, then every kernel of a shape, as one cell of a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.floors import LanguageShape, read_shape
from bench.kernels import Stand, time_kernels
from bench.machine import measure_machine
from bench.shapes import SHAPES


def time_shape(
    name: str,
    rows: Sequence[int],
    *,
    rank: int,
    num_adapters: int,
    budget_s: float,
    tell: Callable[[str], None],
) -> dict[str, object]:
    """Raises ValueError for a name that is neither a shape nor a checkpoint's folder."""
    shape = language_shape(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell("measuring this machine's bytes and operations")
    machine = measure_machine(device)
    tell(f"{machine.bytes_per_s / 1e9:.1f} GB/s, {machine.most_flops_per_s / 1e9:.0f} GFLOP/s")
    stand = Stand(shape, machine, device, rows, rank, num_adapters, budget_s=budget_s)
    timings = []
    for timing in time_kernels(stand):
        tell(
            f"{timing.kernel} {timing.variant} {timing.site} {timing.rows}: {timing.us:.0f} us, {timing.share:.0%}"
        )
        timings.append(timing.as_json())
    return {
        "workload": "kernels",
        "endpoint": {"label": f"{name}, {torch.get_num_threads()} threads"},
        "machine": asdict(machine),
        "timings": timings,
    }


def language_shape(name: str) -> LanguageShape:
    if name in SHAPES:
        made = SHAPES[name]
        return LanguageShape(
            made.hidden, made.layers, made.heads, made.kv_heads, made.head_dim, made.mlp, made.vocab
        )
    if (Path(name) / "config.json").is_file():
        return read_shape(Path(name))
    raise ValueError(f"no shape {name!r}; there are {', '.join(SHAPES)}, or a checkpoint's folder")
