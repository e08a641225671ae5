"""Item 2: peers on the same 4-bit weights and the same calls, as people load them and with their best setting here.

Best settings on a CPU without bf16 products, by measurement (0.5B-like shape, two AVX2 cores, prompts of 48 tokens;
seconds a step at 1 row and at 16 rows): the checkpoint as it is 0.53 and 1.81; dequantised by transformers to bf16 0.10
and 1.15; to fp32 0.17 and 0.53. So one row runs in bf16 and batches in fp32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cells import FirstCalls, Measured, Server, Target, run_side_by_side
from bench.claims import Claim, Proof, quotients
from bench.draws import Lengths
from bench.efficiency import hold_against, measure_ground
from bench.endpoint import Naming
from bench.peers import PeerKind, PeerSetup, PeerWeights, peer
from bench.proofs.bed import NUM_ADAPTERS, Bed
from bench.running import compared, other_server
from bench.workloads import Workload, workload_named

NUM_TOKENS = 12
ITEM = 2


@dataclass(frozen=True, slots=True)
class Rival:
    """A peer, how it is set, and by how much it must be exceeded."""

    kind: PeerKind
    weights: PeerWeights
    factor: float
    num_calls: int | None = None
    """Of each trace, where more would take longer and change nothing."""


ALONE = (
    Rival(PeerKind.GENERATE, PeerWeights.SHIPPED, 2.0),
    Rival(PeerKind.GENERATE, PeerWeights.BF16, 2.0),
)
AMONG_MANY = (
    Rival(PeerKind.SET_ADAPTER, PeerWeights.SHIPPED, 7.0, 1),
    Rival(PeerKind.SET_ADAPTER, PeerWeights.BF16, 7.0, 2),
    Rival(PeerKind.ADAPTER_NAMES, PeerWeights.SHIPPED, 4.0),
    Rival(PeerKind.ADAPTER_NAMES, PeerWeights.FP32, 4.0),
)
LLAMA_FACTOR = 2.0


def prove_peers(bed: Bed) -> Proof:
    ours = Server(bed.shared())
    alone = _beside(bed, ours.base_only(), _workload("base-1"), ALONE, ())
    many = _beside(bed, ours, _workload(f"distinct-{NUM_ADAPTERS}"), AMONG_MANY, bed.other_servers)
    cells = [dict(cell) for cell in (*alone.cells, *many.cells)]
    hold_against(cells, measure_ground(bed.checkpoint, bed.adapters, bed.tell))
    return Proof((*alone.claims, *many.claims), tuple(cells))


def _workload(name: str) -> Workload:
    return replace(workload_named(name), output=Lengths(NUM_TOKENS, NUM_TOKENS))


def _beside(
    bed: Bed, ours: Server, workload: Workload, rivals: Sequence[Rival], others: Sequence[str]
) -> Proof:
    """All in turns, every repeat; workers end with the block, so that their memory is free for the next."""
    servers = [other_server(text, ours.endpoint.adapters) for text in others]
    plan = bed.plan("prove")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorikeet-peers-")))
        targets: list[Target] = [ours]
        targets += [_started(stack, bed, rival, folder) for rival in rivals]
        targets += [Server(each) for each in servers]
        measured = run_side_by_side(targets, workload, plan, bed.tell)
        cells = compared(measured, workload, plan)
    factors: list[float | None] = [rival.factor for rival in rivals]
    factors += [LLAMA_FACTOR if each.naming is Naming.LLAMA else None for each in servers]
    return Proof(tuple(_claims(workload, measured, factors)), tuple(cells))


def _started(stack: ExitStack, bed: Bed, rival: Rival, folder: Path) -> Target:
    adapters = bed.shared().adapters if rival.kind is not PeerKind.GENERATE else ()
    setup = PeerSetup(rival.kind, bed.checkpoint, bed.adapters, adapters, weights=rival.weights)
    bed.tell(f"loading {rival.kind}, {rival.weights}")
    target: Target = stack.enter_context(peer(setup, folder / f"{rival.kind}-{rival.weights}.log"))
    return target if rival.num_calls is None else FirstCalls(target, rival.num_calls)


def _claims(workload: Workload, measured: Sequence[Measured], factors: Sequence[float | None]) -> list[Claim]:
    ours, *others = measured
    return [
        Claim(
            ITEM,
            f"{workload.name}: to {other.target.label}",
            quotients(ours.values(), other.values()),
            factor,
        )
        for other, factor in zip(others, factors, strict=True)
    ]
