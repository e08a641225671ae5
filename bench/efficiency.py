"""Cells against the floor: the share of this machine's speed that each reached, and LoRA of its possible ratio."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.floors import (
    BF16_BYTES,
    NF4_BYTES,
    LanguageShape,
    Machine,
    Step,
    Work,
    lora_efficiency,
    possible_ratio,
    read_shape,
    run_seconds,
)
from bench.workloads import CATALOGUE, Workload

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ground:
    """What cells are held against: a machine as measured, a checkpoint's shape, its adapters' shape."""

    machine: Machine
    shape: LanguageShape
    rank: int
    targets: tuple[str, ...]
    is_cpu: bool

    def work(self, workload: Workload, median: dict[str, float], *, is_base: bool) -> Work:
        """What a closed loop's median run computed."""
        streams = workload.num_streams or 1
        step = Step(
            rows=streams,
            num_adapters=0 if is_base else min(workload.num_adapters, streams),
            rank=self.rank,
            context=round((median["prompt_tokens"] + median["output_tokens"] / 2) / median["num_calls"]),
            base_weight_bytes=BF16_BYTES if self.is_cpu else NF4_BYTES,
            targets=self.targets,
        )
        return Work(median["prompt_tokens"], median["output_tokens"], step)


def measure_ground(checkpoint: Path, root: Path, tell: Tell) -> Ground:
    """Measures the machine, for seconds. Raises ValueError if ``root`` holds no adapters."""
    import torch

    from bench.machine import measure_machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell("measuring this machine's bytes and operations")
    machine = measure_machine(device)
    rank, targets = _adapter_shape(root)
    return Ground(machine, read_shape(checkpoint), rank, targets, device.type == "cpu")


def add_efficiency(cells: Sequence[dict[str, object]], checkpoint: Path, root: Path, tell: Tell) -> None:
    """To each cell its floor; where it has a ratio to base-only, what this machine allows and the share reached."""
    hold_against(cells, measure_ground(checkpoint, root, tell))


def hold_against(cells: Sequence[dict[str, object]], ground: Ground) -> None:
    """Only closed loops over text have a floor here: what arrives by the clock, or is cached, is bound by neither."""
    for cell in cells:
        workload, median = CATALOGUE.get(str(cell["workload"])), cell.get("median")
        if workload is None or not workload.num_streams or not isinstance(median, dict):
            continue
        if workload.picture_share or workload.has_system or workload.special or median.get("num_failed"):
            continue
        endpoint = cell.get("endpoint")
        if not isinstance(endpoint, dict) or "naming" not in endpoint:
            continue  # a worker keeps no number of streams
        is_base = endpoint["naming"] == "none"
        work = ground.work(workload, median, is_base=is_base)
        least_s = run_seconds(ground.shape, work, ground.machine)
        cell["floor"] = {
            "seconds": least_s,
            "share": least_s / median["seconds"],
            "tokens_per_s": work.output_tokens / least_s,
            "context": work.step.context,
            "machine": asdict(ground.machine),
        }
        if (reached := _reached(cell)) is not None:
            cell["efficiency"] = {
                "possible_ratio": possible_ratio(ground.shape, work, ground.machine),
                "efficiency": lora_efficiency(reached, ground.shape, work, ground.machine),
            }


def _reached(cell: dict[str, object]) -> float | None:
    """The cell's ratio to base-only."""
    found = cell.get("ratios")
    ratios = found if isinstance(found, dict) else {}
    return next((float(r["median"]) for label, r in ratios.items() if "base only" in label), None)


def _adapter_shape(root: Path) -> tuple[int, tuple[str, ...]]:
    """Rank and language linears of the first package of a folder. Raises ValueError if there is none."""
    paths = sorted(root.glob("*/adapter_config.json"))
    if not paths:
        raise ValueError(f"{root} holds no adapters")
    config = json.loads(paths[0].read_text("utf-8"))
    named = str(config["target_modules"])
    leaves = ("q", "k", "v", "o", "gate", "up", "down")
    return int(config["r"]), tuple(leaf for leaf in leaves if f"{leaf}_proj" in named.replace("\\", ""))
