"""Promotes under load, as the bench does them, fewer: no failure, and every stream's text is exactly one version's."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from base.pocket import CHECKPOINT
from bench.promotes import figures, run
from tests.support.live_server import live_server

SAMPLES = Path(__file__).resolve().parents[2] / "adapters" / "samples"


def test_twelve_promotes_beside_sixteen_streams_mix_nothing_up(tmp_path: Path) -> None:
    for name in ("french", "patterns"):
        shutil.copytree(SAMPLES / name, tmp_path / "root" / name)
    with live_server(CHECKPOINT, tmp_path) as (url, _):
        outcome = asyncio.run(run(url, sources=("french", "patterns"), num_promotes=12, num_streams=16))
    assert outcome.failures == []
    assert outcome.num_mixed == 0
    assert (outcome.num_promotes, len(outcome.by_version)) == (12, 2)
    assert outcome.num_streams >= 16
    assert figures(outcome)["num_failures"] == 0
