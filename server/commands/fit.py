"""What a base takes, from its shape alone, and how much of it a memory holds. Pure arithmetic; the formulas are public.

Linears of a language layer: q, o [H x heads x d], k, v [H x kv x d], gate, up, down [H x M]. NF4 with double
quantisation takes 4 bits, a 64th of 8 bits and a 16,384th of 32 a weight: 0.5159 bytes. Head, embeddings and vision
tower stay in 16 bits. KV takes 2 x layers x kv heads x head dim x 2 bytes a token. An adapter of rank R on a linear
[in -> out] takes R x (in + out) numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

NF4_BYTES = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # a weight: QLoRA (arXiv 2305.14314), section 3, blocks of 64 and 256
HALF = 2
VISION_HIDDEN, VISION_MLP, VISION_DEPTH, MERGED = 1280, 3420, 32, 5120
PATCH_NUMBERS = 3 * 2 * 14 * 14


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Qwen2.5-VL's configuration that decide its size."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    is_head_tied: bool


SHAPES = (
    Shape("Qwen/Qwen2.5-VL-3B-Instruct", 2048, 36, 16, 2, 128, 11008, 151936, True),
    Shape("Qwen/Qwen2.5-VL-7B-Instruct", 3584, 28, 28, 4, 128, 18944, 152064, False),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """What one base needs of a memory, in bytes, and what is left for context."""

    name: str
    weights: int
    kv_per_token: int
    adapter: int
    """One adapter of rank 16 on all language linears."""
    adapters: int
    """All slots filled with those."""
    kv_tokens: int
    """Tokens of context, over all requests, in what remains; 0 if it does not fit."""

    @property
    def does_fit(self) -> bool:
        return self.kv_tokens >= MIN_TOKENS


MIN_TOKENS = 4096
"""Under it a base is loaded but hardly useful: one long prompt, or two pictures with questions."""
RESERVE = 0.1
"""Share of a memory left to activations, the runtime and the allocator's gaps."""


def fit(shape: Shape, memory_bytes: int, num_slots: int = 8, rank: int = 16, number_bytes: int = HALF) -> Fit:
    """How a base fits; `number_bytes` is what an adapter's number takes on the device (4 on a CPU)."""
    adapter = rank * lora_width(shape) * number_bytes
    weights = weight_bytes(shape)
    left = int(memory_bytes * (1 - RESERVE)) - weights - num_slots * adapter
    per_token = kv_bytes_per_token(shape)
    return Fit(shape.name, weights, per_token, adapter, num_slots * adapter, max(0, left // per_token))


def language_parameters(shape: Shape) -> int:
    """Weights of the language linears: those that go to 4 bits."""
    attention = 2 * shape.hidden * (shape.heads + shape.kv_heads) * shape.head_dim
    return shape.layers * (attention + 3 * shape.hidden * shape.mlp)


def vision_parameters(shape: Shape) -> int:
    block = 4 * VISION_HIDDEN * VISION_HIDDEN + 3 * VISION_HIDDEN * VISION_MLP
    merger = MERGED * MERGED + MERGED * shape.hidden
    return VISION_DEPTH * block + merger + PATCH_NUMBERS * VISION_HIDDEN


def weight_bytes(shape: Shape) -> int:
    """The resident base: 4-bit language linears; embeddings, head and vision tower in 16 bits."""
    tables = shape.vocab * shape.hidden * (1 if shape.is_head_tied else 2)
    return int(language_parameters(shape) * NF4_BYTES) + HALF * (tables + vision_parameters(shape))


def kv_bytes_per_token(shape: Shape) -> int:
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * HALF


def lora_width(shape: Shape) -> int:
    """Sum of in + out over all language linears."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (shape.hidden + queries) + 2 * (shape.hidden + keys)
    return shape.layers * (attention + 3 * (shape.hidden + shape.mlp))
