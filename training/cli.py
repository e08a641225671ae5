"""The commands of the making, added to a command line: train-adapter, plan, sweep.

Owns their names and help texts. At the top of this module and of the commands stands only what the parser needs, so
that `lorikeet --help` answers at once. `lorikeet.py` calls this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from training.commands import plan, sweep, train
from training.commands.parsing import PASS_THROUGH

if TYPE_CHECKING:
    from training.generation import GeneratorFactory


def add_commands(app: typer.Typer, make_generator: GeneratorFactory) -> None:
    """Add them to ``app``; ``make_generator`` opens the serving engine over a base, by which adapters are judged."""
    commands = {
        "train-adapter": (train.train_command(make_generator), "From a data file to a live, proven adapter."),
        "plan": (plan.command, "What a training run would take of a device's memory."),
        "sweep": (sweep.sweep_command(make_generator), "Train a grid of recipes over one base; compare them."),
    }  # fmt: skip
    for name, (command, short) in commands.items():
        app.command(name, short_help=short, context_settings=dict(PASS_THROUGH), add_help_option=False)(
            command
        )
