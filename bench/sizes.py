"""Sizes: how long prompts and answers are, and how many calls, on a small machine and on a large one."""

from __future__ import annotations

from dataclasses import dataclass

from bench.draws import Lengths


@dataclass(frozen=True, slots=True)
class Size:
    """One scale of every workload; workloads of different sizes have different digests."""

    prompt: Lengths  # words
    output: Lengths  # tokens
    calls_per_stream: int
    """Of a closed loop; at least ``min_calls`` in all."""
    min_calls: int
    num_open_calls: int
    rate: float
    """Calls a second of an open loop, where none is given."""
    pictures: tuple[tuple[int, int], ...]
    """Widths and heights, mixed evenly."""
    num_system_words: int = 512
    num_long_words: int = 2000


SIZES = {
    # A run of seconds, to see that everything works.
    "smoke": Size(Lengths(4, 12), Lengths(4, 8), 2, 4, 8, 4.0, ((56, 56), (84, 56)), 32, 100),
    # The embedded base: its context is short.
    "pocket": Size(
        Lengths(8, 48), Lengths(16, 32), 4, 16, 64, 8.0, ((112, 112), (112, 84), (56, 112)), 96, 300
    ),
    # The 0.5B-like shape on two cores.
    "small": Size(
        Lengths(32, 128), Lengths(32, 64), 2, 8, 48, 0.5, ((224, 224), (448, 336), (336, 448)), 512, 2000
    ),
    # The same shape, short enough that a claim's pairs are had in minutes.
    "prove": Size(Lengths(8, 16), Lengths(8, 8), 1, 1, 8, 0.5, ((448, 336), (336, 448), (224, 224))),
    # The real shapes on a GPU.
    "full": Size(
        Lengths(64, 1024),
        Lengths(64, 256),
        4,
        64,
        512,
        16.0,
        ((640, 480), (1024, 768), (768, 1024)),
        512,
        2000,
    ),
}
