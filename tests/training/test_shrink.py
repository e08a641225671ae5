"""Shrink and inspect: the best small adapter there is, and errors that are those of the numbers written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.keys import parse_key
from adapters.weights import load_weights
from tests.support.packages import lora_config as peft_config
from tests.support.packages import make_package, random_tensors, tiny_sites, write_package
from tests.support.zoo import zoo
from tests.training.finished import adapted, config_of, made_by_peft, relative, small_checkpoint, tensors_of
from training.tools.low_rank import decompose, distance, entropy_rank, norm, rank_for_energy, singular_values
from training.tools.plain import sites_of
from training.tools.refusals import FolderRefused, ToolRefused
from training.tools.shrink import shrink
from training.tools.spectrum import inspect

SAMPLES = Path(__file__).parents[2] / "adapters" / "samples"
WIDE = {
    name: site
    for name, site in tiny_sites().items()
    if site.part == "merger" and min(site.in_features, site.out_features) > 64
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("base") / "small")


def deltas(folder: Path) -> dict[str, Tensor]:
    """Every site's s B A in full, float64, by the server's own reading."""
    weights = load_weights(folder, sites_of(folder))
    return {name: site.b.double() @ site.a.double() for name, site in weights.sites.items()}


def of_true_rank(folder: Path, rank: int, stored: int) -> Path:
    """A package of rank ``stored`` whose deltas have this true rank: B @ M @ A with factors of each."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for name, tensor in random_tensors(list(WIDE.values()), rank=rank).items():
        mix = torch.randn(stored, rank, generator=generator) / stored**0.5
        tensors[name] = mix @ tensor if "lora_A" in name else tensor @ torch.linalg.pinv(mix)
    return write_package(folder, tensors, peft_config(r=stored, lora_alpha=96, target_modules=list(WIDE)))


def test_delta_of_true_rank_16_in_rank_64_comes_through_whole(tmp_path: Path) -> None:
    package = of_true_rank(tmp_path / "r64", 16, 64)
    report = shrink(package, tmp_path / "r16", rank=16)
    assert report.error < 1e-6
    assert all(each.error < 1e-6 and (each.old_rank, each.rank) == (64, 16) for each in report.sites)
    for name, delta in deltas(tmp_path / "r16").items():
        assert relative(delta, deltas(package)[name]) < 1e-6
    assert config_of(tmp_path / "r16")["r"] == 16
    assert report.num_bytes * 4 == report.old_bytes


def test_error_of_a_random_delta_is_the_lost_singular_values(tmp_path: Path) -> None:
    package = make_package(tmp_path / "r64", WIDE, targets=["merger.mlp.0"], rank=64, lora_alpha=16)
    report = shrink(package, tmp_path / "r16", rank=16)
    ((name, delta),) = deltas(package).items()
    values = torch.linalg.svdvals(delta)
    expected = float(values[16:].norm() / values.norm())
    assert expected > 0.3
    assert report.sites[0].error == pytest.approx(expected, rel=1e-5)
    assert report.error == pytest.approx(expected, rel=1e-5)
    assert relative(deltas(tmp_path / "r16")[name], delta) == pytest.approx(expected, rel=1e-5)


def test_total_error_weighs_each_module_by_its_norm(tmp_path: Path) -> None:
    package = make_package(
        tmp_path / "old", tiny_sites(), targets=["q_proj", "down_proj", "attn.qkv"], rank=8
    )
    report = shrink(package, tmp_path / "new", rank=3)
    lost = kept = 0.0
    for name, delta in deltas(package).items():
        lost += float((delta - deltas(tmp_path / "new")[name]).square().sum())
        kept += float(delta.square().sum())
    assert report.error == pytest.approx(math.sqrt(lost / kept), rel=1e-5)
    assert len({round(each.norm, 3) for each in report.sites}) > 1


def test_energy_gives_each_module_the_fewest_directions_that_hold_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    package = made_by_peft(checkpoint, tmp_path / "old", zoo()["everything"])
    report = shrink(package, tmp_path / "new", energy=0.9, check_logits=False)
    for each in report.sites:
        values = torch.linalg.svdvals(deltas(package)[each.site])
        energy = values.square().cumsum(0) / values.square().sum()
        assert energy[each.rank - 1] >= 0.9
        assert each.rank == 1 or energy[each.rank - 2] < 0.9
        assert each.kept == pytest.approx(float(energy[each.rank - 1]), abs=1e-5)
    config = config_of(tmp_path / "new")
    ranks = {each.site: each.rank for each in report.sites}
    patterns = config["rank_pattern"]
    assert isinstance(patterns, dict)
    assert len(set(ranks.values())) > 1
    assert {name: patterns.get(name, config["r"]) for name in ranks} == ranks
    assert adapted(checkpoint, tmp_path / "new").isfinite().all()


