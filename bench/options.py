"""What the bench's commands share: their options, the server that they reach, how they fail and what they print."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bench.cells import Plan
    from bench.endpoint import Endpoint
    from bench.provenance import Watch
    from bench.serving import Served

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


class Where:
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


class Ours:
    """What to start where there is no URL."""

    def __init__(self, base: str, adapter_root: Path | None, serve: Sequence[str] | None) -> None:
        self.base, self.adapter_root, self.flags = base, adapter_root, tuple(serve or ())


@contextmanager
def reach(where: Where, ours: Ours, tell: Callable[[str], None]) -> Iterator[tuple[Endpoint, Served]]:
    """The server that is meant, started if none is named; and its process, of which nothing is known by a URL."""
    from dataclasses import replace

    from bench.endpoint import Endpoint, Naming
    from bench.running import OurServer, adapters_of, our_server
    from bench.serving import Served

    chosen = tuple(where.adapters.split(",")) if where.adapters else None
    naming = Naming(where.naming)
    if where.url is None:
        with our_server(OurServer(ours.base, ours.adapter_root, ours.flags), tell) as (endpoint, served):
            names = chosen or endpoint.adapters
            yield replace(endpoint, naming=naming, adapters=names, label=where.label), served
        return
    url = where.url.rstrip("/")
    if where.model is not None and (chosen is not None or naming is Naming.NONE):
        base, names = where.model, chosen or ()
    else:
        base, found = adapters_of(url, where.api_key)
        base, names = where.model or base, chosen or found
    is_plain = naming in (Naming.NONE, Naming.LLAMA) and where.label != "lorikeet"
    yield Endpoint(url, base, naming, names, where.api_key, is_plain, where.label), Served(url, 0, 0.0)


def make_plan(
    size: str, repeats: int, calls: int | None, rate: float | None, first_ms: float, token_ms: float
) -> Plan:
    from bench.cells import Plan
    from bench.measure import Slo
    from bench.sizes import SIZES

    if size not in SIZES:
        refuse(f"no size {size!r}; there are {', '.join(SIZES)}")
    return Plan(size, repeats, calls, rate, Slo(first_ms, token_ms))


def known(names: Sequence[str] | None) -> list[str]:
    from bench.running import is_known

    chosen = list(names or ["closed-8"])
    for name in chosen:
        if not is_known(name):
            refuse(f"no workload or scenario {name!r}: see lorikeet bench list")
    return chosen


def teller(as_json: bool) -> Callable[[str], None]:
    return (lambda _: None) if as_json else (lambda text: typer.echo(text, err=True))


@contextmanager
def told() -> Iterator[Watch]:
    """What can go wrong in a run, as one line and status 2; with a watch on who else was at work.

    A SIGTERM ends the block like an exception: servers and workers are processes of their own, and must not be left.
    """
    from bench.cells import NothingMeasured
    from bench.peers import PeerFailed
    from bench.provenance import Watch
    from bench.serving import ServerDied

    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield Watch()
    except (NothingMeasured, PeerFailed, ServerDied, ValueError, KeyError, OSError) as error:
        refuse(str(error.args[0]) if isinstance(error, KeyError) else str(error))
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def refuse(why: str) -> None:
    typer.echo(f"lorikeet bench: {why}", err=True)
    raise typer.Exit(2)


def keep_part(
    kind: str, cells: Sequence[Mapping[str, object]], watch: Watch, out: Path | None, path: Sequence[Path]
) -> Path:
    """Write the cells so far, over the file that was written before, if any, and return its path."""
    from bench.results import RESULTS, make_result, save

    return save(make_result(kind, watch.end(), cells), out or RESULTS, path[0] if path else None)


def keep(
    kind: str,
    cells: Sequence[Mapping[str, object]],
    watch: Watch,
    out: Path | None,
    as_json: bool,
    path: Path | None = None,
) -> None:
    """Write the file, over ``path`` if there is one; print the table, and last the JSON line."""
    from bench.report import render
    from bench.results import RESULTS, last_line, make_result, save

    result = make_result(kind, watch.end(), cells)
    path = save(result, out or RESULTS, path)
    if not as_json:
        typer.echo(render([result], is_markdown=False))
        typer.echo(f"kept in {path}", err=True)
    typer.echo(last_line(result))
