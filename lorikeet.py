"""The command line's door: `lorikeet serve | train-adapter | adapters | chat | plan | sweep | bench | doctor | ...`.

Owns the way in, and the one joint of the rooms: training judges adapters by the engine that serves, and may not import
it, so it is handed over here. It puts the folder that it lies in first on the import path, because `adapters` is also
the import name of another project. Commands import what they need when they run: that keeps `lorikeet --help` under
0.3 s.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    from base.model import BaseModel
    from training.generation import Generator


def main() -> None:
    """Run the command line on sys.argv; ends the process with the command's exit status."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    command_line()()


@cache
def command_line() -> typer.Typer:
    """The server's commands, the making's and the bench's, as one."""
    from bench.cli import app as bench
    from server.cli import app
    from server.commands import adapters
    from training.cli import add_commands
    from training.commands.adapters import register

    add_commands(app, serving_engine)
    register(adapters.app, serving_engine)
    app.add_typer(bench, name="bench")
    return app


def serving_engine(base: BaseModel) -> Generator:
    """The engine that serves, over ``base``, for whoever judges adapters."""
    from engine.offline import OfflineEngine

    return OfflineEngine(base)


if __name__ == "__main__":
    main()
