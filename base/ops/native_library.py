"""The compiled kernels of a CPU: the library that ``native/*.c`` and adapters/ops/native/*.c make, loaded once.

It is compiled when the package is installed, where there is a C compiler, and is no Python extension: ctypes loads it.
It has torch's threads, since it names OpenMP's functions and torch has brought them. Where it is not there the plain
ways serve, which it is compared with.

Owns: the loaded library. Place in a request's way: none; once, at start.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from typing import Final

import torch

MODULE: Final = "base.ops._native"
KERNELS: Final = tuple(
    f"lorikeet_{name}" for name in ("linear", "norm", "gate", "attend", "add_adapters", "choose")
)


class NativeMissing(Exception):
    """The compiled kernels are not to be had here; the message says why."""


@lru_cache(maxsize=1)
def native_library() -> ctypes.CDLL:
    """Raises NativeMissing."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        raise NativeMissing(f"they are written for AVX2, and torch uses {capability} on this processor")
    found = importlib.util.find_spec(MODULE)
    if found is None or found.origin is None:
        raise NativeMissing("they were not compiled: install a C compiler, then install Lorikeet again")
    try:
        library = ctypes.CDLL(found.origin)
    except OSError as error:
        raise NativeMissing(f"they cannot be loaded ({error})") from error
    if not library.lorikeet_has_kernels():
        raise NativeMissing("they were compiled for another kind of processor")
    if not all(hasattr(library, kernel) for kernel in KERNELS):
        raise NativeMissing("they were compiled from other sources than these: install Lorikeet again")
    return library


def has_native_library() -> bool:
    try:
        native_library()
    except NativeMissing:
        return False
    return True
