"""What stays on the device through a training run: the base's weights, the adapter, its gradients and its optimizer.

Owns those formulas. NF4 with double quantisation takes 4 bits a weight, 8 bits for each 64 and 32 bits for each 16,384:
0.5159 bytes (QLoRA, arXiv 2305.14314, section 3). Place in a training run: under the plan; no torch.
"""

from __future__ import annotations

from training.plan.shape import BaseShape
from training.recipe.recipe import Recipe
from training.targets.targets import Targets

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
FP32 = 4
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256, "sgd": 0.0}
"""Of an optimizer, a trained number: two moments in fp32, or in 8 bits with an fp32 scale for each 256."""


def language_parameters(shape: BaseShape) -> int:
    """Of the linears of the language layers: those that go to 4 bits."""
    return sum(s.in_features * s.out_features for s in shape.sites().values() if s.part == "language")


def vision_parameters(shape: BaseShape) -> int:
    """Of the tower and the merger: linears with their biases, norms, and the patch embedding."""
    vision = shape.vision
    linears = [site for site in shape.sites().values() if site.part != "language"]
    weights = sum(site.in_features * site.out_features + site.out_features for site in linears)
    norms = 2 * vision.hidden * vision.depth + vision.hidden
    return weights + norms + vision.patch_numbers * vision.hidden


def small_parameters(shape: BaseShape) -> int:
    """Norms of the language model, and the biases of q, k and v."""
    biases = shape.query_width + 2 * shape.key_width
    return shape.layers * (2 * shape.hidden + biases) + shape.hidden


def weight_bytes(shape: BaseShape, element: int, *, is_four_bit: bool) -> dict[str, int]:
    """Part -> bytes. ``is_four_bit`` False: the language linears are kept in ``element`` bytes too, as on a CPU."""
    table = shape.vocab * shape.hidden * element
    language = language_parameters(shape) * (NF4 if is_four_bit else element)
    return {
        "language weights": int(language) + small_parameters(shape) * element,
        "embeddings and head": table if shape.is_head_tied else 2 * table,
        "vision tower": vision_parameters(shape) * element,
    }


def adapter_bytes(targets: Targets, recipe: Recipe) -> dict[str, int]:
    """Part -> bytes: all in fp32. Adafactor keeps a row and a column of each matrix."""
    numbers = targets.num_parameters
    if recipe.optimizer == "adafactor":
        states = sum(FP32 * (t.in_features + t.out_features + 2 * t.r) for t in targets.modules)
    else:
        states = int(numbers * STATE_BYTES[recipe.optimizer])
    return {"adapter weights": FP32 * numbers, "gradients": FP32 * numbers, "optimizer": states}
