"""Gate: what an MLP does between its two products. Place in a request's way: step 8, in every layer."""

from __future__ import annotations

from torch import Tensor, nn

from base.children import child


class Gate:
    """The activation of one half, rounded, times the other."""

    def __init__(self, mlp: nn.Module) -> None:
        """Over the activation of transformers' MLP, looked up at each call."""
        self._modules = mlp._modules

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """[T, M] each, rows may lie apart -> a new [T, M]."""
        return child(self._modules, "act_fn")(gate).mul_(up)
