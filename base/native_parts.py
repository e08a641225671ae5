"""native_parts: what lies between a CPU's compiled linears, compiled too where a kernel takes it.

Owns: that choice. It goes with ``cpu_linear`` native: who chooses another way for the linears gets the plain twins,
which are transformers' to the last bit where the linears are. Place in a request's way: none; once, at load.
"""

from __future__ import annotations

import torch
from torch import nn

from base.decoder import Parts
from base.gate import Gate
from base.native_attention import NativeAttention, suits_attention
from base.native_rows import NativeGate, NativeNorm, suits_gate, suits_norm
from base.norm import Norm
from base.spec import BaseSpec
from base.torch_attention import TorchAttention


def native_parts(spec: BaseSpec) -> Parts:
    """What is made of them raises NativeMissing where there are no kernels."""
    has_attention = suits_attention(spec.head_dim, getattr(torch, spec.dtype))
    ours = NativeAttention(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    return Parts(ours if has_attention else TorchAttention(), _norm_over, _gate_over)


def _norm_over(module: nn.Module) -> Norm:
    return NativeNorm(module) if suits_norm(module) else Norm(module)


def _gate_over(mlp: nn.Module) -> Gate:
    return NativeGate(mlp) if suits_gate(mlp) else Gate(mlp)
