"""Variants are packages like any other, each of other content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adapters.package import package_digest
from bench.living_packages import CONFIG, SAMPLE, WEIGHTS, Variants
from bench.living_storm import p99


@pytest.mark.parametrize("small", [False, True])
def test_variants_differ_in_their_digest_alone(tmp_path: Path, small: bool) -> None:
    variants = Variants(SAMPLE, small=small)
    one, two = (variants.write(tmp_path / str(number), number) for number in (1, 2))
    assert package_digest(one) != package_digest(two)
    assert package_digest(variants.write(tmp_path / "again", 1)) == package_digest(one)
    assert (one / WEIGHTS).stat().st_size == variants.num_bytes
    tensors, whole = load_file(one / WEIGHTS), load_file(SAMPLE / WEIGHTS)
    assert len(tensors) == (2 if small else len(whole))
    assert all(tensor.equal(whole[name]) for name, tensor in tensors.items())
    if small:
        (site,) = json.loads((one / CONFIG).read_text("utf-8"))["target_modules"]
        assert all(name.startswith(f"base_model.model.{site}.lora_") for name in tensors)


def test_the_percentile_is_one_of_the_values() -> None:
    assert p99([float(i) for i in range(1000)]) == 990.0
    assert p99([1.0]) == 1.0
