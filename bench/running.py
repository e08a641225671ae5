"""Running: what the commands do, from their options to a result. Starts servers and peers, measures, keeps.

Owns the lives of what it starts: everything ends with the command. Progress goes to whoever listens, never to stdout.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from bench.cells import Measured, Plan, Server, Target, parity_of, ratio, run_side_by_side
from bench.endpoint import Endpoint, Naming
from bench.peers import PeerKind, PeerSetup, PeerWeights, peer, serve_command
from bench.scenarios import SCENARIOS, run_scenario
from bench.serving import Served, free_port, lorikeet_command, serve
from bench.workloads import CATALOGUE, Workload, workload_named

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class OurServer:
    """How ours is started, if no URL is given."""

    base: str = "pocket"
    adapter_root: Path | None = None
    flags: tuple[str, ...] = ()


def adapters_of(url: str, api_key: str | None = None) -> tuple[str, tuple[str, ...]]:
    """(the base's id, the adapters' ids) as /v1/models lists them: what has a parent is an adapter.

    Raises ValueError for a server that does not list its models.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        reply = httpx2.get(
            url + "/v1/models", headers=headers, timeout=60.0, trust_env=False
        ).raise_for_status()
        models = reply.json()["data"]
    except (httpx2.HTTPError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{url} does not list its models ({error}): name --model and --adapters") from error
    bases = [str(model["id"]) for model in models if not model.get("parent")]
    if not bases:
        raise ValueError(f"{url} lists no base model: name it with --model")
    return bases[0], tuple(sorted(str(model["id"]) for model in models if model.get("parent")))


@contextmanager
def our_server(setup: OurServer, tell: Tell) -> Iterator[tuple[Endpoint, Served]]:
    """Ours on a free port, with what it tells of its adapters; and its process. Raises ServerDied."""
    with tempfile.TemporaryDirectory(prefix="lorikeet-bench-") as folder:
        port = free_port()
        state = Path(folder) / "state"
        command = lorikeet_command(setup.base, setup.adapter_root, state, port, *setup.flags)
        tell(f"starting lorikeet serve --base {setup.base}")
        with serve(command, f"http://127.0.0.1:{port}", Path(folder) / "log") as served:
            base, adapters = adapters_of(served.url)
            tell(f"ready after {served.start_s:.1f} s, {len(adapters)} adapters")
            yield Endpoint(served.url, base, adapters=adapters), served


def run_workloads(
    endpoint: Endpoint,
    names: Sequence[str],
    plan: Plan,
    tell: Tell,
    *,
    is_against_base: bool = False,
    keep_so_far: Callable[[list[dict[str, object]]], None] = lambda cells: None,
) -> list[dict[str, object]]:
    """A cell for each workload or scenario; with the same calls on the base alone beside it where that is wanted.

    ``keep_so_far`` gets the cells after each, so that a run cut short has left something.
    """
    cells: list[dict[str, object]] = []
    for name in names:
        cells += _cells(endpoint, name, plan, tell, is_against_base)
        keep_so_far(cells)
    return cells


def _cells(
    endpoint: Endpoint, name: str, plan: Plan, tell: Tell, is_against_base: bool
) -> list[dict[str, object]]:
    if name in SCENARIOS:
        return [run_scenario(endpoint, SCENARIOS[name], plan, tell)]
    workload = workload_named(name)
    server = Server(endpoint)
    targets: list[Target] = [server]
    if is_against_base and workload.num_adapters:
        targets.append(server.base_only())
    return compared(run_side_by_side(targets, workload, plan, tell), workload, plan)


def compared(measured: Sequence[Measured], workload: Workload, plan: Plan) -> list[dict[str, object]]:
    """A cell each; the first carries its ratios to the others, and how many answers were the same."""
    first, *others = measured
    cell = first.cell(workload, plan)
    if others:
        cell["ratios"] = {other.target.label: ratio(first, other) for other in others}
        cell["parity"] = {other.target.label: parity_of(first, other) for other in others}
    return [cell, *(other.cell(workload, plan) for other in others)]


def is_known(name: str) -> bool:
    return name in CATALOGUE or name in SCENARIOS


# ---- peers


def run_peers(
    ours: Endpoint,
    servers: Sequence[Endpoint],
    setups: Sequence[PeerSetup],
    names: Sequence[str],
    plan: Plan,
    tell: Tell,
    *,
    transformers_serve: Path | None = None,
) -> list[dict[str, object]]:
    """Every workload on us, on other servers and on workers, in turns; ``transformers_serve`` is a checkpoint.

    Raises PeerFailed, ServerDied, NothingMeasured.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorikeet-peers-")))
        targets: list[Target] = [Server(ours), *(Server(each) for each in servers)]
        if transformers_serve is not None:
            targets.append(stack.enter_context(_transformers_server(transformers_serve, folder, tell)))
        for setup in setups:
            tell(f"loading {setup.kind}")
            targets.append(stack.enter_context(peer(setup, folder / f"{setup.kind}-{setup.weights}.log")))
        cells: list[dict[str, object]] = []
        for name in names:
            workload = workload_named(name)
            cells += compared(run_side_by_side(targets, workload, plan, tell), workload, plan)
        return cells


@contextmanager
def _transformers_server(checkpoint: Path, folder: Path, tell: Tell) -> Iterator[Server]:
    """It knows no ignore_eos, so its answers may end early: read tokens a second, not the time of a call."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    tell("starting transformers serve")
    with serve(serve_command(checkpoint, port), url, folder / "transformers-serve.log", ready="/health"):
        yield Server(Endpoint(url, str(checkpoint), Naming.NONE, is_plain=True, label="transformers serve"))


def peer_setups(
    kinds: Sequence[PeerKind],
    weights: Sequence[str],
    checkpoint: Path,
    root: Path,
    adapters: tuple[str, ...],
    workloads: Sequence[str],
) -> tuple[PeerSetup, ...]:
    """A worker for each kind, with as many adapters as the workloads ask for.

    ``weights`` is one for all, or one for each. Raises ValueError for another number, or a word that is none.
    """
    most = max(workload_named(name).num_adapters for name in workloads)
    each = [PeerWeights(word.strip()) for word in weights] * (len(kinds) if len(weights) == 1 else 1)
    if len(each) != len(kinds):
        raise ValueError(f"weights for {len(each)} workers, and there are {len(kinds)}")
    return tuple(
        PeerSetup(kind, checkpoint, root, adapters[:most], weights=how)
        for kind, how in zip(kinds, each, strict=True)
    )


def other_server(text: str, adapters: tuple[str, ...]) -> Endpoint:
    """From ``label,url,model,naming``: a server that is up, which knows the adapters by the same names.

    Raises ValueError for another form.
    """
    parts = text.split(",")
    if len(parts) != 4 or parts[3] not in set(Naming):
        raise ValueError(f"{text!r} is not label,url,model,naming; naming is one of {', '.join(Naming)}")
    label, url, model, naming = parts
    is_plain = naming in (Naming.NONE, Naming.LLAMA)
    return Endpoint(url.rstrip("/"), model, Naming(naming), adapters, is_plain=is_plain, label=label)
