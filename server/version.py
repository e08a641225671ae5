"""The program's own version, from the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("lorikeet")
    except PackageNotFoundError:  # run from a checkout that nobody installed
        return "0+checkout"


VERSION = _installed()
