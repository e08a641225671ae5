"""The bench's commands: `lorikeet bench list | run | sweep | peers | kernels | shapes | adapters | report`.

Owns names, options and what is printed: progress to stderr, a table, and one JSON line last. Every command imports what
it needs when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bench.cells import Plan
    from bench.endpoint import Endpoint
    from bench.results import Result

app = typer.Typer(
    help="Measure: workloads, peers, kernels; and report what was measured.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Names = Annotated[
    list[str] | None, typer.Argument(help="Workloads or scenarios; `lorikeet bench list` has them.")
]
Size = Annotated[str, typer.Option(help="smoke, pocket, small (0.5B-like on two cores) or full (GPU).")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of each, after a warm-up.")]
Calls = Annotated[int | None, typer.Option(min=1, help="Calls a run, in place of the workload's own.")]
Rate = Annotated[float | None, typer.Option(min=0.001, help="Calls a second of an open loop.")]
SloFirst = Annotated[float, typer.Option(min=1, help="First token within so many ms is good.")]
SloToken = Annotated[float, typer.Option(min=0.1, help="A token within so many ms on average is good.")]
Url = Annotated[str | None, typer.Option(help="A server that is up; none starts lorikeet serve for the run.")]
Model = Annotated[str | None, typer.Option(help="What the server calls the base; none asks /v1/models.")]
Adapters = Annotated[str | None, typer.Option(help="Names of adapters, comma between; none asks /v1/models.")]
NamingOption = Annotated[
    str, typer.Option(help="Where names go: adapter, model, lora_path, adapter_id, base:adapter, lora, none.")
]
Label = Annotated[str, typer.Option(help="What the server is called in results.")]
ApiKey = Annotated[str | None, typer.Option(help="Sent as a bearer token.")]
Base = Annotated[str, typer.Option(help="Of the server that is started: pocket, or a checkpoint's folder.")]
Root = Annotated[Path | None, typer.Option(help="Its folder of adapters; none is the samples.")]
ServeFlags = Annotated[
    list[str] | None, typer.Option("--serve", help="More of its flags: --serve=--num-slots=16.")
]
Out = Annotated[Path | None, typer.Option(help="Folder for the result's file; none is bench/results.")]
AsJson = Annotated[bool, typer.Option("--json", help="The JSON line alone, and no progress.")]
AgainstBase = Annotated[
    bool,
    typer.Option(
        "--against-base", help="The same calls without adapters beside each run, and LoRA's efficiency."
    ),
]


@app.command("list")
def list_workloads() -> None:
    """Workloads and scenarios with what they are."""
    from bench.scenarios import SCENARIOS
    from bench.workloads import CATALOGUE

    for name, about in [(w.name, w.about) for w in CATALOGUE.values()] + [
        (s.name, f"scenario: {s.about}") for s in SCENARIOS.values()
    ]:
        typer.echo(f"{name:<24} {about}")


@app.command("run")
def run(
    names: Names = None,
    size: Size = "pocket",
    repeats: Repeats = 5,
    calls: Calls = None,
    rate: Rate = None,
    slo_first_token_ms: SloFirst = 1000.0,
    slo_per_token_ms: SloToken = 100.0,
    against_base: AgainstBase = False,
    url: Url = None,
    model: Model = None,
    adapters: Adapters = None,
    naming: NamingOption = "adapter",
    label: Label = "lorikeet",
    api_key: ApiKey = None,
    base: Base = "pocket",
    adapter_root: Root = None,
    serve: ServeFlags = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run workloads on a server and keep the figures."""
    from bench.running import add_efficiency, run_workloads

    plan = _plan(size, repeats, calls, rate, slo_first_token_ms, slo_per_token_ms)
    tell = _teller(as_json)
    with (
        _told(),
        _endpoint(
            _Where(url, model, adapters, naming, label, api_key), _Ours(base, adapter_root, serve), tell
        ) as (endpoint, peak_bytes),
    ):
        cells = run_workloads(endpoint, _known(names), plan, tell, is_against_base=against_base)
        if against_base and adapter_root is not None and Path(base).is_dir():
            add_efficiency(cells, Path(base), adapter_root, tell)
        for cell in cells:
            cell["server_peak_bytes"] = peak_bytes()
    _keep("run", cells, out, as_json)


