"""join_processes: the one or several processes that make up a run.

Under ``accelerate launch`` every process checks the data and trains; the first alone prints, writes, judges, packages
and deploys, and the others end when training has. Owns: how they find each other. Place in a training run: before all.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from training.loop.ranks import Ranks, ranks_now

PATIENCE: Final = timedelta(hours=12)
"""How long a process waits for the others: a hub data set, or judging between steps, may take its time."""


def join_processes() -> Ranks:
    """As ``accelerate launch`` or ``torchrun`` made them; alone without."""
    from accelerate import PartialState

    PartialState(timeout=PATIENCE)
    return ranks_now()
