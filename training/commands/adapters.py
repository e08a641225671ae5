"""`lorikeet adapters export | import | inspect | shrink | eval`: the tools for finished adapters. None needs a server.

Owns names, options and exit statuses: 0 done; 1 it broke off; 2 refused, nothing was written; 3 the adapter did not
pass its gate (eval). Imports what it needs when a command runs. `lorikeet.py` adds them to the group that the server's
client commands are in, and brings the engine that `eval` generates with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from training.commands.phases import Phases
    from training.generation import GeneratorFactory

FAILED, REFUSED, GATE = 1, 2, 3


class StoredType(StrEnum):
    """How weights are written."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT adapter.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; nothing may be in it.")]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="BASE", help="The base: pocket, a folder or a hub id. Default: what the adapter names."
    ),
]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub id.")]
Logits = Annotated[
    bool, typer.Option(help="Run the base on probe prompts to prove the result; needs its memory.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


def register(adapters_app: typer.Typer, make_generator: GeneratorFactory) -> None:
    """Add the commands to ``lorikeet adapters``. ``make_generator`` is called when ``eval`` first needs answers."""
    from training.commands.adapters_eval import eval_command

    adapters_app.command("eval", short_help="Judge a package on held-out rows, beside its base.")(
        eval_command(make_generator)
    )
    adapters_app.command("export", short_help="Merge an adapter into its 16-bit base.")(export)
    adapters_app.command("import", short_help="Make a foreign adapter a plain package.")(import_)
    adapters_app.command("inspect", short_help="Singular values, effective ranks and norms.")(inspect)
    adapters_app.command("shrink", short_help="Lower an adapter's rank, with the error stated.")(shrink)


def export(
    adapter: Adapter,
    out: Out,
    base: Base = None,
    revision: Revision = None,
    dtype: Annotated[
        StoredType | None, typer.Option(help="How weights are stored. Default: as the base's.")
    ] = None,
    logits: Logits = True,
    tolerance: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0.0, help="Largest rms error of the logits, over their spread."),
    ] = 0.05,
    shard_gb: Annotated[float, typer.Option(metavar="GB", min=0.001, help="Largest file of weights.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its 16-bit base: a whole Hugging Face folder that needs no adapter.

    Never into 4 bits, which would lose the adapter. The result is proved against base and adapter before it is named.
    """
    with _refusing(), _phases() as phases:
        from training.tools.export import export as run

        report = run(
            adapter,
            out,
            base=base,
            revision=revision,
            dtype=_dtype(dtype),
            check_logits=logits,
            tolerance=tolerance,
            max_shard_bytes=int(shard_gb * 1e9),
            on_progress=phases,
        )
    _say(report.text, report.as_dict, as_json)


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder or .safetensors file of any trainer's.")
    ],
    out: Out,
    name: Annotated[str, typer.Option(metavar="NAME", help="Name in lorikeet.json. Default: OUT's.")] = "",
    base: Base = None,
    revision: Revision = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="ALPHA", help="Where no file says it; the scale is alpha / rank.")
    ] = None,
    adapter_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which adapter, of a file that holds several.")
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="PiSSA and the like: the adapter as saved before the first step."
        ),
    ] = None,
    logits: Logits = True,
    as_json: AsJson = False,
) -> None:
    """Make a foreign adapter a plain package that the server takes, or say everything that stands against it."""
    with _refusing(), _phases() as phases:
        from training.tools.importing import import_adapter

        report = import_adapter(
            source,
            out,
            name=name,
            base=base,
            revision=revision,
            alpha=alpha,
            adapter_name=adapter_name,
            initial=initial,
            check_logits=logits,
            on_progress=phases,
        )
    _say(report.text, report.as_dict, as_json)


def inspect(
    adapter: Adapter,
    base: Base = None,
    revision: Revision = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it as PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show singular values, effective ranks and norms of an adapter's change, by part, layer and module."""
    with _refusing(), _phases() as phases:
        from training.tools.spectrum import inspect as run

        spectrum = run(adapter, base=base, revision=revision, on_progress=phases)
        if plot is not None:
            from training.tools.spectrum_plot import plot_spectrum

            plot_spectrum(spectrum, plot)
    _say(spectrum.text, spectrum.as_dict, as_json)


def shrink(
    adapter: Adapter,
    out: Out,
    rank: Annotated[
        int | None, typer.Option(metavar="R", min=1, help="Most directions that a module keeps.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="As few directions as hold this share of a module's squared norm."
        ),
    ] = None,
    dtype: Annotated[StoredType, typer.Option(help="How A and B are stored.")] = StoredType.FLOAT32,
    base: Base = None,
    revision: Revision = None,
    logits: Logits = True,
    as_json: AsJson = False,
) -> None:
    """Lower an adapter's rank by the best approximation there is, and state the error."""
    with _refusing(), _phases() as phases:
        import torch

        from training.tools.shrink import shrink as run

        report = run(
            adapter,
            out,
            rank=rank,
            energy=energy,
            dtype=_dtype(dtype) or torch.float32,
            base=base,
            revision=revision,
            check_logits=logits,
            on_progress=phases,
        )
    _say(report.text, report.as_dict, as_json)


def _dtype(stored: StoredType | None) -> torch.dtype | None:
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return None if stored is None else names[stored.value]


@contextmanager
def _phases() -> Iterator[Phases]:
    from training.commands.phases import Phases
    from training.run.progress import open_progress

    with Phases(open_progress()) as phases:
        yield phases


@contextmanager
def _refusing() -> Iterator[None]:
    """Refusals become one message on stderr and status 2, a full disk and the like status 1."""
    from adapters.errors import AdapterError, AdapterRejected
    from base.errors import BaseError
    from training.tools.refusals import ToolRefused

    try:
        yield
    except (ToolRefused, AdapterError, BaseError) as error:
        details = error.details if isinstance(error, AdapterRejected) else ()
        typer.echo("\n  - ".join([f"lorikeet: {error}", *details]), err=True)
        raise typer.Exit(REFUSED) from error
    except OSError as error:
        typer.echo(f"lorikeet: it broke off, nothing was written: {error}", err=True)
        raise typer.Exit(FAILED) from error


def _say(text: str, facts: Callable[[], dict[str, object]], as_json: bool) -> None:
    if as_json:
        import orjson

        typer.echo(orjson.dumps(facts()).decode())
        return
    typer.echo(text)
