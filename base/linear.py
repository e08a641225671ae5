"""4-bit linears on a CPU, and the weight behind any linear of the base.

bitsandbytes computes a 4-bit linear on a CPU in one of two ways: "unpacked" dequantises the weight at every call and
multiplies in 16 bits; "packed" (only with AVX512-BF16, and shapes that its kernel takes) repacks the weight in place
and multiplies from 4 bits, with block scales rounded to bfloat16 (0.3 % apart). To these comes
"dequantised": the unpacked way's own weight, kept; equal to it to the bit, several times faster for few rows, at
2 bytes a parameter. For CPUs that only imitate bfloat16 products two sum in float32 (base/wide_linears.py): "native",
compiled here, which multiplies from 4 bits (base/native_linear.py), and "float32", the same weight widened
(base/float32_linear.py), at 4 bytes. There the linears that never had 4 bits (the head, the vision tower) gain as much,
so they follow, and those of one input are merged (base/merged_linear.py), since that changes no bit.

Owns: that choice. Place in a request's way: none; once, at load (the linears themselves run in step 8).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from copy import copy
from typing import Final

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.functional import has_avx512bf16 as _has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from torch.nn import functional

from base.config import CpuLinear
from base.float32_linear import Float32Linear, has_float32_product
from base.four_bit import computed_state, quant_state
from base.merged_linear import LinearPart
from base.native_linear import NativeLinear
from base.ops.native_library import NativeMissing, has_native_library, native_library
from base.ops.nf4_linear import Nf4Linear
from base.wide_linears import widen_linears

DEQUANTISED_BYTES_LIMIT: Final = 2 << 30
"""``auto`` keeps dequantised weights up to this many bytes: the pocket base by far, no published Qwen2.5-VL."""
FLOAT32_BYTES_LIMIT: Final = 8 << 30
"""``auto`` keeps float32 weights up to this many bytes, all linears together, where bfloat16 is imitated."""
logger = logging.getLogger("lorikeet.base")


class DequantisedLinear(nn.Module):
    """A 4-bit linear whose dequantised weight is kept, and whose 4-bit copy is not."""

    is_quantised: Final = True
    """Its weight has 4 bits' worth of values, and adapters round around it as around a 4-bit linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` [out, in] in the compute dtype."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class PackedLinear(nn.Module):
    """A 4-bit linear in the packed way, for serving only.

    Beside it the scales it came from are kept (1/64 byte a parameter): packing rounds them, while the 4-bit codes can
    be had back exactly, and ``dequantised_weight`` must be exact.
    """

    is_quantised: Final = True

    def __init__(self, linear: Linear4bit) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        # a copy: packing replaces the state's attributes, it does not write into its tensors
        self.state = copy(quant_state(linear))
        self.linear = linear.eval()
        self.linear.support_avx512bf16_for_cpu = True
        with torch.no_grad():  # the first call packs, in place and not safely among threads: have it done
            self.linear(torch.zeros(1, self.in_features, dtype=torch.bfloat16))

    def dequantised_weight(self) -> Tensor:
        """[out, in] in the stored dtype, from the exact scales."""
        data = unpack(self.linear.weight.data, self.out_features, self.in_features)
        weight: Tensor = dequantize_4bit(data, self.state)
        return weight

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        result: Tensor = self.linear(x)
        return result


def dequantised_weight(linear: nn.Module) -> Tensor:
    """The weight [out, in] float32 that a linear of the base multiplies by; a new tensor on its device.

    Takes what the loader leaves (on any device) and plain linears. Raises TypeError for anything else, and ValueError
    for a 4-bit linear that was packed without us, whose weight can be had only roughly.
    """
    if isinstance(linear, PackedLinear | NativeLinear | Float32Linear | Nf4Linear | LinearPart):
        return linear.dequantised_weight().float()
    if isinstance(linear, Linear4bit):
        state = quant_state(linear)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "the 4-bit linear was packed by bitsandbytes: set support_avx512bf16_for_cpu to False"
            )
        return dequantize_4bit(linear.weight.data, state).float()
    if isinstance(linear, DequantisedLinear | nn.Linear):
        return linear.weight.detach().float().clone()
    raise TypeError(f"{type(linear).__name__} is no linear of the base")


