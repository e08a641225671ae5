"""Where a figure comes from: commit, device, versions, and how busy the machine was. Kept with every result."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "fastapi", "uvicorn", "httpx2")
BUSY_LOAD_PER_CPU = 0.5
"""Runnable processes a core before a run, over which others are at work and figures are no claims."""


@dataclass(frozen=True, slots=True)
class Device:
    """What computes. Figures compare only where this is equal."""

    kind: str
    """``cuda`` or ``cpu``."""
    name: str
    num_cpus: int
    features: tuple[str, ...] = ()
    """Of the processor, those that decide which kernels run."""

    @property
    def title(self) -> str:
        features = f" ({', '.join(self.features)})" if self.features else ""
        return f"{self.name}{features}, {self.num_cpus} CPUs"


@dataclass(frozen=True, slots=True)
class Provenance:
    commit: str
    is_dirty: bool
    device: Device
    versions: dict[str, str]
    load_average: float
    """Of the last minute, before the run."""

    @property
    def is_contended(self) -> bool:
        return self.load_average > BUSY_LOAD_PER_CPU * self.device.num_cpus

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"is_contended": self.is_contended}


def provenance(root: Path | None = None) -> Provenance:
    """Of this machine, now. ``root`` is a folder of the repository; outside one the commit is empty."""
    folder = root or Path(__file__).resolve().parent
    return Provenance(
        commit=_said("git", "-C", str(folder), "rev-parse", "HEAD"),
        is_dirty=bool(_said("git", "-C", str(folder), "status", "--porcelain")),
        device=device(),
        versions=versions(),
        load_average=os.getloadavg()[0],
    )


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    installed = {distribution.name.lower() for distribution in metadata.distributions() if distribution.name}
    found = {name: metadata.version(name) for name in LIBRARIES if name in installed}
    return {"python": platform.python_version()} | found


def device() -> Device:
    """The first GPU if nvidia-smi names one, else the processor."""
    gpus = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    num_cpus = len(os.sched_getaffinity(0))
    if gpus:
        return Device("cuda", gpus[0].strip(), num_cpus)
    return _processor(num_cpus)


def _processor(num_cpus: int) -> Device:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", "").split()
    decisive = tuple(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    return Device(
        "cpu", fields.get("model name") or platform.processor() or platform.machine(), num_cpus, decisive
    )


def _said(*command: str) -> str:
    """What a program prints; nothing if there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
