"""BlockPool hands each block to one owner, counts truthfully and takes everything back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockPool


def test_a_sequence_gets_just_the_blocks_that_its_tokens_need() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    blocks: list[int] = []
    pool.grow(blocks, 17)
    assert len(blocks) == 2
    pool.grow(blocks, 32)
    assert len(blocks) == 2
    assert pool.can_grow(blocks, 64)
    assert not pool.can_grow(blocks, 65)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 100)), max_size=60))
def test_no_block_ever_has_two_owners_and_none_is_lost(acts: list[tuple[int, int]]) -> None:
    pool = BlockPool(num_blocks=12, block_size=4)
    owners: dict[int, list[int]] = {i: [] for i in range(5)}
    for owner, num_tokens in acts:
        if num_tokens == 0:
            pool.free(owners[owner])
        elif pool.can_grow(owners[owner], num_tokens):
            pool.grow(owners[owner], num_tokens)
        held = [b for blocks in owners.values() for b in blocks]
        assert len(held) == len(set(held)) == pool.num_used
        assert pool.num_used + pool.num_free == 12
