"""Item 1: what adapters cost. Eight at 8 and 16 streams beside the base alone, and beside a server without any."""

from __future__ import annotations

from dataclasses import replace

from bench.cells import Measured, Server, run_side_by_side
from bench.claims import Claim, Proof, quotients
from bench.draws import Lengths
from bench.efficiency import hold_against, measure_ground
from bench.proofs.bed import Bed
from bench.results import label_of
from bench.running import compared
from bench.workloads import Workload, workload_named

NUM_TOKENS = 24
ITEM = 1


def prove_lora(bed: Bed) -> Proof:
    ours = Server(bed.shared())
    ground = measure_ground(bed.checkpoint, bed.adapters, bed.tell)
    claims: list[Claim] = []
    cells: list[dict[str, object]] = []
    with bed.bare() as endpoint:
        bare = Server(replace(endpoint, label="lorikeet without adapters")).base_only()
        for streams in (8, 16):
            workload = _workload(streams)
            targets = [ours, ours.base_only(), *([bare] if streams == 16 else [])]
            measured = run_side_by_side(targets, workload, bed.plan("prove"), bed.tell)
            found = compared(measured, workload, bed.plan("prove"))
            hold_against(found, ground)
            cells += found
            claims += _claims(streams, measured, found[0])
    for cell in cells:
        if "without adapters" not in label_of(cell):
            cell["server_peak_bytes"] = bed.peak_bytes()
    return Proof(tuple(claims), tuple(cells))


def _workload(streams: int) -> Workload:
    return replace(workload_named(f"closed-{streams}"), output=Lengths(NUM_TOKENS, NUM_TOKENS))


def _claims(streams: int, measured: list[Measured], cell: dict[str, object]) -> list[Claim]:
    adapted, base, *bare = (each.values() for each in measured)
    ratios = quotients(adapted, base)
    limits = cell["efficiency"]
    possible = float(limits["possible_ratio"]) if isinstance(limits, dict) else 1.0
    claims = [
        Claim(
            ITEM,
            f"LoRA efficiency, 8 adapters, {streams} streams (possible ratio {possible:.3f})",
            tuple(ratio / possible for ratio in ratios),
            0.90,
        )
    ]
    if streams == 16:
        claims.append(Claim(ITEM, "8 adapters to base-only, 16 streams", ratios, 0.85))
        loaded = quotients(base, bare[0])
        claims.append(
            Claim(ITEM, "base-only with adapters loaded to a server without, 16 streams", loaded, 0.99)
        )
    return claims
