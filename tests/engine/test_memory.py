"""The memory plan: parts from a budget, the KV cache as what is left, and a refusal that says what to change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapters.sites import Site, discover_sites
from adapters.slots import SlotBank, bank_bytes
from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from base.pocket import CHECKPOINT
from engine.config import DEFAULT_KV_BYTES, EngineConfig, MemoryBudget
from engine.kv import kv_bytes_per_token
from engine.memory import DeviceMemory, MemoryPlan, device_memory, plan_memory, step_bytes
from tests.support.lora import make_weights

SMALL = EngineConfig(
    num_slots=2, max_rank=8, max_batch_tokens=64, max_running=8, max_image_patches_per_step=256
)
SMALL = replace(SMALL, prefill_chunk=64, vision_cache_bytes=1 << 20)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base(BaseConfig(source=str(CHECKPOINT), device="cpu"))


def plan(base: BaseModel, config: EngineConfig, num_probe_blocks: int = 4) -> MemoryPlan:
    return plan_memory(config, base, discover_sites(base.module), torch.float32, num_probe_blocks)


def test_without_a_budget_the_cache_is_what_was_asked_for(base: BaseModel) -> None:
    assert plan(base, SMALL).kv_bytes == DEFAULT_KV_BYTES
    asked = plan(base, replace(SMALL, kv_bytes=4 << 20))
    assert asked.kv_bytes == 4 << 20
    assert asked.budget_bytes is None


@pytest.mark.parametrize("budget_mib", [200, 500, 1000])
def test_the_cache_gets_what_the_others_leave_to_the_block(base: BaseModel, budget_mib: int) -> None:
    made = plan(base, replace(SMALL, device_memory=MemoryBudget(num_bytes=budget_mib << 20)))
    block_bytes = kv_bytes_per_token(base.spec, base.dtype) * SMALL.block_size
    assert 0 <= (budget_mib << 20) - made.num_bytes < block_bytes
    assert made.parts["KV cache"] % block_bytes == 0
    assert {"vision", "adapter slots", "image cache", "one step", "probe"} <= set(made.parts)


def test_a_share_is_of_what_the_device_has(base: BaseModel) -> None:
    total = device_memory(torch.device("cpu"), 0)
    assert total == DeviceMemory(total.num_bytes, 0)
    made = plan(base, replace(SMALL, device_memory=MemoryBudget(share=0.5)))
    assert made.budget_bytes == total.num_bytes // 2
    assert MemoryBudget(num_bytes=7, share=0.5).of(100) == 7


def test_what_cannot_fit_is_refused_with_sizes_and_a_way_out(base: BaseModel) -> None:
    tiny = MemoryBudget(num_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"device_memory allows 1\.0 MiB.*vision.*raise device_memory"):
        plan(base, replace(SMALL, device_memory=tiny))
    with pytest.raises(ValueError, match=r"device_memory allows .*KV cache .*lower kv_memory"):
        plan(base, replace(SMALL, device_memory=MemoryBudget(num_bytes=200 << 20), kv_bytes=1 << 30))
    with pytest.raises(ValueError, match=r"kv_memory is 5 bytes; one block of this base takes \d+"):
        plan(base, replace(SMALL, kv_bytes=5))


def test_the_slots_share_is_what_a_full_bank_takes() -> None:
    sites = {name: Site(name, 64, 100, "language") for name in ("p", "q")}
    bank = SlotBank(sites, 3, 12, torch.float32, torch.device("cpu"))
    for slot in range(3):
        bank.write(slot, make_weights(slot, {"p": 12, "q": 12}, sites))
    assert bank.num_bytes == bank_bytes(sites, 3, 12, 4)


def test_room_that_the_base_holds_for_copies_is_not_counted_again(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = discover_sites(base.module)
    own = plan(base, SMALL).parts
    held = (
        2
        * 2
        * max(site.in_features * site.out_features for site in sites.values() if site.part == "language")
    )
    monkeypatch.setitem(base.memory_by_part, "copies", held)
    shared = plan(base, SMALL).parts
    assert own["copies"] == 0 and shared["copies"] == held
    assert shared["one step"] + held == own["one step"]


def test_more_rows_more_patches_and_a_larger_head_take_more(base: BaseModel) -> None:
    sites = discover_sites(base.module)

    def size(config: EngineConfig) -> int:
        return step_bytes(config, base.spec, sites, 2)

    assert size(replace(SMALL, max_batch_tokens=128)) > size(SMALL)
    assert size(replace(SMALL, max_image_patches_per_step=65_536)) > size(SMALL)
