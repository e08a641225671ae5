"""The kernel bench: LoRA, 4-bit matmul and attention, each against the bytes and operations it cannot go without.

The one file of the bench that imports rooms of ours: it times the kernels of base and adapters by themselves. A line
says how many microseconds a kernel takes, how many its floor, and what share of the floor's speed that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.layer import attach
from adapters.native_lora import NativeLora
from adapters.ops.entries import DeviceTable
from adapters.ops.site_group import Adder, torch_adder
from adapters.ops.tiles import TileTable
from adapters.ops.torch_ops import Rounding
from adapters.ops.triton_ops import TritonLinear, add_lora, has_triton
from adapters.routing import RoutingSet
from adapters.sites import Site, SiteTable
from adapters.slots import SlotBank, page_rank
from adapters.triton_lora import TritonLora
from adapters.weights import AdapterWeights, SiteWeights
from base.native_linear import FourBitRows, NativeLinear
from base.ops.native_library import has_native_library, native_library
from bench.floors import BF16_BYTES, FP32_BYTES, NF4_BYTES, LanguageShape, Machine
from bench.machine import best_seconds, blocked_product, has_blocked_product

ROWS = (1, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Timing:
    """One kernel at one size."""

    kernel: str
    variant: str
    site: str
    rows: int
    us: float
    floor_us: float

    @property
    def share(self) -> float:
        """Of the floor's speed; 1 cannot be exceeded but by what caches hold."""
        return self.floor_us / self.us

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"share": round(self.share, 4)}


@dataclass(frozen=True, slots=True)
class Stand:
    """Where and at what sizes kernels are timed."""

    shape: LanguageShape
    machine: Machine
    device: torch.device
    rows: Sequence[int] = ROWS
    rank: int = 16
    num_adapters: int = 8
    context: int = 512
    budget_s: float = 0.2

    def floor_us(self, num_bytes: float, flops: float, *, is_lora: bool = False) -> float:
        rate = self.machine.lora_flops_per_s if is_lora else self.machine.most_flops_per_s
        return 1e6 * max(num_bytes / self.machine.bytes_per_s, flops / rate)

    def time_us(self, run: Callable[[], object]) -> float:
        with torch.inference_mode():
            return 1e6 * best_seconds(run, self.device, self.budget_s)


@torch.inference_mode()
def time_kernels(stand: Stand, sites: Sequence[str] = ("q", "gate", "down")) -> Iterator[Timing]:
    """Every kernel at every number of rows; the slowest part of a bench of a minute."""
    for site in sites:
        yield from _matmuls(stand, site)
        yield from _loras(stand, site)
    yield from _attentions(stand)


# ---- 4-bit matmul


def _matmuls(stand: Stand, site: str) -> Iterator[Timing]:
    """The fused path where there is one, dequantise and multiply, and the product over a 16-bit copy."""
    num_in, num_out = stand.shape.linears[site]
    weight = torch.randn(num_out, num_in, dtype=torch.bfloat16, device=stand.device) / num_in**0.5
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    linear = _linear4bit(weight, stand.device)
    for rows in stand.rows:
        x = torch.randn(rows, num_in, dtype=torch.bfloat16, device=stand.device)
        activations = BF16_BYTES * rows * (num_in + num_out)
        floor = stand.floor_us(NF4_BYTES * num_in * num_out + activations, 2.0 * rows * num_in * num_out)
        copied = stand.floor_us(BF16_BYTES * num_in * num_out + activations, 2.0 * rows * num_in * num_out)
        variants: tuple[tuple[str, Callable[[], object], float], ...] = (
            ("bitsandbytes", lambda x=x: linear(x), floor),  # type: ignore[misc]
            ("dequantise + linear", lambda x=x: F.linear(x, dequantize_4bit(packed, state)), floor),  # type: ignore[misc]
            ("16-bit copy", lambda x=x: F.linear(x, weight), copied),  # type: ignore[misc]
        )
        for variant, run, least in variants:
            yield Timing("matmul", variant, site, rows, stand.time_us(run), least)
    if stand.device.type == "cpu" and has_native_library():
        native = NativeLinear(FourBitRows.of(packed, state), None)
        for rows in stand.rows:
            x = torch.randn(rows, num_in, dtype=torch.bfloat16)
            moved = NF4_BYTES * num_in * num_out + BF16_BYTES * rows * (num_in + num_out)
            floor = stand.floor_us(moved, 2.0 * rows * num_in * num_out)
            took = stand.time_us(lambda x=x: native(x))  # type: ignore[misc]
            yield Timing("matmul", "compiled, from 4 bits", site, rows, took, floor)
    if stand.device.type == "cpu" and has_blocked_product():
        yield from _blocked_matmuls(stand, site, weight)


def _blocked_matmuls(stand: Stand, site: str, weight: Tensor) -> Iterator[Timing]:
    """The product over an fp32 copy in oneDNN's order, activations widened and the result rounded."""
    num_out, num_in = weight.shape
    multiply = blocked_product(weight, max(stand.rows))
    for rows in stand.rows:
        x = torch.randn(rows, num_in, dtype=torch.bfloat16)
        moved = FP32_BYTES * num_in * num_out + BF16_BYTES * rows * (num_in + num_out)
        floor = stand.floor_us(moved, 2.0 * rows * num_in * num_out)
        took = stand.time_us(lambda x=x: multiply(x.float()).to(torch.bfloat16))  # type: ignore[misc]
        yield Timing("matmul", "fp32 copy in blocks", site, rows, took, floor)


