"""Prefixes: what the keys and values of a full block were made from, as a digest, and who may use them again.

A block's key names the block before it (and so all tokens since the first), its own tokens, the language weights they
were computed with, the images among them with the vision weights they were encoded with, and, where attention is exact
(``tiling``), how it was computed. Equal keys mean equal keys and values, to the bit where the engine promises bits. The
base is one for an engine's life and in no key; positions follow from tokens and grids, which image digests hold.

An adapter without language weights has the base's keys for text, and with the base's vision weights for images too.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator

from adapters.ref import AdapterRef
from engine.blocks import BlockPool
from engine.sequence import Sequence
from engine.tiling import Tiling


class Prefixes:
    """Which part of a sequence is computed already, and which of its blocks others may use. The scheduler's hand."""

    def __init__(self, pool: BlockPool, tiling: Tiling, *, is_on: bool = True) -> None:
        self._pool = pool
        self._block_size = pool.block_size
        self._tiling = tiling
        self._is_on = is_on

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the longest computed prefix of a waiting sequence, up to a cut; never its last token, whose
        row is to be computed, and nothing where each row's logits are owed.
        """
        owes_rows = sequence.request.prompt_logprobs is not None and not sequence.has_prompt_logprobs
        if not self._is_on or owes_rows:
            return []
        found = self._pool.find(self._lazy_keys(sequence, (sequence.num_tokens - 1) // self._block_size))
        while found and not self._is_cut(sequence, len(found)):
            found.pop()
        return found

    def _is_cut(self, sequence: Sequence, num_blocks: int) -> bool:
        return self._tiling.is_cut(num_blocks * self._block_size, sequence.num_prompt_tokens)

    def _lazy_keys(self, sequence: Sequence, num_blocks: int) -> Iterator[bytes]:
        return (self.keys(sequence, i + 1)[i] for i in range(num_blocks))

    def keep(self, sequence: Sequence) -> None:
        """Let others find its full blocks. Only once a row after them had finite logits: a row attends to all before
        it, so no NaN is among them.
        """
        num_full = sequence.num_computed // self._block_size
        if not self._is_on or sequence.is_kept_apart or num_full <= sequence.num_kept_blocks:
            return
        keys = self.keys(sequence, num_full)
        for i in range(sequence.num_kept_blocks, num_full):
            self._pool.keep(sequence.blocks[i], keys[i])
        sequence.num_kept_blocks = num_full

    def keys(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Of its first blocks, at least ``num_blocks``, all of whose tokens exist. The sequence's own list."""
        keys = sequence.block_keys
        while len(keys) < num_blocks:
            parent = keys[-1] if keys else _root(sequence.adapter)
            keys.append(self._key(parent, sequence, len(keys) * self._block_size))
        return keys

    def _key(self, parent: bytes, sequence: Sequence, begin: int) -> bytes:
        end = begin + self._block_size
        digest = hashlib.sha256(parent)
        digest.update(array("q", [self._mode(sequence, end), *sequence.token_ids(begin, end)]).tobytes())
        for image in sequence.images_between(begin, end):
            key = sequence.image_key(image)
            digest.update(f"{key.image_digest} {key.vision_digest} {image.offset - begin}\n".encode())
        return digest.digest()

    def _mode(self, sequence: Sequence, end: int) -> int:
        """How its rows were attended: -1 in whole tiles of a prompt; else it depends on where the prompt ended."""
        num_prompt = sequence.num_prompt_tokens
        if not self._tiling.is_exact or self._tiling.tile_end(end - 1) <= num_prompt:
            return -1
        return num_prompt


def _root(ref: AdapterRef) -> bytes:
    """Of an adapter's first block: the language weights that act."""
    acting = ref.language_digest or ("" if ref.vision_digest else ref.digest)
    return hashlib.sha256(f"language {acting}".encode()).digest()
