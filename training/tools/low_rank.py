"""Linear algebra on B @ A that never makes B @ A.

Owns: singular values, best approximation and distance of products [out, R] x [R, in], through the QR of their factors,
in float64. Knows no adapters and no files. Place in a training run: none; ``inspect`` and ``shrink`` stand on it.

With B = Qb Rb and A' = Qa Ra the product is Qb (Rb Ra') Qa', so its singular values are those of the R x R core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """The singular value decomposition of one B @ A."""

    left: Tensor  # [out, K] float64, orthonormal columns
    values: Tensor  # [K] float64, descending
    right: Tensor  # [K, in] float64, orthonormal rows

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best product of this rank, its values shared evenly: B [out, rank], A [rank, in], float64."""
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


def decompose(a: Tensor, b: Tensor) -> Product:
    """Of ``b @ a``: a [R, in], b [out, R], any float type; K = min(R, in, out)."""
    q_out, core_out = torch.linalg.qr(b.double())
    q_in, core_in = torch.linalg.qr(a.double().T)
    left, values, right = torch.linalg.svd(core_out @ core_in.T, full_matrices=False)
    return Product(q_out @ left, values, right @ q_in.T)


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """[K] float64, descending; K = min(R, in, out)."""
    core_out = torch.linalg.qr(b.double(), mode="r").R
    core_in = torch.linalg.qr(a.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(core_out @ core_in.T)
    return values


def norm(a: Tensor, b: Tensor) -> float:
    """|b @ a|, the Frobenius norm."""
    return float(torch.linalg.vector_norm(singular_values(a, b)))


def distance(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> float:
    """|b @ a - other_b @ other_a|, the Frobenius norm; the ranks may differ.

    The difference is itself a product, [b, -other_b] @ [a; other_a].
    """
    both_b = torch.cat([b.double(), -other_b.double()], dim=1)
    both_a = torch.cat([a.double(), other_a.double()], dim=0)
    return norm(both_a, both_b)


def entropy_rank(values: Tensor) -> float:
    """exp of the entropy of the energies' shares: 1 when one direction does all, K when all do the same.

    Roy and Vetterli, "The effective rank" (EUSIPCO 2007), over squared values. 0 for a product that is zero.
    """
    energies = values.double().square()
    total = float(energies.sum())
    if total == 0:
        return 0.0
    shares = energies[energies > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The fewest leading values that hold this share (0 to 1) of the squared norm; 0 for a product that is zero."""
    energies = values.double().square()
    total = float(energies.sum())
    if total == 0:
        return 0
    shares = energies.cumsum(0) / total
    # 1 - 1e-12: at energy 1 the last values' rounding must not count as energy
    return int((shares < min(energy, 1 - 1e-12)).sum()) + 1
