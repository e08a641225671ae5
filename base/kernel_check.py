"""may_serve: whether a kernel serves on this device. It is tried beside its plain twin before anyone is answered.

A kernel that was built and tested elsewhere may still not compile here (no C compiler, another driver), or compile to
something wrong. So each kind has a trial: small steps at this base's own shapes, computed both ways. What raises or
disagrees is not used, and the log says why. The trial compiles what serving needs, so its time is not lost.

Owns: the verdict and the tolerance. Does not know any kernel: a trial yields what was found beside what was expected.
Place in a request's way: none; once, at start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from base.config import CpuAdapters, CudaKernels
from base.errors import KernelRefused

LIMIT_S: Final = 90.0
"""A kind's trial starts no further case after it: what agreed by then serves. A case compiles for seconds at most."""
LEAST_EPSILON: Final = 2.0**-10
"""float32 products take tf32's mantissa on a tensor core."""
ROW_EPSILONS: Final = 2.0
"""A row may be off by so many roundings of its dtype, measured by its length: 1.6 % in bfloat16, where two ways that
each round twice differ by some 0.4 %, and one that loses 64 of 18,944 inputs by 5.8 %."""
PEAK_EPSILONS: Final = 8.0
"""A single number may be off by so many roundings of the row's largest."""

OTHER_DEVICE: Final = (
    "Triton starts kernels on the first device, not on {}: choose it by CUDA_VISIBLE_DEVICES"
)

Case = tuple[str, Tensor, Tensor]
"""What was computed, what came of it, and what the plain twin made of the same: two tensors [..., N] of one shape."""
Trial = Callable[[], Iterator[Case]]
_SETTINGS: Final = {"triton": "cuda_kernels", "native": "cpu_adapters"}

logger = logging.getLogger("lorikeet.base")


@dataclass(frozen=True, slots=True)
class Agreement:
    num_cases: int
    worst: float
    """The largest error of a row over what it may be: at most 1."""
    is_whole: bool
    """Whether the trial came to its end within its time."""


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: str


def may_serve(
    kind: str,
    trial: Trial,
    choice: CudaKernels | CpuAdapters,
    device: torch.device,
    *,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Try the kernel, and say whether it is to be used; ``torch`` tries nothing and uses none.

    Raises KernelRefused where ``choice`` insists on it, and where the trial broke the device, so that nothing serves.
    """
    if choice == "torch":
        return False
    started = clock()
    outcome: Agreement | Refusal
    if device.type == "cuda" and device.index:
        outcome = Refusal(OTHER_DEVICE.format(device))
    else:
        outcome = _attempt(kind, trial, device, started + limit_s, clock)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory plan counts what is free
    if isinstance(outcome, Refusal):
        logger.warning("kernels.refused kind=%s reason=%r", kind, outcome.reason)
        if choice != "auto":
            raise KernelRefused(kind, outcome.reason, _SETTINGS[choice])
        return False
    logger.info(
        "kernels.used kind=%s cases=%d is_whole=%s worst=%.3f took_s=%.1f",
        kind, outcome.num_cases, outcome.is_whole, outcome.worst, clock() - started,
    )  # fmt: skip
    return True


@torch.no_grad()
def _attempt(
    kind: str, trial: Trial, device: torch.device, deadline: float, clock: Callable[[], float]
) -> Agreement | Refusal:
    try:
        return _compare(trial, deadline, clock)
    except Exception as error:  # noqa: BLE001 (whatever a compiler, a driver or a missing package throws)
        reason = _told(error)
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:  # an illegal access ends a CUDA context: no other kernel can run in it
            raise KernelRefused(kind, f"{reason}, after which the device answers nothing") from error
    return Refusal(reason)


def _compare(trial: Trial, deadline: float, clock: Callable[[], float]) -> Agreement | Refusal:
    num_cases, worst = 0, 0.0
    for what, found, expected in trial():
        error = error_of(found, expected)
        num_cases, worst = num_cases + 1, max(worst, error)
        if not error <= 1:
            return Refusal(f"{what}: it is {error:.2f} times as far from its plain twin as rounding explains")
        if clock() >= deadline:
            return Agreement(num_cases, worst, is_whole=False)
    if not num_cases:
        return Refusal("nothing here could be tried")
    return Agreement(num_cases, worst, is_whole=True)


def error_of(found: Tensor, expected: Tensor) -> float:
    """How far they are apart, over what rounding explains; more than 1 is too far, and so is what is not finite."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    epsilon = max(torch.finfo(expected.dtype).eps, LEAST_EPSILON)
    ours, theirs = (rows.detach().double().reshape(-1, rows.shape[-1]) for rows in (found, expected))
    apart = ours - theirs
    by_row = _ratio(apart.norm(dim=1), theirs.norm(dim=1)) / (ROW_EPSILONS * epsilon)
    by_peak = _ratio(apart.abs().amax(1), theirs.abs().amax(1)) / (PEAK_EPSILONS * epsilon)
    worst = float(torch.maximum(by_row, by_peak).max())
    return worst if worst == worst else float("inf")


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    """A row of zeros must be met exactly."""
    return torch.where(error == 0, torch.zeros_like(error), error / size)


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
