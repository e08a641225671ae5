"""LoRA's efficiency: a cell's ratio to base-only as a share of the ratio that this machine allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.floors import (
    BF16_BYTES,
    FP32_BYTES,
    NF4_BYTES,
    Step,
    Work,
    lora_efficiency,
    possible_ratio,
    read_shape,
)
from bench.workloads import CATALOGUE

Tell = Callable[[str], None]


def add_efficiency(cells: Sequence[dict[str, object]], checkpoint: Path, root: Path, tell: Tell) -> None:
    """Where a cell has a ratio to base-only: what this machine allows, and what share of it was reached."""
    import torch

    from bench.machine import measure_machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell("measuring this machine's bytes and operations")
    machine = measure_machine(device)
    shape = read_shape(checkpoint)
    rank, targets = _adapter_shape(root)
    is_cpu = device.type == "cpu"
    for cell in cells:
        found = cell.get("ratios")
        reached = [r for label, r in found.items() if "base only" in label] if isinstance(found, dict) else []
        workload = CATALOGUE.get(str(cell["workload"]))
        median = cell.get("median")
        if not reached or workload is None or not workload.num_streams or not isinstance(median, dict):
            continue
        step = Step(
            rows=workload.num_streams,
            num_adapters=min(workload.num_adapters, workload.num_streams),
            rank=rank,
            context=round((median["prompt_tokens"] + median["output_tokens"] / 2) / median["num_calls"]),
            base_weight_bytes=BF16_BYTES if is_cpu else NF4_BYTES,
            lora_weight_bytes=FP32_BYTES if is_cpu else BF16_BYTES,
            targets=targets,
        )
        work = Work(median["prompt_tokens"], median["output_tokens"], step)
        cell["efficiency"] = {
            "possible_ratio": possible_ratio(shape, work, machine),
            "efficiency": lora_efficiency(reached[0]["median"], shape, work, machine),
            "bytes_per_s": machine.bytes_per_s,
            "flops_per_s": machine.flops_per_s,
            "lora_flops_per_s": machine.lora_flops_per_s,
            "context": step.context,
        }


def _adapter_shape(root: Path) -> tuple[int, tuple[str, ...]]:
    """Rank and language linears of the first package of a folder. Raises ValueError if there is none."""
    paths = sorted(root.glob("*/adapter_config.json"))
    if not paths:
        raise ValueError(f"{root} holds no adapters")
    config = json.loads(paths[0].read_text("utf-8"))
    named = str(config["target_modules"])
    leaves = ("q", "k", "v", "o", "gate", "up", "down")
    return int(config["r"]), tuple(leaf for leaf in leaves if f"{leaf}_proj" in named.replace("\\", ""))
