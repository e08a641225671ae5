"""RunLog: one line of JSON for each step and each evaluation of a run, in the order in which they happened.

Owns: the file, and that it tells of each step once: a checkpoint remembers how long the log was, and a resumed run goes
on from there, so what a killed run did after its last checkpoint is not told twice. Does not know: what the numbers
mean. Place in a training run: written by the loop on the first process, read by `plots.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

LOG: Final = "log.jsonl"


class RunLog:
    """Append-only. Lines reach the system at once, and the disk at each ``sync``."""

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        """Go on behind the first ``num_bytes`` of ``path``; whatever stands after them is cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path: Final = path
        self._file = path.open("ab")
        self._file.truncate(min(num_bytes, self._file.tell()))
        self._file.seek(0, os.SEEK_END)

    def write(self, event: str, facts: Mapping[str, object]) -> None:
        line = json.dumps({"event": event, **facts}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Have all of it on the disk. The number of bytes, for the constructor."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


def read_log(path: Path) -> Iterator[dict[str, object]]:
    """Its events in order; a last line cut short by a kill is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
