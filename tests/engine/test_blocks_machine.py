"""The pool against a small model, over all that can be done to it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.blocks import BlockPool

NUM_BLOCKS, BLOCK_SIZE = 10, 4
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=6)


class PoolMachine(RuleBasedStateMachine):
    """Sequences are chains of one-bit blocks, so that many begin alike; a key is the chain up to its block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.sequences: list[tuple[list[int], list[int]]] = []  # blocks, chain
        self.known: dict[bytes, int] = {}
        self.unused: list[bytes] = []  # least recently used first
        self.writes: dict[int, bytes] = {}  # what each block holds

    def _keys(self, chain: list[int]) -> list[bytes]:
        return [bytes(chain[: i + 1]) for i in range(len(chain))]

    @rule(chain=TEXTS)
    def start(self, chain: list[int]) -> None:
        keys = self._keys(chain)
        found = self.pool.find(keys)
        expected = next((i for i, key in enumerate(keys) if key not in self.known), len(keys))
        assert found == [self.known[key] for key in keys[:expected]]
        assert [self.writes[block] for block in found] == keys[:expected], "a block is found by what it holds"
        num_free = NUM_BLOCKS - len(self._owned())
        num_unused = sum(key in self.unused for key in keys[:expected])
        can = self.pool.can_grow(found, len(chain) * BLOCK_SIZE)
        assert can == (len(chain) - expected <= num_free - num_unused)
        if not can:
            return
        self.unused = [key for key in self.unused if key not in keys[:expected]]
        blocks = self.pool.share(found)
        num_empty = NUM_BLOCKS - len(self._owned() | set(blocks)) - len(self.unused)
        self.pool.grow(blocks, len(chain) * BLOCK_SIZE)
        for _ in range(max(0, len(chain) - expected - num_empty)):
            del self.known[self.unused.pop(0)]
        assert not set(blocks[expected:]) & self._owned(), "new blocks are nobody's"
        for block, key in zip(blocks[expected:], keys[expected:], strict=True):
            self.writes[block] = key
        self.sequences.append((blocks, chain))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        blocks, chain = data.draw(st.sampled_from(self.sequences))
        for block, key in zip(blocks, self._keys(chain), strict=True):
            self.pool.keep(block, key)
            if block not in self.known.values():
                self.known.setdefault(key, block)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), is_suspect=st.booleans())
    def end(self, data: st.DataObject, is_suspect: bool) -> None:
        blocks, _ = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        held = list(blocks)
        if is_suspect:
            self.pool.forget(blocks)
            self.known = {key: block for key, block in self.known.items() if block not in held}
        self.pool.free(blocks)
        assert blocks == []
        names = {block: key for key, block in self.known.items()}
        self.unused += [names[b] for b in reversed(held) if b in names and b not in self._owned()]

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        self.known, self.unused = {}, []

    def _owned(self) -> set[int]:
        return {block for blocks, _ in self.sequences for block in blocks}

    @invariant()
    def every_block_is_used_cached_or_empty_and_none_twice(self) -> None:
        pool = self.pool
        assert pool.num_used == len(self._owned())
        assert pool.num_cached == len(self.unused)
        assert pool.num_used + pool.num_free == NUM_BLOCKS
        assert len(set(pool._empty)) == len(pool._empty)
        assert not self._owned() & (set(pool._empty) | set(pool._cached))
        assert pool._owners == Counter(block for blocks, _ in self.sequences for block in blocks)
        assert pool._block_of == self.known and len(set(self.known.values())) == len(self.known)
        assert list(pool._cached) == [self.known[key] for key in self.unused]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_the_machine_notices_a_pool_that_hands_out_blocks_still_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The positive control: sharing that does not count."""

    def uncounted(pool: BlockPool, found: list[int]) -> list[int]:
        for block in found:
            pool._cached.pop(block, None)
            pool._owners.setdefault(block, 1)
        return list(found)

    monkeypatch.setattr(BlockPool, "share", uncounted)
    machine = PoolMachine()
    machine.start([0, 0])
    for blocks, chain in machine.sequences:
        for block, key in zip(blocks, machine._keys(chain), strict=True):
            machine.pool.keep(block, key)
            machine.known[key] = block
    machine.start([0, 0])
    with pytest.raises(AssertionError):
        machine.every_block_is_used_cached_or_empty_and_none_twice()
