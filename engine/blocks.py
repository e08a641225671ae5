"""BlockPool: which KV blocks are whose, and which of them hold a known prefix. Integers and keys only; the tensors are
in ``kv``, what a key means is in ``prefix``. Written by the scheduler alone.

A block is used (by one sequence or, once it has a key, by several), cached (nobody's, but found by its key) or empty.
Blocks for new tokens are empty ones, and then the cached ones that were least recently used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq


class BlockPool:
    """Blocks ``0 .. num_blocks - 1``, handed out last-freed first, so that a small load touches little memory."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._owners: dict[int, int] = {}  # used block -> how many sequences
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: empty and cached ones."""
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._owners)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def missing(self, blocks: Seq[int], num_tokens: int) -> int:
        """How many more blocks a sequence that owns ``blocks`` needs to hold ``num_tokens``."""
        return max(0, self.blocks_for(num_tokens) - len(blocks))

    def can_grow(self, blocks: Seq[int], num_tokens: int) -> bool:
        """``blocks`` may be owned already, or just found: those that are cached are then not free for others."""
        num_found = sum(block in self._cached for block in blocks)
        return self.missing(blocks, num_tokens) <= self.num_free - num_found

    def grow(self, blocks: list[int], num_tokens: int) -> None:
        """Extend ``blocks`` in place until they hold ``num_tokens``; the caller has asked ``can_grow``."""
        for _ in range(self.missing(blocks, num_tokens)):
            block = self._empty.pop() if self._empty else self._evict()
            self._owners[block] = 1
            blocks.append(block)

    def free(self, blocks: list[int]) -> None:
        """Give up one sequence's hold on all blocks, and empty the list. Of a chain its end is forgotten first."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                del self._owners[block]
                self._lay_down(block)
        blocks.clear()

    def _lay_down(self, block: int) -> None:
        if block in self._key_of:
            self._cached[block] = None
        else:
            self._empty.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    # ---- prefixes ----------------------------------------------------------------------------------------------

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of as many of the first keys as are known; valid until the pool is next changed."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, found: Iterable[int]) -> list[int]:
        """One more sequence holds the blocks, which it must not write: they are full. A list of its own."""
        shared = list(found)
        for block in shared:
            self._cached.pop(block, None)
            self._owners[block] = self._owners.get(block, 0) + 1
        return shared

    def keep(self, block: int, key: bytes) -> None:
        """A used block is full and computed: from now on it is found by ``key``, unless another is already."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody finds them any more; who holds them keeps them."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is None:
                continue
            del self._block_of[key]
            if block in self._cached:
                del self._cached[block]
                self._empty.append(block)

    def forget_all(self) -> None:
        self.forget(list(self._key_of))