@pytest.mark.parametrize("kind", ["rslora", "patterns", "dora_vision"])
def test_full_rank_shrink_only_folds_the_scales(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    package = made_by_peft(checkpoint, tmp_path / "old", zoo()[kind])
    shrink(package, tmp_path / "new", rank=64, check_logits=False)
    assert relative(adapted(checkpoint, tmp_path / "new"), adapted(checkpoint, package)) < 1e-4
    config = config_of(tmp_path / "new")
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == config["r"]


def test_magnitudes_of_dora_stay_and_the_error_of_the_weights_is_stated(
    checkpoint: Path, tmp_path: Path
) -> None:
    package = made_by_peft(checkpoint, tmp_path / "old", zoo()["dora"])
    report = shrink(package, tmp_path / "new", rank=4, check_logits=False)
    old, new = tensors_of(package), tensors_of(tmp_path / "new")
    magnitudes = [name for name in old if "magnitude" in name]
    assert magnitudes
    assert all(torch.equal(old[name], new[name]) for name in magnitudes)
    assert all(each.weight_error is not None and 0 < each.weight_error < 1 for each in report.sites)
    assert "magnitudes kept" in report.text


def test_logits_are_compared_where_the_base_is_at_hand(tmp_path: Path) -> None:
    whole = shrink(SAMPLES / "french", tmp_path / "whole", rank=16)
    half = shrink(SAMPLES / "french", tmp_path / "half", rank=2)
    assert whole.logits is not None and half.logits is not None
    assert whole.logits.of_effect < 1e-3 < 0.02 < half.logits.of_effect
    assert half.logits.effect > 1
    assert "not compared" not in half.text
    saved = json.loads((tmp_path / "half" / "lorikeet.json").read_text())
    assert saved["shrink"]["error"] == half.error


def test_stored_type_counts_in_the_error(tmp_path: Path) -> None:
    package = of_true_rank(tmp_path / "r64", 16, 64)
    report = shrink(package, tmp_path / "r16", rank=16, dtype=torch.bfloat16)
    assert 1e-4 < report.error < 1e-2
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "r16").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("rank", "energy", "reason"),
    [(None, None, "how far"), (0, None, "--rank is 0"), (None, 0.0, "--energy"), (None, 1.5, "--energy")],
)
def test_wishes_without_sense_are_refused(
    rank: int | None, energy: float | None, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ToolRefused, match=reason):
        shrink(SAMPLES / "french", tmp_path / "new", rank=rank, energy=energy)
    assert not (tmp_path / "new").exists()


def test_shrink_never_writes_over_its_source(tmp_path: Path) -> None:
    package = of_true_rank(tmp_path / "r64", 16, 64)
    with pytest.raises(FolderRefused):
        shrink(package, package, rank=16)


@pytest.mark.parametrize(("rank", "wide", "tall"), [(4, 30, 20), (40, 30, 20), (1, 5, 9), (20, 20, 20)])
def test_singular_values_through_the_factors_are_those_of_the_product(
    rank: int, wide: int, tall: int
) -> None:
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, wide, generator=generator)
    b = torch.randn(tall, rank, generator=generator)
    full = torch.linalg.svdvals(b.double() @ a.double())
    found = singular_values(a, b)
    assert torch.allclose(found, full[: len(found)], atol=1e-10)
    assert norm(a, b) == pytest.approx(float(full.norm()))
    assert distance(a, b, a, b) < 1e-6
    product = decompose(a, b)
    best_b, best_a = product.truncated(min(rank, wide, tall))
    assert torch.allclose(best_b @ best_a, b.double() @ a.double(), atol=1e-9)


def test_effective_ranks() -> None:
    assert entropy_rank(torch.ones(8)) == pytest.approx(8)
    assert entropy_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert entropy_rank(torch.zeros(3)) == 0
    values = torch.tensor([3.0, 1.0, 0.1])  # energies 9, 1, 0.01 of 10.01
    assert [rank_for_energy(values, energy) for energy in (0.5, 0.9, 0.99, 0.9999, 1.0)] == [1, 2, 2, 3, 3]
    assert rank_for_energy(torch.zeros(3), 0.9) == 0


def test_inspect_tells_the_rank_that_is_used_and_the_share_of_the_base(
    checkpoint: Path, tmp_path: Path
) -> None:
    package = made_by_peft(checkpoint, tmp_path / "adapter", zoo()["everything"])
    spectrum = inspect(package)
    full = deltas(package)
    for each in spectrum.sites:
        assert each.norm == pytest.approx(float(full[each.name].norm()), rel=1e-5)
        assert each.of_base is not None and each.of_base > 0
        assert each.rank_90 <= each.rank_99 <= each.rank == 8
    assert {each.part for each in spectrum.sites} == {"language", "vision", "merger"}
    assert json.loads(json.dumps(spectrum.as_dict()))["sites"][0]["layer"] == 0
    assert "merger" in spectrum.text and "%" in spectrum.text


def test_inspect_finds_true_rank_and_needs_no_base(tmp_path: Path) -> None:
    spectrum = inspect(of_true_rank(tmp_path / "r64", 16, 64))
    assert all(each.rank == 64 and each.rank_99 <= 16 and each.of_base is None for each in spectrum.sites)
    assert "lorikeet adapters shrink --rank" in spectrum.text


def test_sites_of_a_package_are_those_of_its_names(tmp_path: Path) -> None:
    package = make_package(tmp_path / "adapter", layout="before_4_52", targets=["q_proj", "attn.qkv"])
    wanted = {
        name: (site.in_features, site.out_features, site.part)
        for name, site in tiny_sites().items()
        if site.leaf in ("q_proj", "attn.qkv")
    }
    found = sites_of(package)
    assert {name: (each.in_features, each.out_features, each.part) for name, each in found.items()} == wanted
    assert all(parse_key(f"{name}.lora_A.weight") for name in found)
