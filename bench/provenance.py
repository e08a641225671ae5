"""Where a figure comes from: commit, device, versions, and how busy the machine was. Kept with every result."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "fastapi", "uvicorn", "httpx2")
BUSY_LOAD_PER_CPU = 0.5
"""Runnable processes a core before a run, over which others are at work and figures are no claims; used where the
system does not tell what they took during it."""
BUSY_OTHERS_SHARE = 0.05
"""Of the processors' time during a run, taken by others."""


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
    others_share: float | None = None
    """Of the processors' time during the run: what processes other than the bench and what it started took."""

    @property
    def is_contended(self) -> bool:
        if self.others_share is not None:
            return self.others_share > BUSY_OTHERS_SHARE
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


class Watch:
    """Where a run's figures come from, begun before it; ``end`` adds what others took of the processors meanwhile.

    Servers and workers must have ended by then: the system counts a child's time when it is gone.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._origin = provenance(root)
        self._begin = _times()

    def end(self) -> Provenance:
        begin, now = self._begin, _times()
        if begin is None or now is None or now.all_s <= begin.all_s:
            return self._origin
        busy_s, own_s = now.busy_s - begin.busy_s, now.own_s - begin.own_s
        share = max(0.0, busy_s - own_s) / (now.all_s - begin.all_s)
        return replace(self._origin, others_share=round(share, 4))


@dataclass(frozen=True, slots=True)
class _Times:
    """Processor seconds of all cores since the system began: all, those not idle, those of this process's family."""

    all_s: float
    busy_s: float
    own_s: float


def _times() -> _Times | None:
    """None where the system has no /proc/stat."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ticks = [int(word) for word in path.read_text("ascii").splitlines()[0].split()[1:9]]
    per_s = os.sysconf("SC_CLK_TCK")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    idle = ticks[3] + ticks[4]  # and waiting for a disk
    return _Times(
        sum(ticks) / per_s,
        (sum(ticks) - idle) / per_s,
        sum(each.ru_utime + each.ru_stime for each in used),
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
