"""The bench's commands: `lorikeet bench list | run | sweep | peers | profile | kernels | prove | shapes | ...`.

Owns names, options and what is printed: progress to stderr, a table, and one JSON line last. Every command imports what
it needs when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.options import (
    Adapters,
    AgainstBase,
    ApiKey,
    AsJson,
    Base,
    Calls,
    Label,
    Model,
    Names,
    NamingOption,
    Ours,
    Out,
    Rate,
    Repeats,
    Root,
    ServeFlags,
    Size,
    SloFirst,
    SloToken,
    Url,
    Where,
    keep,
    keep_part,
    known,
    make_plan,
    reach,
    teller,
    told,
)
from bench.peering import peers
from bench.profiling import profile
from bench.proving import prove

app = typer.Typer(
    help="Measure: workloads, peers, kernels; and report what was measured.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("peers")(peers)
app.command("profile")(profile)
app.command("prove")(prove)


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
    from bench.efficiency import add_efficiency
    from bench.running import run_workloads

    chosen = known(names)
    plan = make_plan(size, repeats, calls, rate, slo_first_token_ms, slo_per_token_ms)
    tell = teller(as_json)
    path: list[Path] = []
    with (
        told() as watch,
        reach(Where(url, model, adapters, naming, label, api_key), Ours(base, adapter_root, serve), tell) as (
            endpoint,
            served,
        ),
    ):

        def keep_so_far(cells: list[dict[str, object]]) -> None:
            path[:] = [keep_part("run", cells, watch, out, path)]

        cells = run_workloads(
            endpoint, chosen, plan, tell, is_against_base=against_base, keep_so_far=keep_so_far
        )
        if against_base and adapter_root is not None and Path(base).is_dir():
            add_efficiency(cells, Path(base), adapter_root, tell)
        for cell in cells:
            cell["server_peak_bytes"] = served.peak_bytes()
    keep("run", cells, watch, out, as_json, path[0])


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
    from bench.ramp import sweep as offer
    from bench.workloads import workload_named

    (chosen,) = known([name])
    plan = make_plan(size, 1, calls, rate, slo_first_token_ms, slo_per_token_ms)
    tell = teller(as_json)
    where = Where(url, model, adapters, naming, label, api_key)
    with told() as watch, reach(where, Ours(base, adapter_root, serve), tell) as (endpoint, _):
        cell = offer(endpoint, workload_named(chosen), plan, tell)
    keep("sweep", [cell], watch, out, as_json)


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

    tell = teller(as_json)
    with told() as watch:
        numbers = tuple(int(number) for number in rows.split(","))
        cell = time_shape(shape, numbers, rank=rank, num_adapters=num_adapters, budget_s=budget_s, tell=tell)
    keep("kernels", [cell], watch, out, as_json)


@app.command("shapes")
def shapes(
    shape: Annotated[str, typer.Argument(help="tiny, 0.5b, 3b or 7b.")],
    folder: Annotated[Path, typer.Argument(help="A folder that is empty or not there yet.")],
    sixteen_bit: Annotated[bool, typer.Option("--sixteen-bit", help="All in bf16 rather than NF4.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Other weights.")] = 0,
) -> None:
    """Make a checkpoint with random weights at a real size."""
    from bench.shapes import SHAPES, make_checkpoint

    with told():
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

    with told():
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

    with told():
        results = [load(path) for path in files]
        typer.echo(render(results, is_markdown=markdown), nl=False)
        for path in plot(results, plots) if plots is not None else ():
            typer.echo(str(path), err=True)
