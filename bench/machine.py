"""What this machine reaches: bytes a second from memory and operations a second of matrix products, as measured.

The floors are computed with these, not with a data sheet. Each is the best of several tries: a limit is what can be
had when nobody else wants it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.floors import Machine

COPY_BYTES = 512 * 2**20
"""Far beyond any cache."""
CUDA_COPY_BYTES = 4 * 2**30
PRODUCT = (512, 2048, 2048)
CUDA_PRODUCT = (8192, 8192, 8192)


def measure_machine(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """Of ``device``; base products in ``dtype``, adapters' in fp32 on a CPU and in ``dtype`` elsewhere."""
    lora_dtype = torch.float32 if device.type == "cpu" else dtype
    is_cpu = device.type == "cpu"
    lora = _product_rate(device, lora_dtype)
    return Machine(
        bytes_per_s=_read_rate(device),
        flops_per_s=_product_rate(device, dtype),
        lora_flops_per_s=lora,
        wide_flops_per_s=max(lora, _blocked_product_rate()) if is_cpu else None,
    )


def best_seconds(
    run: Callable[[], object], device: torch.device, budget_s: float = 0.5, least: int = 3
) -> float:
    """The shortest of the runs that fit the budget, at least ``least``, after one to warm up."""
    run()
    _finish(device)
    best, spent, num = float("inf"), 0.0, 0
    while num < least or spent < budget_s:
        begin_s = time.perf_counter()
        run()
        _finish(device)
        took_s = time.perf_counter() - begin_s
        best, spent, num = min(best, took_s), spent + took_s, num + 1
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_rate(device: torch.device) -> float:
    """Reading, which is what a decode step does: the sum of a large tensor."""
    num = (CUDA_COPY_BYTES if device.type == "cuda" else COPY_BYTES) // 4
    data = torch.ones(num, dtype=torch.float32, device=device)
    return data.nbytes / best_seconds(lambda: data.sum(), device)


def has_blocked_product() -> bool:
    """Whether torch has oneDNN's fp32 product over a weight in oneDNN's own order."""
    is_built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return is_built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def blocked_product(weight: torch.Tensor, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [rows, in] fp32 -> [rows, out], over ``weight`` [out, in] in oneDNN's order."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous(), rows)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return result

    return multiply


def _blocked_product_rate() -> float:
    if not has_blocked_product():
        return 0.0
    rows, width, out = PRODUCT
    x, multiply = torch.randn(rows, width), blocked_product(torch.randn(out, width), rows)
    with torch.inference_mode():
        return 2.0 * rows * width * out / best_seconds(lambda: multiply(x), torch.device("cpu"))


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    rows, width, out = CUDA_PRODUCT if device.type == "cuda" else PRODUCT
    x = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(out, width, device=device, dtype=dtype)
    return 2.0 * rows * width * out / best_seconds(lambda: torch.nn.functional.linear(x, weight), device)
