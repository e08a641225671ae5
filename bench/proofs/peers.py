"""Item 2: peers on the same 4-bit weights and the same calls, as people load them and with their best setting here.

Best settings on a CPU without bf16 products, by measurement (0.5B-like shape, two AVX2 cores, prompts of 48 tokens;
seconds a step at 1 row and at 16 rows): the checkpoint as it is 0.53 and 1.81; dequantised by transformers to bf16 0.10
and 1.15; to fp32 0.17 and 0.53. So one row runs in bf16 and batches in fp32.

Each block has two contests. In answers of 12 tokens a prompt is most of the work; in those of 96 the tokens are. The
peers that compute with the checkpoint as it is would take hours for the second, so it has those with their best setting
alone.
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
from bench.peers import Peer, PeerKind, PeerSetup, PeerWeights, peer
from bench.proofs.bed import NUM_ADAPTERS, Bed
from bench.running import compared, other_server
from bench.workloads import Workload, workload_named

NUM_SHORT = 12
"""Tokens of a short answer."""
ITEM = 2


@dataclass(frozen=True, slots=True)
class Rival:
    """A peer, how it is set, and by how much it must be exceeded."""

    kind: PeerKind
    weights: PeerWeights
    factor: float
    num_calls: int | None = None
    """Of each trace, where more would take longer and change nothing."""


@dataclass(frozen=True, slots=True)
class Contest:
    """One workload, on us and on these in turns."""

    workload: Workload
    rivals: tuple[Rival, ...]


def _short(name: str) -> Workload:
    return replace(workload_named(name), output=Lengths(NUM_SHORT, NUM_SHORT))


ALONE = (
    Contest(
        _short("base-1"),
        (
            Rival(PeerKind.GENERATE, PeerWeights.SHIPPED, 2.0),
            Rival(PeerKind.GENERATE, PeerWeights.BF16, 2.0),
        ),
    ),
    Contest(workload_named("base-1-of-96"), (Rival(PeerKind.GENERATE, PeerWeights.BF16, 2.0),)),
)
AMONG_MANY = (
    Contest(
        _short(f"distinct-{NUM_ADAPTERS}"),
        (
            Rival(PeerKind.SET_ADAPTER, PeerWeights.SHIPPED, 7.0, 1),
            Rival(PeerKind.SET_ADAPTER, PeerWeights.BF16, 7.0, 2),
            Rival(PeerKind.ADAPTER_NAMES, PeerWeights.SHIPPED, 4.0),
            Rival(PeerKind.ADAPTER_NAMES, PeerWeights.FP32, 4.0),
        ),
    ),
    Contest(
        workload_named(f"distinct-{NUM_ADAPTERS}-of-96"),
        (
            Rival(PeerKind.SET_ADAPTER, PeerWeights.BF16, 7.0, 1),
            Rival(PeerKind.ADAPTER_NAMES, PeerWeights.FP32, 4.0),
        ),
    ),
)
LLAMA_FACTOR = 2.0


def prove_peers(bed: Bed) -> Proof:
    ours = Server(bed.shared())
    alone = _block(bed, ours.base_only(), ALONE, ())
    many = _block(bed, ours, AMONG_MANY, bed.other_servers)
    cells = [dict(cell) for cell in (*alone.cells, *many.cells)]
    hold_against(cells, measure_ground(bed.checkpoint, bed.adapters, bed.tell))
    return Proof((*alone.claims, *many.claims), tuple(cells))


def _block(bed: Bed, ours: Server, contests: Sequence[Contest], others: Sequence[str]) -> Proof:
    """One contest after the other over the same workers; they end with the block, and their memory is free then."""
    servers = tuple(Server(other_server(text, ours.endpoint.adapters)) for text in others)
    proofs: list[Proof] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorikeet-peers-")))
        workers = {
            (rival.kind, rival.weights): _started(stack, bed, rival, folder) for rival in contests[0].rivals
        }
        for contest in contests:
            rivals = [_asked(workers[rival.kind, rival.weights], rival) for rival in contest.rivals]
            proofs.append(_held(bed, contest, [ours, *rivals, *servers], servers))
    claims = tuple(claim for proof in proofs for claim in proof.claims)
    return Proof(claims, tuple(cell for proof in proofs for cell in proof.cells))


def _started(stack: ExitStack, bed: Bed, rival: Rival, folder: Path) -> Peer:
    adapters = bed.shared().adapters if rival.kind is not PeerKind.GENERATE else ()
    setup = PeerSetup(rival.kind, bed.checkpoint, bed.adapters, adapters, weights=rival.weights)
    bed.tell(f"loading {rival.kind}, {rival.weights}")
    return stack.enter_context(peer(setup, folder / f"{rival.kind}-{rival.weights}.log"))


def _asked(worker: Target, rival: Rival) -> Target:
    return worker if rival.num_calls is None else FirstCalls(worker, rival.num_calls)


def _held(bed: Bed, contest: Contest, targets: Sequence[Target], servers: Sequence[Server]) -> Proof:
    """All in turns, every repeat."""
    plan = bed.plan("prove")
    measured = run_side_by_side(targets, contest.workload, plan, bed.tell)
    factors: list[float | None] = [rival.factor for rival in contest.rivals]
    factors += [LLAMA_FACTOR if each.endpoint.naming is Naming.LLAMA else None for each in servers]
    claims = _claims(contest.workload, measured, factors)
    return Proof(tuple(claims), tuple(compared(measured, contest.workload, plan)))


def _claims(workload: Workload, measured: Sequence[Measured], factors: Sequence[float | None]) -> list[Claim]:
    ours, *others = measured
    return [
        Claim(
            ITEM,
            f"{claim_name(workload)} to {other.target.label}",
            quotients(ours.values(), other.values()),
            factor,
        )
        for other, factor in zip(others, factors, strict=True)
    ]


def claim_name(workload: Workload) -> str:
    """With the answers' length, which decides whether prompts or tokens are most of the work."""
    length = workload.output
    if length is None or length.low != length.high:
        raise ValueError(f"answers of {workload.name} have no one length")
    streams = "1 stream" if workload.num_streams == 1 else f"{workload.num_streams} streams"
    over = f" over {workload.num_adapters} adapters" if workload.num_adapters else " on the base"
    return f"{streams}{over}, answers of {length.high} tokens:"
