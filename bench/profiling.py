"""`lorikeet bench profile`: its options, the server that it reaches, and what it keeps."""

from __future__ import annotations

from typing import Annotated

import typer

from bench.options import (
    Adapters,
    ApiKey,
    AsJson,
    Base,
    Label,
    Model,
    NamingOption,
    Ours,
    Out,
    Repeats,
    Root,
    ServeFlags,
    Url,
    Where,
    keep,
    reach,
    teller,
    told,
)


def profile(
    rows: Annotated[int, typer.Option(min=1, help="Sequences that decode at once.")] = 8,
    tokens: Annotated[int, typer.Option(min=16, help="Of each; half of them are measured.")] = 160,
    repeats: Repeats = 5,
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
    """Where each millisecond of a step goes, by the server's own counters, with adapters and without."""
    from bench.profile import Asked
    from bench.profile import profile as measure

    tell = teller(as_json)
    where = Where(url, model, adapters, naming, label, api_key)
    with told() as watch, reach(where, Ours(base, adapter_root, serve), tell) as (endpoint, served):
        cells = measure(endpoint, served, Asked(rows, tokens, repeats), tell)
    keep("profile", cells, watch, out, as_json)
