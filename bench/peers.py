"""Peers: what people run today in the place of our server, on the same weights and the same calls, in the same run.

Owns the worker processes. A worker loads the checkpoint once and then runs traces that it is sent, so that peers and we
can take turns; it costs nothing while it waits. Servers by URL (vLLM, SGLang, LoRAX, llama-server, transformers serve)
are endpoints like ours: see bench/endpoint.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from bench.load import Run
from bench.serving import peak_bytes
from bench.streamed import Streamed
from bench.trace import Call, Picture, Trace


class PeerKind(StrEnum):
    """What runs in a worker."""

    GENERATE = "generate"  # transformers' generate on the base, one call after another
    SET_ADAPTER = "set-adapter"  # PEFT: set_adapter before each call
    ADAPTER_NAMES = (
        "adapter-names"  # PEFT: batches of as many calls as there are streams, adapter_names a row
    )
    MERGE = "merge"  # PEFT: each call's adapter merged into the weights, and taken out again


class PeerWeights(StrEnum):
    """What a worker computes with."""

    SHIPPED = "nf4"  # as the checkpoint has them, as people load it
    BF16 = "bf16"  # dequantised once by transformers, in 16 bits: fewest bytes for one row
    FP32 = "fp32"  # the same widened: fastest in batches on a CPU that only imitates bf16 products


class PeerFailed(RuntimeError):
    """A worker ended or could not run a trace; the message has its last words."""


@dataclass(frozen=True, slots=True)
class PeerSetup:
    """What a worker loads."""

    kind: PeerKind
    checkpoint: Path
    adapter_root: Path | None = None
    adapters: tuple[str, ...] = ()
    device: str = "auto"
    weights: PeerWeights = PeerWeights.SHIPPED


class Peer:
    """A worker that is up. One trace at a time."""

    def __init__(self, setup: PeerSetup, process: subprocess.Popen[str], log: Path) -> None:
        self.setup = setup
        self._process = process
        self._log = log
        self.facts: Mapping[str, object] = self._read()

    @property
    def label(self) -> str:
        is_plain = self.setup.kind is PeerKind.GENERATE
        way = "transformers generate" if is_plain else f"peft {self.setup.kind}"
        return way if self.setup.weights is PeerWeights.SHIPPED else f"{way}, {self.setup.weights}"

    def about(self) -> dict[str, object]:
        return {
            "label": self.label,
            "kind": str(self.setup.kind),
            "weights": str(self.setup.weights),
            "peak_bytes": peak_bytes(self._process.pid),
            "num_adapters": len(self.setup.adapters),
        } | dict(self.facts)

    def counters(self) -> dict[str, float]:
        """It counts nothing."""
        return {}

    def send(self, trace: Trace) -> Run:
        """Raises PeerFailed."""
        if self._process.stdin is None:
            raise PeerFailed("the worker has no standard input")
        try:
            self._process.stdin.write(json.dumps(asdict(trace)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerFailed(f"{self.label} has ended:\n{self._tail()}") from error
        return run_from_json(self._read())

    def _read(self) -> Mapping[str, object]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise PeerFailed(f"the worker of {self.setup.kind} has ended:\n{self._tail()}")
        reply: dict[str, object] = json.loads(line)
        if "error" in reply:
            raise PeerFailed(f"{self.setup.kind}: {reply['error']}")
        return reply

    def _tail(self) -> str:
        return self._log.read_bytes()[-1500:].decode("utf-8", "replace")


@contextmanager
def peer(setup: PeerSetup, log: Path) -> Iterator[Peer]:
    """A worker until the block ends. Raises PeerFailed if it cannot load."""
    if not (setup.checkpoint / "config.json").is_file():
        raise PeerFailed(f"{setup.checkpoint} holds no checkpoint: make one with `lorikeet bench shapes`")
    command = [
        sys.executable,
        "-m",
        "bench.peer_worker",
        str(setup.kind),
        str(setup.checkpoint),
        str(setup.adapter_root or ""),
        setup.device,
        str(setup.weights),
        *setup.adapters,
    ]
    root = Path(__file__).resolve().parent.parent
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
        )
    try:
        yield Peer(setup, process, log)
    except (SystemExit, KeyboardInterrupt):
        process.kill()  # it may be in the middle of a long answer
        raise
    finally:
        if process.stdin is not None:
            process.stdin.close()  # the worker ends at the end of its input
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def serve_command(checkpoint: Path, port: int) -> Sequence[str]:
    """transformers' own server over a checkpoint; it answers for the base alone, and /health tells that it is up."""
    program = Path(sys.executable).with_name("transformers")
    return (str(program), "serve", str(checkpoint), "--port", str(port), "--host", "127.0.0.1")


# ---- traces and runs as JSON


def trace_from_json(content: Mapping[str, object]) -> Trace:
    """Back from ``asdict``."""
    found = dict(content)
    calls = found.pop("calls")
    if not isinstance(calls, list):
        raise ValueError("a trace has a list of calls")
    return Trace(calls=tuple(_call(call) for call in calls), **found)  # type: ignore[arg-type]


def _call(content: Mapping[str, object]) -> Call:
    picture = content.get("picture")
    made = Picture(**picture) if isinstance(picture, dict) else None
    return Call(**{**content, "picture": made})  # type: ignore[arg-type]


def run_from_json(content: Mapping[str, object]) -> Run:
    """Back from ``asdict``."""
    streams, seconds = content["streams"], content["seconds"]
    if not isinstance(streams, list) or not isinstance(seconds, float):
        raise ValueError("a run has a list of streams and its seconds")
    return Run(
        tuple(Streamed(**{**each, "token_times": tuple(each["token_times"])}) for each in streams), seconds
    )