@app.command("sweep")
def sweep(
    name: Annotated[str, typer.Argument(help="An open workload.")] = "open-cv1",
    size: Size = "pocket",
    calls: Calls = None,
    rate: Rate = None,
    slo_first_token_ms: SloFirst = 1000.0,
    slo_per_token_ms: SloToken = 100.0,
    url: Url = None,
    model: Model = None,
    adapters: Adapters = None,
    naming: NamingOption = "adapter",
    label: Label = "lorikeet",
    api_key: ApiKey = None,
    base: Base = "pocket",
    adapter_root: Root = None,
    serve: ServeFlags = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Offer more and more calls a second until the answers are too late; the knee is the last rate that was borne."""
    from bench.running import sweep as offer
    from bench.workloads import workload_named

    (known,) = _known([name])
    plan = _plan(size, 1, calls, rate, slo_first_token_ms, slo_per_token_ms)
    tell = _teller(as_json)
    where = _Where(url, model, adapters, naming, label, api_key)
    with _told(), _endpoint(where, _Ours(base, adapter_root, serve), tell) as (endpoint, _):
        cell = offer(endpoint, workload_named(known), plan, tell)
    _keep("sweep", [cell], out, as_json)


@app.command("peers")
def peers(
    base: Annotated[Path, typer.Option(help="A checkpoint's folder, which we and all workers load.")],
    adapter_root: Annotated[Path, typer.Option(help="A folder of adapters for it.")],
    names: Names = None,
    kinds: Annotated[
        str, typer.Option(help="Workers: generate, set-adapter, adapter-names, merge; comma between.")
    ] = "generate,set-adapter,adapter-names",
    server: Annotated[
        list[str] | None,
        typer.Option(help="A server that is up, as label,url,model,naming; may be repeated."),
    ] = None,
    size: Size = "small",
    repeats: Repeats = 5,
    calls: Calls = None,
    slo_first_token_ms: SloFirst = 1000.0,
    slo_per_token_ms: SloToken = 100.0,
    serve: ServeFlags = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Ours and others in turns, on the same weights and calls: ratios of throughput, and whether answers are equal."""
    from bench.peers import PeerKind
    from bench.running import OurServer, other_server, our_server, peer_setups, run_peers

    chosen = _known(names or ["distinct-16"])
    plan = _plan(size, repeats, calls, None, slo_first_token_ms, slo_per_token_ms)
    tell = _teller(as_json)
    with _told(), our_server(OurServer(str(base), adapter_root, tuple(serve or ())), tell) as (ours, _):
        wanted = [PeerKind(kind.strip()) for kind in kinds.split(",") if kind.strip()]
        setups = peer_setups(wanted, base, adapter_root, ours.adapters, chosen)
        others = [other_server(text, ours.adapters) for text in server or ()]
        cells = run_peers(ours, others, setups, chosen, plan, tell)
    _keep("peers", cells, out, as_json)


@app.command("kernels")
def kernels(
    shape: Annotated[
        str, typer.Option(help="Whose linears: tiny, 0.5b, 3b, 7b, or a checkpoint's folder.")
    ] = "0.5b",
    rows: Annotated[str, typer.Option(help="Rows of a step, comma between.")] = "1,4,8,16,32,64",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    num_adapters: Annotated[int, typer.Option(min=1, help="Distinct ones in a step.")] = 8,
    budget_s: Annotated[float, typer.Option(min=0.0, help="Seconds for each figure.")] = 0.2,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """LoRA, 4-bit matmul and attention, each against the bytes and operations of this machine."""
    from bench.kernel_run import time_shape

    tell = _teller(as_json)
    with _told():
        numbers = tuple(int(number) for number in rows.split(","))
        cell = time_shape(shape, numbers, rank=rank, num_adapters=num_adapters, budget_s=budget_s, tell=tell)
    _keep("kernels", [cell], out, as_json)


@app.command("shapes")
def shapes(
    shape: Annotated[str, typer.Argument(help="tiny, 0.5b, 3b or 7b.")],
    folder: Annotated[Path, typer.Argument(help="A folder that is empty or not there yet.")],
    sixteen_bit: Annotated[bool, typer.Option("--sixteen-bit", help="All in bf16 rather than NF4.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Other weights.")] = 0,
) -> None:
    """Make a checkpoint with random weights at a real size."""
    from bench.shapes import SHAPES, make_checkpoint

    with _told():
        if shape not in SHAPES:
            raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
        make_checkpoint(SHAPES[shape], folder, seed=seed, is_quantised=not sixteen_bit)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(f"{folder}: {shape}, {num_bytes / 2**30:.2f} GiB")


@app.command("adapters")
def adapters_command(
    checkpoint: Annotated[Path, typer.Argument(help="What they must fit.")],
    folder: Annotated[Path, typer.Argument(help="Where they go, a folder each; those that are there stay.")],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 16,
    ranks: Annotated[str, typer.Option(help="In turn, comma between.")] = "16",
    targets: Annotated[str, typer.Option(help="language (all linears), attention, mlp or qv.")] = "language",
    seed: Annotated[int, typer.Option(min=0, help="Other weights.")] = 0,
) -> None:
    """Make random adapters for a checkpoint."""
    from bench.shape_adapters import make_adapters

    with _told():
        numbers = tuple(int(rank) for rank in ranks.split(","))
        names = make_adapters(checkpoint, folder, count, ranks=numbers, targets=targets, seed=seed)
    typer.echo(f"{folder}: {names[0]} to {names[-1]}, ranks {ranks}, on {targets}")


@app.command("report")
def report(
    files: Annotated[list[Path], typer.Argument(help="Results, of one device.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables for a page.")] = False,
    plots: Annotated[Path | None, typer.Option(help="A folder for plots, PNG and SVG.")] = None,
) -> None:
    """Tables and plots of results; refuses those of unlike devices."""
    from bench.report import plot, render
    from bench.results import load

    with _told():
        results = [load(path) for path in files]
        typer.echo(render(results, is_markdown=markdown), nl=False)
        for path in plot(results, plots) if plots is not None else ():
            typer.echo(str(path), err=True)


# ---- shared


class _Where:
    """A server by URL, as the options have it."""

    def __init__(
        self,
        url: str | None,
        model: str | None,
        adapters: str | None,
        naming: str,
        label: str,
        api_key: str | None,
    ) -> None:
        self.url, self.model, self.adapters, self.naming = url, model, adapters, naming
        self.label, self.api_key = label, api_key


class _Ours:
    """What to start where there is no URL."""

    def __init__(self, base: str, adapter_root: Path | None, serve: Sequence[str] | None) -> None:
        self.base, self.adapter_root, self.flags = base, adapter_root, tuple(serve or ())


@contextmanager
def _endpoint(
    where: _Where, ours: _Ours, tell: Callable[[str], None]
) -> Iterator[tuple[Endpoint, Callable[[], int]]]:
    from dataclasses import replace

    from bench.endpoint import Endpoint, Naming
    from bench.running import OurServer, adapters_of, our_server

    chosen = tuple(where.adapters.split(",")) if where.adapters else None
    naming = Naming(where.naming)
    if where.url is None:
        with our_server(OurServer(ours.base, ours.adapter_root, ours.flags), tell) as (endpoint, peak_bytes):
            names = chosen or endpoint.adapters
            yield replace(endpoint, naming=naming, adapters=names, label=where.label), peak_bytes
        return
    url = where.url.rstrip("/")
    if where.model is not None and (chosen is not None or naming is Naming.NONE):
        base, names = where.model, chosen or ()
    else:
        base, found = adapters_of(url, where.api_key)
        base, names = where.model or base, chosen or found
    is_plain = naming in (Naming.NONE, Naming.LLAMA) and where.label != "lorikeet"
    yield Endpoint(url, base, naming, names, where.api_key, is_plain, where.label), lambda: 0


def _plan(
    size: str, repeats: int, calls: int | None, rate: float | None, first_ms: float, token_ms: float
) -> Plan:
    from bench.cells import Plan
    from bench.measure import Slo
    from bench.sizes import SIZES

    if size not in SIZES:
        _refuse(f"no size {size!r}; there are {', '.join(SIZES)}")
    return Plan(size, repeats, calls, rate, Slo(first_ms, token_ms))


def _known(names: Sequence[str] | None) -> list[str]:
    from bench.running import is_known

    chosen = list(names or ["closed-8"])
    for name in chosen:
        if not is_known(name):
            _refuse(f"no workload or scenario {name!r}: see lorikeet bench list")
    return chosen


def _teller(as_json: bool) -> Callable[[str], None]:
    return (lambda _: None) if as_json else (lambda text: typer.echo(text, err=True))


@contextmanager
def _told() -> Iterator[None]:
    """What can go wrong in a run, as one line and status 2."""
    from bench.cells import NothingMeasured
    from bench.peers import PeerFailed
    from bench.serving import ServerDied

    try:
        yield
    except (NothingMeasured, PeerFailed, ServerDied, ValueError, KeyError, OSError) as error:
        _refuse(str(error.args[0]) if isinstance(error, KeyError) else str(error))


def _refuse(why: str) -> None:
    typer.echo(f"lorikeet bench: {why}", err=True)
    raise typer.Exit(2)


def _keep(kind: str, cells: Sequence[Mapping[str, object]], out: Path | None, as_json: bool) -> None:
    """Write the file; print the table, and last the JSON line."""
    from bench.report import render
    from bench.results import RESULTS, last_line, save
    from bench.running import result_of

    result: Result = result_of(kind, cells)
    path = save(result, out or RESULTS)
    if not as_json:
        typer.echo(render([result], is_markdown=False))
        typer.echo(f"kept in {path}", err=True)
    typer.echo(last_line(result))