def _linear4bit(weight: Tensor, device: torch.device) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    linear: nn.Module = Linear4bit(  # type: ignore[no-untyped-call]
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    linear.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return linear.to(device).train(False)


# ---- LoRA


def _loras(stand: Stand, site: str) -> Iterator[Timing]:
    """Our layer minus its base, over distinct adapters, against the plain loop over rows."""
    bed = _Bed(stand, site)
    for rows in stand.rows:
        used = min(rows, stand.num_adapters)
        x = torch.randn(rows, bed.num_in, dtype=torch.bfloat16, device=stand.device)
        weights = stand.rank * (bed.num_in + bed.num_out)
        size = bed.bank.dtype.itemsize
        moved = used * weights * size + BF16_BYTES * rows * (bed.num_in + 2 * bed.num_out)
        floor = stand.floor_us(moved, 2.0 * rows * weights, is_lora=True)
        bed.route([(rows // used + (place < rows % used), place) for place in range(used)])
        whole = stand.time_us(lambda x=x: bed.linear(x))  # type: ignore[misc]
        bed.route([(rows, -1)])
        bare = stand.time_us(lambda x=x: bed.linear(x))  # type: ignore[misc]
        yield Timing("lora", f"ours over {used} adapters", site, rows, max(whole - bare, 1e-3), floor)
        if stand.device.type == "cuda" and has_triton():
            took = stand.time_us(bed.triton(x, used))
            yield Timing("lora", f"Triton over {used} adapters", site, rows, took, floor)
        loop = stand.time_us(lambda x=x, used=used: bed.loop(x, used))  # type: ignore[misc]
        yield Timing("lora", f"a loop over {used} adapters", site, rows, loop, floor)


class _Costless(nn.Linear):
    """A base that computes nothing: what adapters cost is the difference to it, and drowns in a real one's noise."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.out_features)


class _Bed:
    """One linear of a costless base with adapters in slots."""

    def __init__(self, stand: Stand, site: str) -> None:
        self.num_in, self.num_out = stand.shape.linears[site]
        self._site, self._rank = site, stand.rank
        dtype = torch.float32 if stand.device.type == "cpu" else torch.bfloat16
        sites = {site: Site(site, self.num_in, self.num_out, "language")}
        self.bank = SlotBank(sites, stand.num_adapters, stand.rank, dtype, stand.device)
        self._routing = RoutingSet.on(stand.device)
        module = nn.Module()
        module.add_module(
            site, _Costless(self.num_in, self.num_out, bias=False).to(stand.device, torch.bfloat16)
        )
        attach(module, sites, self.bank, self._routing, _plain_weight, _adder(sites, self.bank))
        self.linear = module.get_submodule(site)
        self._pairs = [_pair(stand, self.num_in, self.num_out) for _ in range(stand.num_adapters)]
        for slot, (a, b) in enumerate(self._pairs):
            made = SiteWeights(a, b, None)
            self.bank.write(slot, AdapterWeights({site: made}, made.num_bytes, stand.rank, f"bench-{slot}"))
        self._dtype = dtype

    def route(self, segments: Sequence[tuple[int, int]]) -> None:
        self._routing.language.fill(segments)

    def triton(self, x: Tensor, used: int) -> Callable[[], Tensor]:
        """Shrink and expand alone, added to the same y again and again; rows as evenly over adapters as they go."""
        table = DeviceTable([self.bank.shelf(self._site)], x.device)
        table.refresh()
        rank = page_rank(self._rank)
        widths = (self.num_out,)
        linear = TritonLinear(
            table.entries([self._site]), self.num_in, widths, self._dtype, rank, Rounding.DELTA
        )
        tiles = TileTable(x.shape[0], self.bank.num_slots, x.device)
        tiles.fill([slot for slot, rows in enumerate(x.tensor_split(used)) for _ in rows])
        y = torch.zeros(x.shape[0], self.num_out, dtype=x.dtype, device=x.device)
        return lambda: add_lora(y, x, linear, tiles)

    def loop(self, x: Tensor, used: int) -> list[Tensor]:
        """What one would write first: each adapter's rows by themselves."""
        parts = x.to(self._dtype).tensor_split(used)
        pairs = self._pairs[:used]
        return [
            F.linear(F.linear(rows, a.to(self._dtype)), b.to(self._dtype))
            for rows, (a, b) in zip(parts, pairs, strict=True)
        ]


def _adder(sites: SiteTable, bank: SlotBank) -> Adder:
    """Who would serve on this device, by its kind alone."""
    if bank.device.type == "cuda" and has_triton():
        return TritonLora(sites, bank).adder
    if bank.device.type == "cpu" and has_native_library():
        return NativeLora(sites, bank, native_library()).adder
    return torch_adder


def _pair(stand: Stand, num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if stand.device.type == "cpu" else torch.bfloat16
    a = torch.randn(stand.rank, num_in) / num_in**0.5
    b = torch.randn(num_out, stand.rank) / stand.rank**0.5
    return a.to(stand.device, dtype), b.to(stand.device, dtype)


def _plain_weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(linear).__name__}.weight is not a tensor")
    return weight


# ---- attention


def _attentions(stand: Stand) -> Iterator[Timing]:
    """Decode: one query a row over its own context, grouped heads."""
    shape = stand.shape
    for rows in stand.rows:
        size = (rows, shape.kv_heads, stand.context, shape.head_dim)
        keys = torch.randn(size, dtype=torch.bfloat16, device=stand.device)
        values = torch.randn_like(keys)
        query = torch.randn(rows, shape.heads, 1, shape.head_dim, dtype=torch.bfloat16, device=stand.device)
        flops = 4.0 * rows * shape.heads * stand.context * shape.head_dim
        floor = stand.floor_us(keys.nbytes + values.nbytes, flops)

        def attend(query: Tensor = query, keys: Tensor = keys, values: Tensor = values) -> Tensor:
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        yield Timing(
            "attention", f"sdpa, context {stand.context}", "decode", rows, stand.time_us(attend), floor
        )
