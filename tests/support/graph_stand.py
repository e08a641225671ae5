"""A base with adapters in slots, run step by step twice: as it is, and recorded. Each side has a cache of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapters.layer import attach
from adapters.ops.site_group import torch_adder
from adapters.routing import RoutingSet
from adapters.sites import discover_sites
from adapters.slots import SlotBank
from adapters.triton_lora import TritonLora
from base.attention import DecodeAttention, PagedAttention
from base.decoder import Decoder, Parts
from base.linear import dequantised_weight
from base.model import BaseModel
from engine.decode_buffers import DecodeBuffers
from engine.graphs import DecodeGraphs
from engine.kv import KVCache
from engine.recorder import Recorder
from engine.runner import Runner, StepLogits
from engine.sequence import BASE_SLOT
from engine.sequence import Sequence as Row
from engine.step import Chunk, StepPlan
from engine.tiling import Tiling
from engine.vision_cache import VisionCache
from tests.support.lora import make_weights
from tests.support.requests import make_sequence

BLOCK = 4
MAX_BLOCKS = 8
NUM_BLOCKS = 96
MAX_ROWS = 8
NUM_SLOTS = 5


def shorten(base: BaseModel, attention: PagedAttention) -> None:
    """To its first layer, over another attention: Triton's interpreter takes seconds for all of them."""
    text = base.module.model.language_model
    text.layers = text.layers[:1]
    base.spec = replace(base.spec, num_layers=1)
    base.decoder = Decoder(text, Parts(attention))


def _is_adapted(site: str) -> bool:
    """Three that share an input and one that does not, of the first layer."""
    return ".layers.0." in site and site.endswith(("q_proj", "k_proj", "v_proj", "down_proj"))


class Stand:
    """Mutates ``base``: its linears are wrapped. One stand a base; ``graphs`` as many as wanted."""

    def __init__(self, base: BaseModel, slot_dtype: torch.dtype, *, has_triton: bool = True) -> None:
        self.base = base
        self.sites = {name: site for name, site in discover_sites(base.module).items() if _is_adapted(name)}
        self.bank = SlotBank(self.sites, NUM_SLOTS, 32, slot_dtype, base.device)
        self.routing = RoutingSet.on(base.device)
        self.lora = TritonLora(self.sites, self.bank) if has_triton else None
        adder = torch_adder if self.lora is None else self.lora.adder
        attach(base.module, self.sites, self.bank, self.routing, dequantised_weight, adder)
        self.eager, self.eager_cache = self._runner()
        self.recorded, self.cache = self._runner()
        self._free = list(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist())

    def _runner(self) -> tuple[Runner, KVCache]:
        base = self.base
        cache = KVCache(base.spec, NUM_BLOCKS + 1, BLOCK, base.dtype, base.device)
        tiling = Tiling(BLOCK, is_exact=base.device.type == "cpu")
        return Runner(base, self.routing, cache, VisionCache(1 << 20), tiling), cache

    def record(self, recorder: Recorder, attention: object = None, max_rows: int = MAX_ROWS) -> DecodeGraphs:
        """Over the base's own attention or another one; replayed from here on."""
        attention = attention or self.base.decoder.attention
        assert isinstance(attention, DecodeAttention)
        device, vocab = self.base.device, self.base.spec.vocab_size
        buffers = DecodeBuffers(max_rows, MAX_BLOCKS, BLOCK, NUM_BLOCKS, vocab, device)
        graphs = DecodeGraphs(self.base, attention, self.cache, self.routing.language, self.lora, buffers)
        graphs.record(recorder)
        self.recorded.replay_with(graphs)
        return graphs

    def load(self, slot: int, seed: int, rank: int = 8, *, is_dora: bool = False) -> None:
        """An adapter of most sites; which, depends on the seed."""
        ranks: Mapping[str, int] = {name: rank for place, name in enumerate(self.sites) if (place + seed) % 3}
        self.bank.write(slot, make_weights(seed, ranks, self.sites, is_dora=is_dora))

    def start(self, slot: int = BASE_SLOT, num_prompt: int = 5, first_id: int = 7) -> Row:
        """A sequence whose prompt both sides have computed, and whose first token is chosen."""
        row = make_sequence(f"r{first_id}", num_prompt, max_tokens=64)
        ids = tuple(first_id + 3 * place for place in range(num_prompt))
        prompt = replace(row.request.prompt, ids=ids, rope_delta=first_id % 3)
        row.request = replace(row.request, prompt=prompt)
        row.slot = slot
        self._cover(row, num_prompt)
        plan = StepPlan((Chunk(row, 0, num_prompt),), ())
        expected, _ = self.eager.run(plan), self.recorded.run(plan)
        row.num_computed = num_prompt
        row.output_ids.append(int(expected.logits[-1].argmax()))
        return row

    def _cover(self, row: Row, num_tokens: int) -> None:
        while len(row.blocks) * BLOCK < num_tokens:
            row.blocks.append(self._free.pop())

    def move(self, row: Row) -> None:
        """Into other blocks, on both sides."""
        old, row.blocks = row.blocks, [self._free.pop() for _ in row.blocks]
        for cache in (self.eager_cache, self.cache):
            for tensor in (*cache.keys, *cache.values):
                tensor[row.blocks] = tensor[old]
        self._free = [*old, *self._free]

    def end(self, row: Row) -> None:
        self._free = [*row.blocks, *self._free]

    def plan(self, rows: Sequence[Row]) -> StepPlan:
        """The next token of each."""
        for row in rows:
            self._cover(row, row.num_tokens)
        return StepPlan(tuple(Chunk(row, row.num_tokens - 1, 1) for row in rows), ())

    def step(self, rows: Sequence[Row]) -> tuple[Tensor, StepLogits]:
        """Both sides' logits; sequences go on with the eager one's."""
        plan = self.plan(rows)
        expected, found = self.eager.run(plan), self.recorded.run(plan)
        assert expected.way == "eager"
        assert found.counts == expected.counts
        for row, choice in zip(rows, expected.logits.argmax(-1).tolist(), strict=True):
            row.num_computed = row.num_tokens
            row.output_ids.append(choice)
        return expected.logits, found
