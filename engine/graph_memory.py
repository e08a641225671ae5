"""graph_bytes: what recorded decodes take of the device's memory, by shapes. For the memory plan: nothing is taken.

An upper bound of all but one term: what the driver keeps for a recording itself is an assumption.
"""

from __future__ import annotations

from typing import Final

from adapters.composition import RANK_FACTOR
from adapters.ops.launch import MAX_CHUNKS
from adapters.ops.tiles import max_tiles
from adapters.sites import Site, SiteTable
from adapters.slots import page_rank
from base.ops.attention_ops import WANTED_PROGRAMS
from base.spec import BaseSpec
from engine.config import EngineConfig
from engine.graphs import buckets_up_to

DRIVER_BYTES: Final = 8 << 20
"""Of one recording of some thousand kernels: their parameters and the driver's own. Assumed."""
LIVE_HIDDEN: Final = 6
"""[N, H] tensors alive at once inside a layer."""
LIVE_WIDE: Final = 3
"""[N, W] tensors alive at once in an MLP; W is the widest linear's output."""


def num_graph_rows(config: EngineConfig) -> int:
    """Rows of the largest bucket that may be needed."""
    return buckets_up_to(config.max_running)[-1]


def max_graph_blocks(config: EngineConfig, max_model_len: int) -> int:
    """KV blocks of the longest sequence."""
    return -(-max_model_len // config.block_size)


def graph_bytes(config: EngineConfig, spec: BaseSpec, sites: SiteTable, itemsize: int) -> int:
    """Buffers, one recording's own tensors (all share them), and the recordings."""
    rows = num_graph_rows(config)
    max_model_len = min(config.max_model_len or spec.max_positions, spec.max_positions)
    tables = rows * max_graph_blocks(config, max_model_len) * 4
    logits = rows * spec.vocab_size * (4 + itemsize)  # those that stay, and the head's own
    num_recordings = 2 * len(buckets_up_to(rows))
    block = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * config.block_size * itemsize
    return (
        tables
        + logits
        + block
        + _pool_bytes(config, spec, sites, rows, itemsize)
        + num_recordings * DRIVER_BYTES
    )


def _pool_bytes(config: EngineConfig, spec: BaseSpec, sites: SiteTable, rows: int, itemsize: int) -> int:
    """Of one pass of ``rows``: activations, partial sums of attention and adapters, a widest weight in 16 bits."""
    language = [site for site in sites.values() if site.part == "language"]
    widest = max((site.out_features for site in language), default=0)
    activations = rows * (LIVE_HIDDEN * spec.hidden_size + LIVE_WIDE * widest) * itemsize
    # splits * rows * key heads are at most WANTED_PROGRAMS, or one split each
    programs = max(WANTED_PROGRAMS, rows * spec.num_kv_heads)
    sums = programs * (spec.num_heads // spec.num_kv_heads) * (spec.head_dim + 2) * 4
    table_rows = max(16, 1 << (rows - 1).bit_length())
    partial = MAX_CHUNKS * 3 * table_rows * page_rank(config.max_rank * RANK_FACTOR) * 4
    return activations + sums + partial + _table_bytes(config, table_rows) + _widest_weight(language) * 2


def _table_bytes(config: EngineConfig, rows: int) -> int:
    """Of tile tables of every size up to ``rows``: at most twice the largest."""
    return 2 * 4 * (4 * max_tiles(rows, config.num_slots, 16) + rows)


def _widest_weight(sites: list[Site]) -> int:
    return max((site.in_features * site.out_features for site in sites), default=0)
