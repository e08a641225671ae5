"""The sample adapters: what each learns, as rows of data and a recipe for `lorikeet train-adapter`."""

from __future__ import annotations

from pathlib import Path


def recipe_of(name: str) -> Path:
    """The recipe that a sample was made with; the data are given beside it."""
    return Path(__file__).parent / f"{name}.yaml"
