"""Bed: the checkpoints, adapters and servers that proofs stand on; made once, kept in a folder for the next run.

Owns the lives of the servers: one over the made shape that several proofs share, and those of a single proof. Knows no
claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.cells import Plan, Tell
from bench.endpoint import Endpoint
from bench.running import OurServer, our_server
from bench.shape_adapters import make_adapters
from bench.shapes import SHAPES, make_checkpoint

POCKET = Path(__file__).resolve().parent.parent.parent / "base" / "pocket" / "checkpoint"
NUM_ADAPTERS = 16
"""Of the made shape: as many as the peers' claim has streams."""
WARM_UP_TOKENS = 4


@dataclass(slots=True)
class Bed:
    """Where a run of proofs finds things."""

    folder: Path
    """Of what is made; a second run finds it there."""
    shape: str
    num_pairs: int
    tell: Tell
    other_servers: tuple[str, ...] = ()
    """Further peers, as label,url,model,naming."""
    _servers: ExitStack = field(default_factory=ExitStack)
    _shared: Endpoint | None = None
    _peak_bytes: Callable[[], int] = field(default=lambda: 0)

    def plan(self, size: str, *, num_calls: int | None = None) -> Plan:
        return Plan(size, self.num_pairs, num_calls, warm_up_tokens=WARM_UP_TOKENS, pairs_per_repeat=1)

    @property
    def checkpoint(self) -> Path:
        """The made shape's, written when it is first wanted."""
        folder = self.folder / self.shape
        if not (folder / "model.safetensors.index.json").exists():
            self.tell(f"making a checkpoint of shape {self.shape} in {folder}")
            make_checkpoint(SHAPES[self.shape], folder)
        return folder

    @property
    def adapters(self) -> Path:
        """Rank 16 on every language linear of the made shape."""
        return self.adapters_of(self.checkpoint, NUM_ADAPTERS)

    def adapters_of(self, checkpoint: Path, num: int) -> Path:
        base = "pocket" if checkpoint == POCKET else self.shape
        folder = self.folder / f"{base}-adapters-{num}"
        self.tell(f"{num} adapters in {folder}")
        make_adapters(checkpoint, folder, num)
        return folder

    def shared(self) -> Endpoint:
        """The made shape with its adapters, all in slots; up until the bed is closed."""
        if self._shared is None:
            flags = ("--num-slots", str(NUM_ADAPTERS), "--max-rank", "16")
            setup = OurServer(str(self.checkpoint), self.adapters, flags)
            self._shared, served = self._servers.enter_context(our_server(setup, self.tell))
            self._peak_bytes = served.peak_bytes
        return self._shared

    def peak_bytes(self) -> int:
        """The shared server's memory at its most; 0 before it is up."""
        return self._peak_bytes()

    @contextmanager
    def bare(self) -> Iterator[Endpoint]:
        """The made shape, started with no adapters at all."""
        empty = self.folder / "none"
        empty.mkdir(parents=True, exist_ok=True)
        setup = OurServer(str(self.checkpoint), empty, ("--num-slots", "1", "--max-rank", "16"))
        with our_server(setup, self.tell) as (endpoint, _):
            yield endpoint

    @contextmanager
    def pocket(self, num_adapters: int) -> Iterator[Endpoint]:
        """The embedded base over so many made adapters, with the slots of its default."""
        root = self.adapters_of(POCKET, num_adapters)
        with our_server(OurServer("pocket", root), self.tell) as (endpoint, _):
            yield endpoint

    def close(self) -> None:
        self._servers.close()
