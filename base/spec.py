"""BaseSpec: what a loaded base is, for those who never touch it: the server, and whoever plans the engine's memory.

A file of its own, so that a process without the base need not import the libraries that hold it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """What a loaded base is: names and sizes, no tensors."""

    name: str
    """The id it is served under: the hub id, the folder's name, or ``lorikeet-pocket``."""
    revision: str | None
    """The commit that a hub id resolved to; None for folders."""
    fingerprint: str
    """Hex SHA-256 over the configuration and the identity of each weight file: same fingerprint, same answers."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the head; ids from the tokenizer's size up to it name no token."""
    max_positions: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    image_token_id: int
    merge_size: int
    patch_size: int
    dtype: str
    quantization: str
    """``nf4``, ``fp4`` (a pre-quantised checkpoint's) or ``none``."""
