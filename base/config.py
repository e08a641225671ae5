"""BaseConfig: what the operator asked for, before anything is read. Frozen; passed down from the settings.

Place in a request's way: none; it is read once, by the loader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Quantization = Literal["nf4", "none"]
CpuLinear = Literal["auto", "native", "float32", "dequantised", "packed", "unpacked"]
CpuAdapters = Literal["auto", "native", "torch"]
CudaKernels = Literal["auto", "triton", "torch"]

POCKET = "pocket"


@dataclass(frozen=True, slots=True)
class BaseConfig:
    """Which base to keep resident, and how."""

    source: str = POCKET
    """``pocket`` (the embedded base), a hub id, or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None is the default branch. Not used for folders."""
    quantization: Quantization = "nf4"
    """``nf4``: the language linears in 4 bits with double quantisation. A pre-quantised checkpoint keeps its own."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of activations and of every weight that is not in 4 bits."""
    device: str = "auto"
    """A torch device; ``auto`` is CUDA where there is one, else the CPU."""
    min_pixels: int | None = None
    """Overrides the checkpoint's smallest area of a resized image."""
    max_pixels: int | None = None
    """Overrides the checkpoint's largest area of a resized image."""
    cpu_linear: CpuLinear = "auto"
    """How linears compute on a CPU: see base/linear.py. Not used on other devices."""
    cuda_kernels: CudaKernels = "auto"
    """Whose kernels compute 4-bit linears, attention and adapters on CUDA: ``auto`` takes each of ours that agrees with
    its plain twin when it is tried at load (base/kernel_check.py), ``triton`` makes one that does not an error, and
    ``torch`` takes bitsandbytes and torch. Not used on other devices."""
    local_files_only: bool = False
    """Never ask the hub, use what it left in its cache."""
