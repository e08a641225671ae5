"""Running: what the commands do, from their options to a result. Starts servers and peers, measures, keeps.

Owns the lives of what it starts: everything ends with the command. Progress goes to whoever listens, never to stdout.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2

from bench.cells import Measured, NothingMeasured, Plan, Server, Target, parity_of, ratio, run_side_by_side
from bench.endpoint import Endpoint, Naming
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
from bench.load import Load
from bench.measure import measure
from bench.peers import PeerKind, PeerSetup, peer
from bench.provenance import provenance
from bench.results import Result, make_result
from bench.scenarios import SCENARIOS, run_scenario
from bench.serving import free_port, lorikeet_command, serve
from bench.workloads import CATALOGUE, Workload, workload_named

Tell = Callable[[str], None]
GOOD_SHARE = 0.9
"""A rate is borne while so many calls are within the SLO."""
SWEEP_STEP = 1.5
MAX_SWEEP = 14


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
def our_server(setup: OurServer, tell: Tell) -> Iterator[tuple[Endpoint, Callable[[], int]]]:
    """Ours on a free port, with what it tells of its adapters; and its peak memory in bytes. Raises ServerDied."""
    with tempfile.TemporaryDirectory(prefix="lorikeet-bench-") as folder:
        port = free_port()
        state = Path(folder) / "state"
        command = lorikeet_command(setup.base, setup.adapter_root, state, port, *setup.flags)
        tell(f"starting lorikeet serve --base {setup.base}")
        with serve(command, f"http://127.0.0.1:{port}", Path(folder) / "log") as served:
            base, adapters = adapters_of(served.url)
            tell(f"ready after {served.start_s:.1f} s, {len(adapters)} adapters")
            yield Endpoint(served.url, base, adapters=adapters), served.peak_bytes


def run_workloads(
    endpoint: Endpoint, names: Sequence[str], plan: Plan, tell: Tell, *, is_against_base: bool = False
) -> list[dict[str, object]]:
    """A cell for each workload or scenario; with the same calls on the base alone beside it where that is wanted."""
    cells: list[dict[str, object]] = []
    for name in names:
        if name in SCENARIOS:
            cells.append(run_scenario(endpoint, SCENARIOS[name], plan, tell))
            continue
        workload = workload_named(name)
        server = Server(endpoint)
        targets: list[Target] = [server]
        if is_against_base and workload.num_adapters:
            targets.append(server.base_only())
        cells += compared(run_side_by_side(targets, workload, plan, tell), workload, plan)
    return cells


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


# ---- LoRA efficiency


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


# ---- a sweep of rates


def sweep(endpoint: Endpoint, workload: Workload, plan: Plan, tell: Tell) -> dict[str, object]:
    """Offer more and more calls a second until the SLO breaks; the knee is the last rate that was borne.

    Raises ValueError for a closed loop, NothingMeasured if no call of the first rate came back.
    """
    if workload.cv is None:
        raise ValueError(f"{workload.name} is a closed loop: a sweep needs an open one, such as open-cv1")
    Load(endpoint).send(plan.warm_up(workload))
    rate = plan.rate or 0.5
    steps: list[dict[str, object]] = []
    knee: float | None = None
    for number in range(MAX_SWEEP):
        run = Load(endpoint).send(replace(plan, rate=rate).trace(workload, number))
        figures = measure(run, plan.slo)
        if not steps and figures["num_failed"] == figures["num_calls"]:
            raise NothingMeasured(f"no call of {workload.name} to {endpoint.label} came back whole")
        steps.append({"rate": rate, "figures": figures})
        tell(
            f"{endpoint.label} {workload.name} at {rate:.2f}/s: {figures['goodput_share']:.0%} within the SLO"
        )
        if figures["goodput_share"] < GOOD_SHARE:
            break
        knee = rate
        rate *= SWEEP_STEP
    about = Server(endpoint).about()
    return {"workload": workload.name, "size": plan.size, "endpoint": about, "sweep": steps, "knee": knee}


# ---- peers


def run_peers(
    ours: Endpoint,
    servers: Sequence[Endpoint],
    setups: Sequence[PeerSetup],
    names: Sequence[str],
    plan: Plan,
    tell: Tell,
) -> list[dict[str, object]]:
    """Every workload on us, on other servers and on workers, in turns. Raises PeerFailed, NothingMeasured."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorikeet-peers-")))
        targets: list[Target] = [Server(ours), *(Server(each) for each in servers)]
        for setup in setups:
            tell(f"loading {setup.kind}")
            targets.append(stack.enter_context(peer(setup, folder / f"{setup.kind}.log")))
        cells: list[dict[str, object]] = []
        for name in names:
            workload = workload_named(name)
            cells += compared(run_side_by_side(targets, workload, plan, tell), workload, plan)
        return cells


def peer_setups(
    kinds: Sequence[PeerKind],
    checkpoint: Path,
    root: Path,
    adapters: tuple[str, ...],
    workloads: Sequence[str],
) -> tuple[PeerSetup, ...]:
    """A worker for each kind, with as many adapters as the workloads ask for."""
    most = max(workload_named(name).num_adapters for name in workloads)
    return tuple(PeerSetup(kind, checkpoint, root, adapters[:most]) for kind in kinds)


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


def result_of(kind: str, cells: Sequence[Mapping[str, object]], origin_commit: Path | None = None) -> Result:
    return make_result(kind, provenance(origin_commit), cells)
