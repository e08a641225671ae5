"""`lorikeet bench prove`: what the engine must show, in one command. Options and printing; bench/prove.py acts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.options import AsJson, Out, keep, keep_part, teller, told

Only = Annotated[str | None, typer.Option(help="Items by number, comma between; none is all.")]
ShapeName = Annotated[str, typer.Option(help="Of the made checkpoint: tiny (to see that all works) or 0.5b.")]
Pairs = Annotated[
    int, typer.Option(min=1, help="Runs side by side, of which the median is taken; a claim needs 5.")
]
Folder = Annotated[
    Path | None, typer.Option(help="Where checkpoints and adapters are made, and found again.")
]
Others = Annotated[
    list[str] | None,
    typer.Option("--server", help="Another peer that is up, as label,url,model,naming; may be repeated."),
]


def prove(
    only: Only = None,
    shape: ShapeName = "0.5b",
    pairs: Pairs = 5,
    folder: Folder = None,
    server: Others = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What the engine must show: each item as medians of pairs side by side, with its target, and whether it is met."""
    from bench.proofs.bed import Bed
    from bench.prove import chosen, estimate
    from bench.prove import prove as prove_items
    from bench.shapes import SHAPES

    tell = teller(as_json)
    path: list[Path] = []
    with told() as watch:
        if shape not in SHAPES:
            raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
        items = chosen(only)
        tell(estimate(items, pairs))
        made = folder or Path(tempfile.gettempdir()) / "lorikeet-bench"
        bed = Bed(made, shape, pairs, tell, tuple(server or ()))

        def keep_so_far(cells: list[dict[str, object]]) -> None:
            path[:] = [keep_part("prove", cells, watch, out, path)]

        cells = prove_items(bed, items, keep_so_far)
    keep("prove", cells, watch, out, as_json, path[0])
    if any("failure" in cell for cell in cells):
        raise typer.Exit(1)
