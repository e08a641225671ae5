"""How many bytes each part of the base takes. Place in a request's way: none; once, at load."""

from __future__ import annotations

from collections.abc import Iterator

from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from base.float32_linear import Float32Linear
from base.four_bit import quant_state
from base.linear import PackedLinear
from base.native_linear import NativeLinear
from base.ops.nf4_linear import Nf4Linear

PARTS = ("language_4bit", "language", "embeddings", "vision", "head", "copies", "other")


def memory_by_part(module: nn.Module) -> dict[str, int]:
    """Bytes by part, in the order of ``PARTS``; storage that two names share is counted at the first.

    ``language_4bit``: linears held in 4 bits, their scales included. ``language``: the other linears of the language
    layers (dequantised copies on a CPU). ``head`` is 0 when it shares the embeddings. ``copies``: the room in which
    4-bit weights are dequantised ahead of prompts' products (CUDA).
    """
    totals = dict.fromkeys(PARTS, 0)
    seen: set[int] = set()
    for name, child in module.named_modules():
        for tensor in _tensors(child):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                totals[_part(name, child)] += tensor.numel() * tensor.element_size()
        if isinstance(child, Nf4Linear):
            for tensor in child.copy_buffers:
                if tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    totals["copies"] += tensor.nbytes
        if isinstance(child, Float32Linear):  # its tensors have no storage to see
            totals[_part(name, child)] += child.num_bytes
    return totals


def _part(name: str, child: nn.Module) -> str:
    if name.startswith("model.visual"):
        return "vision"
    if isinstance(child, nn.Embedding):
        return "embeddings"
    if name.startswith("lm_head"):
        return "head"
    if isinstance(child, Linear4bit | PackedLinear | Nf4Linear):
        return "language_4bit"
    if isinstance(child, NativeLinear) and child.is_quantised:
        return "language_4bit"
    is_linear = hasattr(child, "in_features")
    return "language" if is_linear else "other"


def _tensors(child: nn.Module) -> Iterator[Tensor]:
    yield from child.parameters(recurse=False)
    yield from child.buffers(recurse=False)
    if isinstance(child, Linear4bit):
        yield from _state_tensors(quant_state(child))
    elif isinstance(child, PackedLinear):
        yield from _state_tensors(child.state)
    elif isinstance(child, NativeLinear):
        yield from child.tensors
    elif isinstance(child, Nf4Linear):
        yield from child.nf4.tensors


def _state_tensors(state: object) -> Iterator[Tensor]:
    """Scales and tables of a bitsandbytes QuantState, and of the one that quantises its scales."""
    for value in vars(state).values():
        if isinstance(value, Tensor):
            yield value
    if (inner := getattr(state, "state2", None)) is not None:
        yield from _state_tensors(inner)
