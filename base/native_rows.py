"""NativeNorm and NativeGate: Norm and Gate by the compiled kernels (ops/native/rows.c), one pass and one call each.

They round where their plain twins do. The norm's sum of squares is made in another order, and the exponential is
another one, so a number in some thousands differs by its last bit. A row's bits are its own, whatever the rows and
threads.

Place in a request's way: step 8, in every layer.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from base.gate import Gate
from base.native_linear import LANES, TYPES
from base.norm import Norm
from base.ops.native_library import native_library

_NUMBER, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_NORM_ARGUMENTS: Final = (
    *(_ADDRESS, _ADDRESS, _ADDRESS, ctypes.c_double, _ADDRESS),  # hidden, delta, weight, epsilon, result
    *(_NUMBER, _NUMBER, _NUMBER, _NUMBER),  # rows, width, type, threads
)
_GATE_ARGUMENTS: Final = (
    *(_ADDRESS, _NUMBER, _ADDRESS, _NUMBER, _ADDRESS),  # gate and its stride, up and its, result
    *(_NUMBER, _NUMBER, _NUMBER, _NUMBER),  # rows, width, type, threads
)


class NativeNorm(Norm):
    """Rows as wide as the weight, and of its dtype."""

    def __init__(self, module: nn.Module) -> None:
        """Raises TypeError for another module, NativeMissing where there is no kernel, ValueError for a weight that
        does not suit (``suits_norm``)."""
        super().__init__(module)
        weight = self._weight
        if not suits_norm(module):
            raise ValueError(f"the compiled norm takes no weight of {tuple(weight.shape)} {weight.dtype}")
        self._call = native_library().lorikeet_norm
        self._call.argtypes = _NORM_ARGUMENTS
        self._width, self._type = weight.shape[0], TYPES[weight.dtype]

    def __call__(self, x: Tensor) -> Tensor:
        return self._normed(x.contiguous(), None)

    def after(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = hidden.contiguous()
        if delta is None:
            return hidden, self._normed(hidden, None)
        delta = delta.contiguous()
        return delta, self._normed(hidden, delta)

    def _normed(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        shape, weight = hidden.shape, self._weight
        if shape[-1] != self._width or hidden.dtype != weight.dtype:
            raise ValueError(f"{tuple(shape)} {hidden.dtype} are no rows of {self._width} {weight.dtype}")
        if delta is not None and (delta.shape != shape or delta.dtype != hidden.dtype):
            raise ValueError(f"{tuple(delta.shape)} {delta.dtype} cannot be added to {tuple(shape)}")
        normed = torch.empty_like(hidden)
        self._call(
            hidden.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), self._epsilon,
            normed.data_ptr(), hidden.numel() // self._width, self._width, self._type, torch.get_num_threads(),
        )  # fmt: skip
        return normed


class NativeGate(Gate):
    """SiLU's."""

    def __init__(self, mlp: nn.Module) -> None:
        """Raises NativeMissing where there is no kernel, ValueError for another activation (``suits_gate``)."""
        super().__init__(mlp)
        if not suits_gate(mlp):
            raise ValueError("the compiled gate is SiLU's")
        self._call = native_library().lorikeet_gate
        self._call.argtypes = _GATE_ARGUMENTS

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        kind, (num_rows, width) = TYPES.get(gate.dtype), gate.shape
        if kind is None or up.dtype != gate.dtype or up.shape != gate.shape or width % LANES:
            raise ValueError(f"the compiled gate takes no {tuple(gate.shape)} {gate.dtype} with {up.dtype}")
        if gate.stride(1) != 1 or up.stride(1) != 1:
            gate, up = gate.contiguous(), up.contiguous()
        opened = gate.new_empty((num_rows, width))
        self._call(
            gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), opened.data_ptr(),
            num_rows, width, kind, torch.get_num_threads(),
        )  # fmt: skip
        return opened


def suits_norm(module: nn.Module) -> bool:
    """Whether the kernel reads its weight."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        return False
    return weight.dtype in TYPES and weight.is_contiguous() and weight.shape[0] % LANES == 0


def suits_gate(mlp: nn.Module) -> bool:
    """Whether it is gated by SiLU, over whole steps of the kernel, in a dtype that it reads."""
    modules = mlp._modules
    width = getattr(modules.get("gate_proj"), "out_features", None)
    is_silu = isinstance(modules.get("act_fn"), nn.SiLU | SiLUActivation)
    return is_silu and isinstance(width, int) and width % LANES == 0
