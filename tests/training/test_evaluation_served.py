"""Judged for real: the sample adapter on the embedded base, answering through the engine that serves."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import pytest

from base.config import BaseConfig
from base.loader import load_base
from engine.offline import OfflineEngine
from training.data.formats import Conversation, DataFile, PictureRoot
from training.evaluation import Judging, evaluate
from training.evaluation.general import general_prompts
from training.samples.rows import ALL, write_rows

JSON = Path(__file__).parents[2] / "adapters" / "samples" / "json"


@pytest.mark.slow
def test_the_json_sample_passes_its_gate_and_needs_its_pictures(tmp_path: Path) -> None:
    _, path = write_rows(ALL["json"], tmp_path, num_rows=0, num_eval_rows=12)
    base = load_base(BaseConfig())
    rows = list(DataFile(path, root=PictureRoot(tmp_path, base_max_pixels=base.processor.images.max_pixels)))
    judging = Judging(
        metrics=("exact_match", "token_f1", "json_valid"),
        gate=("exact_match >= base + 0.5", "json_valid >= 0.9", "vision_dependence_exact >= 0.5"),
        max_tokens=48,
        vision_rows=6,
        general=general_prompts(base.spec.name)[:3],
    )
    held_out = [row for row in rows if isinstance(row, Conversation)]
    verdict = evaluate(lambda: closing(OfflineEngine(base)), base.processor, held_out, JSON, judging)
    assert verdict.passed, verdict.text()
    assert len(verdict.answers) == 12 and verdict.vision["base"].num_rows == 6
    assert verdict.adapter["exact_match"] >= 0.9
    assert verdict.base["exact_match"] == verdict.base["json_valid"] == 0.0
    assert verdict.adapter["general_agreement"] < 0.5  # it answers everything as JSON, and the number says so
    assert math.isfinite(verdict.adapter["general_kl"]) and verdict.adapter["general_kl"] > 0.1
