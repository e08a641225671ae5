"""A process that loads the base once and forks a run from it for each kill; ``python -m tests.training.nursery``.

Its children are killed with SIGKILL at random moments and begun again until they end. It prints, as JSON, what a run
that was never killed left, and then each chain of them. Without CUDA and with one thread it has no thread to inherit.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.training.loops import run, tiny_base, tiny_recipe, words
from training.recipe.recipe import Recipe

RECIPE = tiny_recipe(preset=("language",), save_steps=1, eval_steps=2, keep_checkpoints=2)
RESULT = "result.safetensors"


@dataclass(frozen=True, slots=True)
class Chain:
    """One run, however often it was killed."""

    num_kills: int
    num_drafts: int
    """Kills that left a half-written checkpoint."""
    adapter: str
    """Digest of the final weights' file."""
    steps: tuple[int, ...]
    """Told by the log, in order."""
    losses: tuple[float, ...]


def child(folder: Path, recipe: Recipe) -> int:
    """Fork a run that goes on in ``folder``. Its process id."""
    number = os.fork()
    if number:
        return number
    try:
        go_on(folder, recipe)
        os._exit(0)
    finally:
        os._exit(1)


def go_on(folder: Path, recipe: Recipe) -> None:
    made = run(folder, recipe, held_out=words(3), resume=True)
    save_file(dict(made.state), folder / f".{RESULT}")  # type: ignore[arg-type]
    (folder / f".{RESULT}").rename(folder / RESULT)


def ended(number: int, within_s: float) -> bool:
    """Whether the child ended by itself in that time; otherwise it is killed. Raises RuntimeError if it failed."""
    watched = os.pidfd_open(number)
    try:
        if not select.select([watched], [], [], within_s)[0]:
            os.kill(number, signal.SIGKILL)
        _, status = os.waitpid(number, 0)
    finally:
        os.close(watched)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a run failed")
    return os.WIFEXITED(status)


def chain(folder: Path, chance: random.Random, longest_s: float) -> Chain:
    """One run, killed and begun again until it ends."""
    kills = drafts = 0
    while not ended(child(folder, RECIPE), chance.uniform(0.0, longest_s)):
        kills += 1
        drafts += any((folder / "checkpoints").glob(".*"))
    return left_in(folder, kills, drafts)


def left_in(folder: Path, kills: int = 0, drafts: int = 0) -> Chain:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    return Chain(
        kills, drafts, hashlib.sha256((folder / RESULT).read_bytes()).hexdigest(),
        tuple(event["step"] for event in steps), tuple(event["loss"] for event in steps),
    )  # fmt: skip


def main(folder: Path, num_kills: int) -> None:
    torch.set_num_threads(1)
    tiny_base()
    go_on(folder / "first", RECIPE)  # so that every module is imported before a fork
    gc.collect()
    gc.freeze()
    began = time.monotonic()
    go_on(folder / "whole", RECIPE)
    longest_s = 0.8 * (time.monotonic() - began)  # most attempts are killed, and yet each can get on
    chains = [left_in(folder / "whole")]
    chance = random.Random(20261121)
    while sum(each.num_kills for each in chains) < num_kills:
        chains.append(chain(folder / str(len(chains)), chance, longest_s))
    sys.stdout.write(json.dumps([asdict(each) for each in chains]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
