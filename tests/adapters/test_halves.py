"""What bfloat16 holds to the bit is kept in it, what it does not is not, and no answer shows which it was."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor

from adapters.native_lora import NativeLora
from adapters.ops.site_group import SiteGroup, torch_adder
from adapters.ops.torch_ops import Rounding
from adapters.routing import Routing
from adapters.sites import Site
from adapters.slots import Form, PageKey, SlotBank
from adapters.staging import is_bfloat16
from adapters.triton_lora import TritonLora
from adapters.weights import load_weights
from base.ops.native_library import has_native_library, native_library
from tests.support.lora import CPU, make_weights
from tests.support.packages import lora_config, random_tensors, tiny_sites, write_package

SITES = {name: Site(name, 64, 100, "language") for name in ("p", "q", "r")}
FULL, HALF = torch.float32, torch.bfloat16
native_only = pytest.mark.skipif(not has_native_library(), reason="the compiled kernels are not here")


def make_bank(num_slots: int = 4, *, keeps_halves: bool = True) -> SlotBank:
    bank = SlotBank(SITES, num_slots, 64, FULL, CPU, keeps_halves=keeps_halves)
    bank.connect(lambda name: torch.ones(100, 64))
    return bank


# ---- what is kept in which


def bits(*numbers: int) -> Tensor:
    return torch.tensor([numbers], dtype=torch.int64).to(torch.int32).view(FULL)


@pytest.mark.parametrize(
    ("numbers", "is_half"),
    [
        (torch.tensor([[0.0, -0.0, 1.0, -1.5, 2.0**-130]]), True),
        (torch.tensor([[1.0 + 2.0**-7]]), True),
        (torch.tensor([[1.0 + 2.0**-8]]), False),
        (bits(0x7F7F0000, 0x00010000, -0x7FFF0000), True),  # the largest, and the smallest of either sign
        (bits(0x7F7FFFFF), False),
        (bits(0x00008000), False),  # a subnormal below bfloat16's
        (
            torch.cat([torch.ones(40, 3), torch.tensor([[1.0, 1.0, 0.1]])]),
            False,
        ),  # the last number of the last row
        (torch.ones(3, 8)[:, ::2], True),
    ],
)
def test_a_number_is_one_of_bfloat16_if_widening_gives_back_its_bits(numbers: Tensor, is_half: bool) -> None:
    assert is_bfloat16(numbers) == is_half
    assert torch.equal(numbers.to(HALF).float().view(torch.int32), numbers.view(torch.int32)) == is_half


@pytest.mark.parametrize(
    ("halves", "changed", "expected"),
    [("pq", None, {"p": HALF, "q": HALF}), ("p", None, {"p": HALF, "q": FULL}),
     ("pq", "a", {"p": FULL, "q": HALF}), ("pq", "b", {"p": FULL, "q": HALF})],
)  # fmt: skip
@pytest.mark.parametrize("is_dora", [False, True])
def test_a_site_is_kept_in_halves_where_neither_a_nor_b_loses_anything(
    halves: str, changed: str | None, expected: dict[str, torch.dtype], is_dora: bool
) -> None:
    weights = make_weights(0, {"p": 12, "q": 3}, SITES, is_dora=is_dora, halves=halves)
    if changed is not None:
        getattr(weights.sites["p"], changed)[-1, -1] = 0.1
    bank = make_bank()
    bank.write(2, weights)
    for name, dtype in expected.items():
        site, shelf = weights.sites[name], bank.shelf(name)
        rank = site.a.shape[0]
        form = shelf.forms[2]
        assert form == Form({12: 16, 3: 8}[rank], is_dora, dtype)
        assert shelf.pages.keys() == {form.key}
        pages = shelf.pages[form.key]
        assert pages.a.dtype == pages.b.dtype == dtype
        assert torch.equal(pages.a[2, :rank].float(), site.a)
        assert torch.equal(pages.b[2, :100, :rank].float(), site.b)
        assert not pages.a[2, rank:].any() and not pages.b[2, :, rank:].any() and not pages.b[2, 100:].any()
        assert (shelf.scale is None) == (not is_dora)
        assert shelf.scale is None or shelf.scale.dtype == FULL
    assert bank.stage(weights).num_bytes == sum(
        site.num_bytes - (site.a.nbytes + site.b.nbytes) // 2 * (expected[name] == HALF)
        for name, site in weights.sites.items()
    )


def test_a_bank_that_was_not_told_to_keeps_its_dtype() -> None:
    bank = make_bank(keeps_halves=False)
    bank.write(0, make_weights(0, {"p": 8}, SITES, halves="p"))
    assert bank.shelf("p").pages.keys() == {PageKey(8, FULL)}


def test_only_a_float32_bank_has_halves_and_tritons_programs_refuse_it() -> None:
    with pytest.raises(ValueError, match="no halves"):
        SlotBank(SITES, 1, 8, HALF, CPU, keeps_halves=True)
    with pytest.raises(ValueError, match="keeps halves"):
        TritonLora(SITES, make_bank())


@pytest.mark.parametrize(
    ("trained", "stored", "alpha", "is_half"),
    [
        (HALF, HALF, 8, True),
        (HALF, HALF, 1, True),
        (HALF, HALF, 12, False),  # B times 3 has two bits more
        (HALF, FULL, 8, True),  # the numbers count, not the file's type
        (FULL, FULL, 8, False),
        (torch.float16, torch.float16, 8, False),
    ],
)
def test_a_package_is_kept_in_halves_by_its_numbers_with_the_scale(
    trained: torch.dtype, stored: torch.dtype, alpha: int, is_half: bool, tmp_path: Path
) -> None:
    sites = tiny_sites()
    tensors = random_tensors(
        [site for site in sites.values() if site.leaf == "q_proj"], rank=4, dtype=trained
    )
    tensors = {f"base_model.model.{name}": tensor.to(stored) for name, tensor in tensors.items()}
    folder = write_package(tmp_path, tensors, lora_config(r=4, lora_alpha=alpha, target_modules=["q_proj"]))
    bank = SlotBank(sites, 1, 8, FULL, CPU, keeps_halves=True)
    staged = bank.stage(load_weights(folder, sites))
    assert {site.a.dtype for site in staged.sites.values()} == {HALF if is_half else FULL}


# ---- pages and bytes


def test_a_slot_rewritten_in_another_type_frees_what_nobody_uses() -> None:
    bank = make_bank()
    one_slot = 8 * (64 + 112) * 4  # rank 8; 100 outputs padded to 112
    half, full = (make_weights(0, {"p": 8}, SITES, halves=halves) for halves in ("p", ""))
    bank.write(0, half)
    assert (bank.slot_bytes(0), bank.num_bytes) == (one_slot // 2, 4 * one_slot // 2)
    bank.write(1, full)
    assert bank.shelf("p").pages.keys() == {PageKey(8, HALF), PageKey(8, FULL)}
    assert (bank.slot_bytes(1), bank.num_bytes) == (one_slot, 6 * one_slot)
    bank.write(0, full)
    assert bank.shelf("p").pages.keys() == {PageKey(8, FULL)}
    assert bank.num_bytes == 4 * one_slot
    bank.write(0, half)
    bank.clear(1)
    assert bank.shelf("p").pages.keys() == {PageKey(8, HALF)}
    assert bank.num_bytes == 2 * one_slot
    bank.clear(0)
    assert (bank.shelf("p").pages, bank.num_bytes) == ({}, 0)


# ---- what is computed

RANKS: Final = (8, 16, 24, 64, 16, 8)
DORA: Final = (1, 4)
WIDTHS: Final = (48, 100, 13)
STEPS: Final[dict[str, Sequence[tuple[int, int]]]] = {
    "one row": [(1, 0)],
    "a row each": [(1, slot) for slot in range(6)],
    "few rows each, and the base": [(2, 0), (1, -1), (3, 1), (5, 2), (7, 4), (1, 3), (2, 0)],
    "prompts": [(70, 1), (3, 5), (133, 2)],
}


class Twins:
    """Three sites on one input, and the same numbers in a bank that keeps halves and in one that does not."""

    def __init__(self, num_in: int, bias: Tensor | None, rounding: Rounding) -> None:
        names = [f"l{place}" for place in range(len(WIDTHS))]
        sites = {name: Site(name, num_in, out, "language") for name, out in zip(names, WIDTHS, strict=True)}
        self.adds, self.banks = {}, {}
        for kind, keeps_halves in (("full", False), ("kept", True)):
            bank = SlotBank(sites, len(RANKS), 64, FULL, CPU, keeps_halves=keeps_halves)
            bank.connect(lambda name: torch.ones(sites[name].out_features, num_in))
            dice = random.Random(num_in)
            for slot, rank in enumerate(RANKS):
                halves = [name for name in names if dice.random() < 0.6]
                ranks = dict.fromkeys(names, rank)
                bank.write(slot, make_weights(slot, ranks, sites, is_dora=slot in DORA, halves=halves))
            group = SiteGroup(tuple(bank.shelf(name) for name in names), rounding, bias)
            self.banks[kind] = bank
            self.adds[kind] = NativeLora(sites, bank, native_library()).adder(group)
            self.adds[f"{kind}, plainly"] = torch_adder(group)

    def __call__(self, y: Tensor, x: Tensor, segments: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        routing = Routing(CPU)
        routing.fill(segments)
        found = {}
        for kind, add in self.adds.items():
            found[kind] = y.clone()
            add(found[kind], x, routing)
        return found


@native_only
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_in", [64, 100, 333])
@pytest.mark.parametrize("dtypes", list(product([FULL, HALF], repeat=2)), ids=str)
@pytest.mark.parametrize("rounding", list(Rounding))
def test_what_is_kept_in_halves_gives_the_same_bits(
    num_in: int, dtypes: tuple[torch.dtype, torch.dtype], rounding: Rounding
) -> None:
    generator = torch.Generator().manual_seed(num_in)
    y_dtype, x_dtype = dtypes
    bias = torch.randn(sum(WIDTHS), generator=generator).to(y_dtype)
    twins = Twins(num_in, bias, rounding)
    for name in ("l0", "l1", "l2"):
        assert {form.dtype for form in twins.banks["kept"].shelf(name).forms} == {FULL, HALF}, (
            "both at each site"
        )
    for segments in STEPS.values():
        num_rows = sum(count for count, _ in segments)
        x = torch.randn(num_rows, num_in, generator=generator).to(x_dtype)
        y = torch.randn(num_rows, sum(WIDTHS), generator=generator).to(y_dtype)
        found = twins(y, x, segments)
        assert torch.equal(found["kept"], found["full"]), segments
        assert torch.equal(found["kept, plainly"], found["full, plainly"]), segments
        epsilon = torch.finfo(y_dtype).eps
        torch.testing.assert_close(
            found["kept"], found["full, plainly"], rtol=4 * epsilon, atol=4 * epsilon + 1e-5
        )
        touched = [slot != -1 for count, slot in segments for _ in range(count)]
        assert (found["kept"] != y).any(dim=1).tolist() == touched
