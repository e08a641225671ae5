"""LocalSource: folders under allowed roots, and nothing else on this machine.

Owns the comparison of real paths. Does not read what is in a folder; the store copies it, and checks its links again.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapters.errors import SourceRejected
from adapters.package import CONFIG_NAME

_log = logging.getLogger("lorikeet.adapters.sources")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")


class LocalSource:
    """Resolves what a client calls a source. Errors never say where the roots are, or what lies outside them."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)

    def resolve(self, source: str) -> Path:
        """The real folder that ``source`` means: an absolute path, or one relative to a root (the first that has it).

        Raises SourceRejected for other schemes, for paths that lead out of every root, and for what is no folder.
        """
        path = self._local_path(source)
        candidates = [path] if path.is_absolute() else [root / path for root in self._roots]
        for candidate in candidates:
            real = _real_folder(candidate)
            if real is not None and self._is_allowed(real):
                return real
        raise SourceRejected(
            "the source is no folder under this server's adapter roots; copy the package there, or start the server "
            "with --adapter-root"
        )

    def root_of(self, folder: Path) -> Path:
        """The root that holds a resolved folder: links in the package may lead anywhere below it."""
        return next(root for root in self._roots if folder.is_relative_to(root))

    def scan(self) -> dict[str, Path]:
        """The packages that lie in the roots, as ``name`` or ``org/name`` for a folder or one level deeper."""
        found: dict[str, Path] = {}
        for root in self._roots:
            for name, folder in _packages(root):
                if not self._is_allowed(Path(os.path.realpath(folder))):
                    _log.warning("source.skipped name=%s why=leads_out_of_root", name)
                    continue
                found.setdefault(name, folder)
        return dict(sorted(found.items()))

    def _is_allowed(self, real: Path) -> bool:
        return any(real.is_relative_to(root) for root in self._roots)

    def _local_path(self, source: str) -> Path:
        if source.startswith("file://"):
            source = source.removeprefix("file://")
        elif _SCHEME.match(source):
            raise SourceRejected(
                f"source {source[:96]!a} has a scheme that is off here; give a folder under an allowed adapter root"
            )
        if not source or "\0" in source:
            raise SourceRejected(
                "the source is empty or malformed; give a folder under an allowed adapter root"
            )
        return Path(source)


def _real_folder(path: Path) -> Path | None:
    try:
        real = Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError):
        return None
    return real if real.is_dir() else None


def _packages(root: Path) -> Iterator[tuple[str, Path]]:
    if _is_package(root):
        yield root.name, root
    for folder in _folders(root):
        if _is_package(folder):
            yield folder.name, folder
            continue
        for inner in _folders(folder):
            if _is_package(inner):
                yield f"{folder.name}/{inner.name}", inner


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(
            Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
        )
    except OSError:
        return []


def _is_package(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()
