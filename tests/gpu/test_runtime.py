"""On a CUDA device: slots written beside the steps hold what was staged, the memory plan holds, and the engine's own
process answers as its thread does. Skipped where there is none.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from adapters.mover import Mover
from adapters.moves import Load, Moved
from adapters.sites import Site, discover_sites
from adapters.slots import PageKey, SlotBank
from adapters.weights import AdapterWeights
from base.config import BaseConfig
from base.loader import load_base
from base.pocket import CHECKPOINT
from engine.build import build_parts
from engine.client import EngineClient
from engine.config import EngineConfig, MemoryBudget
from engine.observer import SilentObserver
from engine.process import EngineProcess, Upward
from engine.remote import Begin
from tests.support.lora import make_ref, make_weights
from tests.support.oracle import load_stock
from tests.support.packages import peft_adapter
from tests.support.scenes import scene
from tests.support.serving import Ask, Rig, gather
from tests.support.zoo import LANGUAGE

pytestmark = pytest.mark.gpu

SITES = {f"s{i}": Site(f"s{i}", 2048, 2050, "language") for i in range(24)}
SLICE = 4 << 20


@pytest.mark.parametrize("is_dora", [False, True])
def test_slices_beside_running_kernels_land_whole(is_dora: bool) -> None:
    device = torch.device("cuda")
    bank = SlotBank(SITES, 2, 16, torch.bfloat16, device)
    bank.connect(lambda name: torch.ones(2050, 2048, device=device))
    weights: dict[int, AdapterWeights] = {
        seed: make_weights(seed, dict.fromkeys(SITES, 12), SITES, is_dora=is_dora) for seed in (1, 2)
    }
    mover = Mover(bank, lambda ref: weights[ref.version], 1 << 30, lambda: None)
    busy = torch.randn(4096, 4096, device=device)
    for version in (1, 2, 1):
        mover.start([Load(make_ref("a", version), 0)])
        done: list[object] = []
        while not done:
            busy = (busy @ busy).tanh()  # the steps' stream is never empty
            done += mover.finished(SLICE)
        (moved,) = done
        assert isinstance(moved, Moved)
        staged = bank.stage(weights[version])
        for name, site in staged.sites.items():
            pages = bank.shelf(name).pages[PageKey(16, torch.bfloat16)]
            assert torch.equal(pages.a[0, :12].cpu(), site.a)
            assert torch.equal(pages.b[0, :2050, :12].cpu(), site.b)
            assert not pages.a[0, 12:].any() and not pages.b[0, 2050:].any() and not pages.b[0, :, 12:].any()
        bank.clear(0)
    mover.close()


def test_an_engine_stays_inside_its_budget() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = load_base(BaseConfig(source=str(CHECKPOINT), device="cuda"))
    config = EngineConfig(num_slots=2, device_memory=MemoryBudget(share=0.25))
    before = torch.cuda.memory_allocated()

    class Nothing:
        def load(self, ref: object) -> AdapterWeights:
            raise AssertionError("nobody asked")

    parts = build_parts(base, Nothing(), config, SilentObserver(), lambda messages: None)
    try:
        assert parts.memory.budget_bytes is not None
        taken = torch.cuda.max_memory_allocated() - before + sum(base.memory_by_part.values())
        assert parts.memory.num_bytes <= parts.memory.budget_bytes
        assert taken <= parts.memory.num_bytes
        assert parts.memory.parts["KV cache"] > parts.memory.budget_bytes // 2
    finally:
        parts.close()


def test_the_engines_process_answers_as_its_thread_does(tmp_path: Path) -> None:
    config = EngineConfig(num_slots=2, kv_bytes=64 << 20)
    rig = Rig(str(CHECKPOINT), tmp_path, config, device="cuda")
    model = load_stock(CHECKPOINT, quantized=False)
    peft_adapter(model, LoraConfig(r=8, target_modules=LANGUAGE), tmp_path / "words", 0).unload()
    rig.register({"words": tmp_path / "words"})
    asks = [Ask("Who are you?"), Ask("Describe the picture.", "words", (scene(),))]
    process = EngineProcess(
        Begin(BaseConfig(source=str(CHECKPOINT), device="cuda"), config, str(tmp_path / "packages"), 30)
    )
    process.begin()
    try:
        facts = process.wait_ready()
        assert facts.device.startswith("cuda")
        assert dict(facts.sites) == dict(discover_sites(rig.base.module))
        client = EngineClient(config, facts.max_model_len, rig.base.processor, facts.memory)
        client.connect(process)
        process.connect(Upward(client.deliver, client.fail_streams, SilentObserver()))

        async def there() -> list[tuple[int, ...]]:
            return [(await gather(client.submit(rig.request(ask)))).token_ids for ask in asks]

        # one after the other: the same shapes choose the same kernels
        assert asyncio.run(there()) == [a.token_ids for a in asyncio.run(rig.alone(asks))]
    finally:
        process.close()
        rig.close()
