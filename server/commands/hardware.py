"""What this machine is: processor, memory, GPUs, and which fast paths the installed libraries take on it.

Read-only, and quick: nothing is loaded on a device. Place in a request's way: none; `doctor` asks.
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""The instruction sets that decide how fast 16-bit arithmetic is on a CPU (x86 and ARM)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    num_bytes: int
    num_free_bytes: int
    capability: str


@dataclass(frozen=True, slots=True)
class Machine:
    system: str
    processor: str
    flags: tuple[str, ...]
    num_cores: int
    """Cores that this process may use: an affinity mask or a container's limit counts."""
    memory_bytes: int
    """Of the machine, or of the container where it has a lower limit."""
    available_bytes: int
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class FastPath:
    """One way to be faster: whether it is on here, and what it gives or takes to turn on."""

    name: str
    is_on: bool
    note: str


def read_machine() -> Machine:
    cpuinfo = _read("/proc/cpuinfo")
    total, available = _memory()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in CPU_FLAGS if flag in _cpu_flags(cpuinfo)),
        num_cores=_num_cores(),
        memory_bytes=total,
        available_bytes=available,
        gpus=_gpus(),
    )


def read_fast_paths(machine: Machine) -> list[FastPath]:
    """What the libraries will do here. Imports torch and bitsandbytes."""
    import torch

    has_cuda = torch.cuda.is_available()
    has_bf16 = any(flag in machine.flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    can_compile = shutil.which("gcc") is not None or shutil.which("cc") is not None
    has_triton = find_spec("triton") is not None
    return [
        FastPath("cuda", has_cuda, f"torch {torch.__version__}" if has_cuda else "the CPU does the work"),
        FastPath("bitsandbytes native", _has_bnb_library(), "4-bit quantisation and its kernels"),
        FastPath(
            "cpu bf16",
            has_bf16,
            "native 16-bit products" if has_bf16 else "emulated: works, several times slower",
        ),
        FastPath(
            "cpu fused 4-bit",
            _has_fused_cpu_linear(),
            "needs avx512_bf16; small bases keep a 16-bit copy instead",
        ),
        FastPath(
            "cpu compiled",
            find_spec("base.ops._native") is not None,
            "linears from 4 bits and adapters on AVX2; compiled at install where there is a C compiler",
        ),
        FastPath(
            "triton", has_cuda and has_triton and can_compile, "for GPUs; needs a C compiler at run time"
        ),
    ]


def _has_bnb_library() -> bool:
    try:
        from bitsandbytes.cextension import lib
    except (ImportError, OSError, RuntimeError):
        return False
    return "Error" not in type(lib).__name__


def _has_fused_cpu_linear() -> bool:
    try:
        from bitsandbytes.functional import has_avx512bf16
    except (ImportError, OSError, RuntimeError):
        return False
    return bool(has_avx512bf16())  # type: ignore[no-untyped-call]


def _gpus() -> tuple[Gpu, ...]:
    import torch

    return tuple(
        _gpu(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    )


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(properties.name, total, free, f"{properties.major}.{properties.minor}")


def _num_cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed


def _memory() -> tuple[int, int]:
    """(total, available) bytes, under the container's limit where it has one."""
    meminfo = _read("/proc/meminfo")
    total, available = _kib(meminfo, "MemTotal"), _kib(meminfo, "MemAvailable")
    if not total and hasattr(os, "sysconf"):
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        used = _read("/sys/fs/cgroup/memory.current").strip()
        total = min(total, int(limit))
        available = min(available, int(limit) - int(used or 0))
    return total, max(0, available)


def _kib(meminfo: str, name: str) -> int:
    words = _field(meminfo, name).split()
    return int(words[0]) * 1024 if words else 0


def _cpu_flags(cpuinfo: str) -> set[str]:
    return set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())


def _field(text: str, name: str) -> str:
    """The value of the first `name : value` line, or nothing."""
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
