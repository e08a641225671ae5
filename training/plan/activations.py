"""What one forward and backward pass keeps, in bytes, from shapes: term by term what autograd holds on to.

Owns the formulas of activations. Frozen linears keep nothing of their input (a frozen weight has no gradient); what is
kept comes from norms, attention, the MLP's products, and each adapter's input, which PEFT casts to fp32. The terms of a
language layer are tested against autograd's own saved tensors at the published shapes. Place in a training run: under
the plan; no torch.

T tokens, P patches, H hidden, Q query width, K key width, M MLP width, V vocabulary, e bytes of a base number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from training.plan.shape import BaseShape
from training.recipe.recipe import Recipe
from training.targets.targets import Target

FP32 = 4
HEAD_ROWS = 256
"""As ``training.model.model.HEAD_ROWS``: rows that go through the head at once."""


@dataclass(frozen=True, slots=True)
class Load:
    """What goes through the model at once: one micro-batch."""

    tokens: int
    image_tokens: int
    """Of those tokens."""
    labels: int
    """Positions that carry loss."""
    element: int
    """Bytes of a number of the base: 2 in bf16, 4 in fp32."""
    mask: int
    """Bytes of a number of dropout's mask: 1 by CUDA's fused kernel, 4 elsewhere."""

    def patches(self, shape: BaseShape) -> int:
        return self.image_tokens * shape.vision.merge**2


def adapter_input_bytes(targets: Iterable[Target], recipe: Recipe, load: Load) -> int:
    """A row of one layer's adapters: the input in fp32 (after dropout), dropout's mask, A's result. DoRA keeps the
    base's and the adapter's result too.

    In fp32 without dropout nothing is copied, so linears that read the same input share it.
    """
    total = 0
    shared: set[str] = set()
    for target in targets:
        source = _input_of(target.leaf)
        if recipe.dropout > 0:
            total += target.in_features * (FP32 + load.mask)
        elif load.element < FP32 or source not in shared:
            total += target.in_features * FP32
        shared.add(source)
        total += target.r * FP32
        if recipe.dora:
            total += target.out_features * 2 * FP32
    return total


def _input_of(leaf: str) -> str:
    """Linears that read one tensor have one name."""
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
    return groups.get(leaf, leaf)


def scaled_factor_bytes(targets: Iterable[Target]) -> int:
    """B times the scale, [out, r] fp32, made anew at each pass and kept for it."""
    return sum(target.out_features * target.r * FP32 for target in targets)


def language_layer_bytes(shape: BaseShape, layer: Iterable[Target], recipe: Recipe, load: Load) -> int:
    """Kept by one language layer for its backward pass.

    Two norms keep their input in fp32 and its root, 4 H + 4 each; attention keeps q, k, v and its result,
    e (2 Q + 2 K), and 4 a head; the MLP keeps gate, silu(gate) and up, 3 e M.
    """
    layer = list(layer)
    norms = 2 * (FP32 * shape.hidden + FP32)
    attention = load.element * (2 * shape.query_width + 2 * shape.key_width) + FP32 * shape.heads
    mlp = 3 * load.element * shape.mlp
    row = norms + attention + mlp + adapter_input_bytes(layer, recipe, load)
    return load.tokens * row + scaled_factor_bytes(layer)


def backward_bytes(hidden: int, mlp: int, weight: int, rows: int, recipe: Recipe, load: Load) -> int:
    """Most that one layer's backward pass holds beside what was kept: at the down projection the gradient of its input
    from the adapter (4 M) and, with dropout, the base's beside it (e M); about 8 H of gradients of the residual stream,
    10 with dropout; and one linear's weight taken out of its 4 bits (``weight`` numbers). What was kept goes as it is
    used, so more never meets; compared with the live tensors of a backward pass at the real shapes."""
    has_dropout = recipe.dropout > 0
    gradients = (FP32 + (load.element if has_dropout else 0)) * mlp
    stream = (10 if has_dropout else 8) * hidden
    unpacked = load.element * weight * (3 if recipe.dora else 1)
    return rows * (gradients + stream) + unpacked


def head_bytes(shape: BaseShape, load: Load) -> int:
    """Most at the head: of at most 256 labelled rows at once the log-probabilities and two gradients, 3 x 4 V each;
    final norm and its result for all tokens."""
    rows = min(load.labels, HEAD_ROWS)
    return rows * 3 * FP32 * shape.vocab


def vision_block_bytes(shape: BaseShape, block: Iterable[Target], recipe: Recipe, load: Load) -> int:
    """Kept by one block of the tower where it learns: as a language layer; q, k and the joint q-k-v are kept apart."""
    vision = shape.vision
    norms = 2 * (FP32 * vision.hidden + FP32)
    attention = load.element * 6 * vision.hidden + FP32 * vision.heads
    mlp = 3 * load.element * vision.mlp
    block = list(block)
    row = norms + attention + mlp + adapter_input_bytes(block, recipe, load)
    return load.patches(shape) * row + scaled_factor_bytes(block)


def vision_forward_bytes(shape: BaseShape, load: Load) -> int:
    """Most that a frozen tower holds while it runs, nothing kept: pixels in fp32 and in e, and in one block the stream
    twice, q-k-v, q and k in fp32 while they turn, or the MLP's three products."""
    vision = shape.vision
    pixels = vision.patch_numbers * (FP32 + load.element)
    stream = 2 * load.element * vision.hidden
    attention = 3 * load.element * vision.hidden + 4 * FP32 * vision.hidden
    mlp = 3 * load.element * vision.mlp
    return load.patches(shape) * (pixels + stream + max(attention, mlp))


def merger_bytes(shape: BaseShape, merger: Iterable[Target], recipe: Recipe, load: Load) -> int:
    """Kept by the merger where it learns: GELU's input, and the adapters' inputs."""
    merger = list(merger)
    row = load.element * shape.vision.merged + adapter_input_bytes(merger, recipe, load)
    return load.image_tokens * row + scaled_factor_bytes(merger)
