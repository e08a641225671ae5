"""`lorikeet bench peers`: ours and others in turns. Options and printing; bench/running.py acts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.options import (
    AsJson,
    Calls,
    Names,
    Out,
    Repeats,
    ServeFlags,
    Size,
    SloFirst,
    SloToken,
    keep,
    known,
    make_plan,
    teller,
    told,
)


def peers(
    base: Annotated[Path, typer.Option(help="A checkpoint's folder, which we and all workers load.")],
    adapter_root: Annotated[Path, typer.Option(help="A folder of adapters for it.")],
    names: Names = None,
    kinds: Annotated[
        str, typer.Option(help="Workers: generate, set-adapter, adapter-names, merge; comma between.")
    ] = "generate,set-adapter,adapter-names",
    weights: Annotated[
        str,
        typer.Option(help="What workers compute with: nf4 (as shipped), bf16 or fp32; one, or one a kind."),
    ] = "nf4",
    server: Annotated[
        list[str] | None,
        typer.Option(help="A server that is up, as label,url,model,naming; may be repeated."),
    ] = None,
    transformers_serve: Annotated[
        bool, typer.Option("--transformers-serve", help="Start transformers' own server beside; base alone.")
    ] = False,
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

    chosen = known(names or ["distinct-16"])
    plan = make_plan(size, repeats, calls, None, slo_first_token_ms, slo_per_token_ms)
    tell = teller(as_json)
    with (
        told() as watch,
        our_server(OurServer(str(base), adapter_root, tuple(serve or ())), tell) as (ours, _),
    ):
        wanted = [PeerKind(kind.strip()) for kind in kinds.split(",") if kind.strip()]
        setups = peer_setups(wanted, weights.split(","), base, adapter_root, ours.adapters, chosen)
        others = [other_server(text, ours.adapters) for text in server or ()]
        beside = base if transformers_serve else None
        cells = run_peers(ours, others, setups, chosen, plan, tell, transformers_serve=beside)
    keep("peers", cells, watch, out, as_json)