def settle_cpu_linears(module: nn.Module, how: CpuLinear) -> CpuLinear:
    """Fix how each linear below ``module``, all on the CPU, computes; how. Changes ``module`` in place.

    Linears in 16 bits stay as they are, but for the ways "native" and "float32". Raises ValueError for a way that is
    not to be had here.
    """
    names = four_bit_names(module)
    if how == "auto":
        how = _choose(module, names)
    if how in ("native", "float32"):
        _check_wide(how)
        settled = widen_linears(module, is_native=how == "native")
    else:
        settled = Counter(_settle(module, name, how) for name in names)
    logger.info(
        "base.cpu_linears %s", " ".join(f"{way}={count}" for way, count in settled.items()) or "none=0"
    )
    return how


def _check_wide(how: CpuLinear) -> None:
    if not has_float32_product():  # native too: some weights are none for it
        raise ValueError(f"this build of torch has no oneDNN: cpu_linear {how} is not to be had")
    if how == "native":
        try:
            native_library()
        except NativeMissing as error:
            raise ValueError(f"cpu_linear native is not to be had: {error}") from error


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 products, rather than an imitation."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _choose(module: nn.Module, names: Sequence[str]) -> CpuLinear:
    """What ``auto`` means here: where bfloat16 is imitated, native if it was compiled, else float32 while it fits its
    limit; otherwise 16 bits, while they fit theirs."""
    num_weights = sum(_num_weights(module.get_submodule(name)) for name in names)
    if not multiplies_bf16() and has_float32_product():
        if has_native_library():
            return "native"
        num_plain = sum(_num_weights(module.get_submodule(name)) for name in _plain_names(module))
        if 4 * (num_weights + num_plain) <= FLOAT32_BYTES_LIMIT:
            return "float32"
    return "dequantised" if 2 * num_weights <= DEQUANTISED_BYTES_LIMIT else "packed"


def _settle(module: nn.Module, name: str, how: CpuLinear) -> CpuLinear:
    """Settle one 4-bit linear; the way it got, which is "unpacked" where the wanted one does not take its shape."""
    linear = module.get_submodule(name)
    if not isinstance(linear, Linear4bit):
        raise TypeError(f"{name} is no 4-bit linear")
    linear.support_avx512bf16_for_cpu = False
    if how == "dequantised":
        module.set_submodule(name, _dequantised(linear))
    elif how == "packed" and can_pack(linear):
        module.set_submodule(name, PackedLinear(linear))
    else:
        return "unpacked"
    return how


def _plain_names(module: nn.Module) -> list[str]:
    """Names of the linears below ``module`` that never had 4 bits; Linear4bit is a Linear too."""
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not isinstance(child, Linear4bit)
    ]


def unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Undo bitsandbytes' packing of 4-bit codes: [out, in / 2] -> [out * in / 2, 1] uint8, exactly.

    Inverse of ``_convert_weight_packed_for_cpu`` (bitsandbytes 0.50.2): blocks of 32 rows, 32 codes in low and the next
    32 in high halves.
    """
    halves = packed.view(torch.uint8).reshape(-1, 32)
    codes = torch.cat([halves & 0xF, halves >> 4], dim=-1)
    codes = codes.reshape(out_features // 32, in_features // 2, 32, 2).transpose(1, 2).reshape(-1, 2)
    return (codes[:, :1] << 4) | codes[:, 1:]


def four_bit_names(module: nn.Module) -> list[str]:
    """Names of the linears below ``module`` that bitsandbytes holds in 4 bits."""
    return [name for name, child in module.named_modules() if isinstance(child, Linear4bit)]


def can_pack(linear: Linear4bit) -> bool:
    """Whether the packed kernel is there and takes this shape (bitsandbytes 0.50.2: it crashes on others)."""
    has_kernel = bool(_has_avx512bf16()) and linear.compute_dtype in (None, torch.bfloat16)
    return has_kernel and linear.out_features % 32 == 0 and linear.in_features % 64 == 0


def _num_weights(linear: nn.Module) -> int:
    return int(getattr(linear, "in_features")) * int(getattr(linear, "out_features"))  # noqa: B009 (untyped)


def _dequantised(linear: Linear4bit) -> DequantisedLinear:
    return DequantisedLinear(dequantize_4bit(linear.weight.data, computed_state(linear)), linear.bias)
