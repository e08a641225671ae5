"""Serving: starts a server as a process of its own, waits until it answers, and stops it. Ours and peers' alike."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

STOP_TIMEOUT_S = 60.0
LOG_TAIL = 1500


class ServerDied(RuntimeError):
    """A server ended, or was not ready in time; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers."""

    url: str
    pid: int
    """0 for one that others started."""
    start_s: float
    """From its start to its first answer."""

    def peak_bytes(self) -> int:
        """The most resident memory so far of it and its children, each at its own peak; 0 where /proc lacks."""
        return peak_bytes(self.pid)

    def cpu_seconds(self) -> tuple[float, float]:
        """Processor time so far of its main thread, and of all others; zeros where /proc lacks."""
        tasks = Path(f"/proc/{self.pid}/task")
        spent = {file.parent.name: _ran(file) for file in tasks.glob("*/schedstat")}
        main = spent.pop(str(self.pid), 0.0)
        return main, sum(spent.values())


def peak_bytes(pid: int) -> int:
    """Of a process and all below it."""
    return sum(_peak_of(member) for member in _family(pid))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def lorikeet_command(
    base: str, adapter_root: Path | None, state: Path, port: int, *more: str
) -> tuple[str, ...]:
    """How our own server is started, from this checkout."""
    door = Path(__file__).resolve().parent.parent / "lorikeet.py"
    command = [
        sys.executable,
        str(door),
        "serve",
        "--base",
        base,
        "--port",
        str(port),
        "--state-dir",
        str(state),
    ]
    if adapter_root is not None:
        command += ["--adapter-root", str(adapter_root)]
    return (*command, *more)


@contextmanager
def serve(
    command: Sequence[str], url: str, log: Path, *, ready: str = "/ready", timeout_s: float = 900.0
) -> Iterator[Served]:
    """Run ``command`` until the block ends; ``ready`` is a path that answers 200 when it serves.

    Where the bench itself is told to end, the server has no time to let its streams end: who comes next needs its
    device. Raises ServerDied.
    """
    begin_s = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait(process, url + ready, log, begin_s + timeout_s)
        yield Served(url, process.pid, time.monotonic() - begin_s)
    except (SystemExit, KeyboardInterrupt):
        _kill(process)
        raise
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path, deadline_s: float) -> None:
    with httpx2.Client(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise ServerDied(f"the server ended with status {process.returncode}:\n{_tail(log)}")
            try:
                if client.get(address).status_code == 200:
                    return
            except httpx2.TransportError:
                pass  # not listening yet
            time.sleep(0.2)
    raise ServerDied(f"the server did not answer 200 at {address} in time:\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Politely, then not; with every child."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With every child: a server's group is its own, whose number stands until the server has been waited for."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: Path) -> str:
    return log.read_bytes()[-LOG_TAIL:].decode("utf-8", "replace")


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.exists():
        return []
    children = [
        int(child)
        for task in tasks.iterdir()
        if (file := task / "children").exists()
        for child in file.read_text("ascii").split()
    ]
    return [pid, *(member for child in children for member in _family(child))]


def _ran(schedstat: Path) -> float:
    """Seconds that a thread was on a processor; 0 for one that has ended meanwhile."""
    try:
        return int(schedstat.read_text("ascii").split()[0]) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def _peak_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
