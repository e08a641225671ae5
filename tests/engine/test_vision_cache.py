"""VisionCache keeps what is pinned, drops the least recently used, and knows its bytes."""

from __future__ import annotations

import pytest
import torch

from engine.vision_cache import ImageKey, VisionCache

ROW_BYTES = 4 * 8


def key(name: str, vision: str = "") -> ImageKey:
    return ImageKey(name, vision)


def rows(n: int) -> torch.Tensor:
    return torch.zeros(n, 8)


def test_the_least_recently_used_leaves_first() -> None:
    cache = VisionCache(2 * ROW_BYTES)
    cache.put(key("a"), rows(1))
    cache.put(key("b"), rows(1))
    cache.get(key("a"))
    cache.put(key("c"), rows(1))
    assert key("a") in cache and key("c") in cache and key("b") not in cache
    assert cache.num_bytes == 2 * ROW_BYTES


def test_pinned_embeddings_outlive_the_budget_until_they_are_unpinned() -> None:
    cache = VisionCache(ROW_BYTES)
    cache.pin(key("a"))
    cache.pin(key("a"))
    cache.put(key("a"), rows(3))
    cache.put(key("b"), rows(1))
    assert key("a") in cache and key("b") not in cache
    cache.unpin(key("a"))
    assert key("a") in cache
    cache.unpin(key("a"))
    assert key("a") not in cache
    assert cache.num_bytes == 0


def test_adapters_with_their_own_vision_weights_do_not_share_an_encode_with_the_base() -> None:
    cache = VisionCache(100 * ROW_BYTES)
    cache.put(key("a"), rows(1))
    assert key("a", "other-vision-weights") not in cache
    with pytest.raises(KeyError):
        cache.get(key("a", "other-vision-weights"))


def test_putting_the_same_key_twice_counts_once() -> None:
    cache = VisionCache(100 * ROW_BYTES)
    cache.put(key("a"), rows(2))
    cache.put(key("a"), rows(2))
    assert cache.num_bytes == 2 * ROW_BYTES and len(cache) == 1
