"""The packages that lie in the adapter roots: registered at start, each content once.

An index in the state folder remembers what was registered, so that a start reads only what is new, and so that an
adapter which an admin has deleted does not come back with the next start. Knows no engine.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from adapters.errors import AdapterError

if TYPE_CHECKING:
    from adapters.registry import Registry
    from adapters.sources.local import LocalSource

logger = logging.getLogger("lorikeet.server")

INDEX_NAME = "roots.json"
LEDGER_NAME = "registry.sqlite"
_FILES = ("adapter_config.json", "adapter_model.safetensors", "lorikeet.json")

Stamp = list[list[int]]
"""Size and modification time of a package's files: the same stamp, the same content."""


@dataclass(slots=True)
class RootsReport:
    num_found: int = 0
    registered: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def register_roots(source: LocalSource, registry: Registry, state_dir: Path) -> RootsReport:
    """Register what is new in the roots. One package's failure is reported by name and stops nothing."""
    index = _read(state_dir)
    report = RootsReport()
    for name, folder in source.scan().items():
        report.num_found += 1
        stamp = _stamp(folder)
        if index.get(name) == stamp:
            continue
        try:
            registry.register(name, folder, source=f"local:{name}", within=source.root_of(folder.resolve()))
        except AdapterError as error:
            report.failures[name] = str(error)
            logger.warning("adapter.skipped name=%s error=%s", name, type(error).__name__)
        else:
            report.registered.append(name)
            index[name] = stamp
    _write(state_dir, index)
    return report


def _stamp(folder: Path) -> Stamp:
    stamps = []
    for name in _FILES:
        try:
            found = (folder / name).stat()
        except OSError:
            stamps.append([0, 0])
        else:
            stamps.append([found.st_size, found.st_mtime_ns])
    return stamps


def _ledger_id(state_dir: Path) -> int:
    """Which registry the index speaks of; a new one starts from nothing."""
    return (state_dir / LEDGER_NAME).stat().st_ino


def _read(state_dir: Path) -> dict[str, Stamp]:
    try:
        document = orjson.loads((state_dir / INDEX_NAME).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    if not isinstance(document, dict) or document.get("ledger") != _ledger_id(state_dir):
        return {}
    packages = document.get("packages")
    return packages if isinstance(packages, dict) else {}


def _write(state_dir: Path, index: dict[str, Stamp]) -> None:
    """Whole or not at all. A disk that is full costs the next start some time, nothing more."""
    data = orjson.dumps({"ledger": _ledger_id(state_dir), "packages": index})
    try:
        with tempfile.NamedTemporaryFile(dir=state_dir, prefix=".roots-", delete=False) as file:
            file.write(data)
        os.replace(file.name, state_dir / INDEX_NAME)
    except OSError as error:
        logger.warning("roots.index_not_written error=%s", type(error).__name__)
