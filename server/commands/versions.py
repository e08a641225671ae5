"""The versions that decide what an answer looks like. Read from the installed packages; nothing is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

NAMES = (
    "lorikeet",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "fastapi",
    "llguidance",
    "triton",
)


def installed_versions() -> dict[str, str]:
    """Name to version, Python first; what is not installed says so."""
    return {"python": platform.python_version()} | {name: _version(name) for name in NAMES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
