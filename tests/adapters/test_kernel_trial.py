"""The trial of a kernel's adapters: agreement of every kind of site and rank here, and a planted fault is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adapters import kernel_trial
from adapters.kernel_trial import try_lora
from adapters.native_lora import NativeLora
from adapters.ops import triton_ops
from adapters.sites import Site, SiteTable
from adapters.slots import SlotBank
from adapters.triton_lora import TritonLora
from base.kernel_check import error_of
from base.ops.native_library import has_native_library, native_library

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these, compiled")

CPU = torch.device("cpu")
SITES = {
    "a": Site("a", 128, 80, "language"),
    "b": Site("b", 72, 128, "vision"),
    "like_a": Site("like_a", 128, 80, "language"),
    "four": Site("four", 128, 80, "language"),
}


class FourBit(nn.Linear):
    is_quantised = True


def model() -> nn.Module:
    return nn.ModuleDict({
        "a": nn.Linear(128, 80), "b": nn.Linear(72, 128, bias=False), "like_a": nn.Linear(128, 80),
        "four": FourBit(128, 80),
    })  # fmt: skip


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow over hundreds of rows."""
    monkeypatch.setattr(kernel_trial, "STEPS", kernel_trial.STEPS[:3])


def worst(dtype: torch.dtype) -> dict[str, float]:
    """Of each site, the largest error over its output's own size."""
    errors: dict[str, float] = {}
    for what, found, expected in try_lora(model(), SITES, 16, dtype, dtype, CPU, TritonLora):
        assert found.dtype == expected.dtype == dtype
        name = what.split()[0]
        apart = (found - expected).float().norm() / expected.float().norm()
        errors[name] = max(errors.get(name, 0.0), float(apart))
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_site_of_each_kind_agrees(dtype: torch.dtype) -> None:
    errors = worst(dtype)
    assert set(errors) == {"a", "b", "four"}
    assert max(errors.values()) < (1e-5 if dtype == torch.float32 else 8e-3)


class Merged(nn.Linear):
    """As the base's: known by the names of its parts."""

    part_names = ("a", "like_a")


def merged_model() -> nn.Module:
    return nn.ModuleDict({**dict(model().named_children()), "both": Merged(128, 160)})


@pytest.mark.skipif(not has_native_library(), reason="the compiled kernels are not here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keeps_halves", [False, True])
def test_the_compiled_kernel_agrees_at_every_step(dtype: torch.dtype, keeps_halves: bool) -> None:
    def native(sites: SiteTable, bank: SlotBank) -> NativeLora:
        banks.append(bank)
        return NativeLora(sites, bank, native_library())

    banks: list[SlotBank] = []
    cases = list(
        try_lora(merged_model(), SITES, 16, torch.float32, dtype, CPU, native, keeps_halves=keeps_halves)
    )
    assert {what.split()[0] for what, _, _ in cases} == {"both", "b", "four"}
    assert max(error_of(found, expected) for _, found, expected in cases) < 1
    halves = [form.dtype == torch.bfloat16 for form in banks[0].shelf("a").forms]
    assert halves == [False, keeps_halves, False]


def test_a_merged_linear_is_tried_whole_and_its_parts_are_not() -> None:
    cases = list(try_lora(merged_model(), SITES, 16, torch.float32, torch.float32, CPU, TritonLora))
    assert {what.split()[0] for what, _, _ in cases} == {"both", "b", "four"}
    assert {found.shape[1] for what, found, _ in cases if what.startswith("both")} == {160}
    for _, found, expected in cases:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_sites_columns_in_anothers_place_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters import triton_lora

    real: Callable[..., Tensor] = triton_ops.add_lora

    def swapped(y: Tensor, *rest: object) -> Tensor:
        return y.copy_(real(y.clone(), *rest).roll(80, 1)) if y.shape[1] == 160 else real(y, *rest)

    monkeypatch.setattr(triton_lora, "add_lora", swapped)
    for what, found, expected in try_lora(
        merged_model(), SITES, 16, torch.float32, torch.float32, CPU, TritonLora
    ):
        assert torch.allclose(found, expected, atol=1e-2) != what.startswith("both")


def planted_slots(y: Tensor, x: Tensor, *args: object, real: Callable[..., Tensor]) -> Tensor:
    return real(y, x.roll(1, 0), *args)


def test_rows_of_another_request_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters import triton_lora

    real = triton_ops.add_lora
    monkeypatch.setattr(triton_lora, "add_lora", lambda y, x, *rest: planted_slots(y, x, *rest, real=real))
    assert min(worst(torch.float32).values()) > 0.1


def test_every_step_has_what_it_is_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters change the output, by as much as the base's; several ranks are there, DoRA's scale too."""
    banks: list[SlotBank] = []
    real = kernel_trial._bank

    def kept(*args: object) -> SlotBank:
        banks.append(real(*args))  # type: ignore[arg-type]
        return banks[0]

    monkeypatch.setattr(kernel_trial, "_bank", kept)
    for what, _, expected in try_lora(model(), SITES, 16, torch.float32, torch.float32, CPU, TritonLora):
        rows = int(what.split()[-2])
        y = kernel_trial._numbers(2, rows, expected.shape[1])
        share = float((expected - y).norm() / y.norm())
        assert 0.3 < share < 5, (what, share)
    shelf = banks[0].shelf("a")
    assert [form.rank for form in shelf.forms] == [8, 8, 16]
    assert [form.is_dora for form in shelf.forms] == [False, False, True]


def test_without_adapters_of_several_ranks_there_is_still_a_trial() -> None:
    assert len(list(try_lora(model(), SITES, 1, torch.float32, torch.float32, CPU, TritonLora))) == 9
