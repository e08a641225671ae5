"""BlockPool: which KV blocks are free. Integers only; the tensors are in ``kv``. Written by the scheduler alone."""

from __future__ import annotations


class BlockPool:
    """Blocks ``0 .. num_blocks - 1``, handed out last-freed first, so that a small load touches little memory."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def missing(self, blocks: list[int], num_tokens: int) -> int:
        """How many more blocks a sequence that owns ``blocks`` needs to hold ``num_tokens``."""
        return max(0, self.blocks_for(num_tokens) - len(blocks))

    def can_grow(self, blocks: list[int], num_tokens: int) -> bool:
        return self.missing(blocks, num_tokens) <= len(self._free)

    def grow(self, blocks: list[int], num_tokens: int) -> None:
        """Extend ``blocks`` in place until they hold ``num_tokens``; the caller has asked ``can_grow``."""
        for _ in range(self.missing(blocks, num_tokens)):
            blocks.append(self._free.pop())

    def free(self, blocks: list[int]) -> None:
        """Take all blocks back and empty the list."""
        self._free.extend(reversed(blocks))
        blocks.clear()
