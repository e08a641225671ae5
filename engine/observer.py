"""What the engine tells of itself while it works: frozen events to one Observer. Metrics are made from these alone.

``record`` is called on the engine's thread, once or a few times a step: it must be quick and must not raise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from adapters.ref import AdapterRef
from engine.clock import Phase

Way = Literal["graph", "eager"]
"""How a pass through the model was started: replayed, or kernel by kernel."""
EndReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step ran."""

    seconds: Mapping[Phase, float]
    cpu_seconds: Mapping[Phase, float]
    """The processor time of the engine's thread; what is missing to ``seconds`` it waited."""
    num_decode_rows: int
    num_distinct_adapters: int
    """Distinct adapters in the batch, the base not counted."""


@dataclass(frozen=True, slots=True)
class Passed:
    """One pass through the language model; a step may take several."""

    way: Way


@dataclass(frozen=True, slots=True)
class SteppedAhead:
    """A step was on the device before the tokens of the one before it were read."""

    num_dropped: int
    """Rows for nothing: their sequences turned out to have ended."""


@dataclass(frozen=True, slots=True)
class SequenceStarted:
    """First scheduling: it left the queue."""

    adapter: AdapterRef
    queue_s: float
    swap_s: float
    """The part of the wait that was for the adapter to come to the device."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    adapter: AdapterRef
    seconds: float
    """Since the wire accepted the request."""
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    """Of them, those that were found computed."""


@dataclass(frozen=True, slots=True)
class NextToken:
    adapter: AdapterRef
    seconds: float
    """Since this sequence's token before."""


@dataclass(frozen=True, slots=True)
class SequenceEnded:
    adapter: AdapterRef
    reason: EndReason
    seconds: float
    num_output_tokens: int
    error: str = ""
    """Class name of the error when reason is ``error``."""


@dataclass(frozen=True, slots=True)
class AdapterMoved:
    """An adapter became visible in a slot. Stages (seconds): read, copy, probe."""

    ref: AdapterRef
    num_bytes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AdapterProven:
    """Its package's own probes were replayed before it became visible: the largest difference of a logit."""

    ref: AdapterRef
    difference: float
    limit: float
    """What rounding explains; beyond it the adapter is refused."""
    is_exact: bool
    """Not one bit differs."""


@dataclass(frozen=True, slots=True)
class AdapterMoveFailed:
    ref: AdapterRef
    reason: str
    """A RejectReason where the package is at fault, otherwise the error's class name."""


@dataclass(frozen=True, slots=True)
class AdapterEvicted:
    ref: AdapterRef
    reason: Literal["lru", "unload"]
    tier: Literal["device", "host"] = "device"


@dataclass(frozen=True, slots=True)
class AdapterLookup:
    """A sequence was born: was its adapter on the device, and was it in host memory?"""

    ref: AdapterRef
    was_on_device: bool
    was_on_host: bool = False


@dataclass(frozen=True, slots=True)
class ImagesEncoded:
    num_images: int
    num_patches: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ImageLookup:
    was_cached: bool


@dataclass(frozen=True, slots=True)
class DecodeStalled:
    """Running sequences waited this long outside a step's own work."""

    cause: Literal["adapter_copy", "adapter_probe"]
    seconds: float


@dataclass(frozen=True, slots=True)
class StepRetried:
    """A step threw and was bisected; ``num_failed`` sequences were the culprits."""

    num_failed: int
    error: str


Event = (
    StepDone
    | Passed
    | SteppedAhead
    | SequenceStarted
    | FirstToken
    | NextToken
    | SequenceEnded
    | AdapterMoved
    | AdapterProven
    | AdapterMoveFailed
    | AdapterEvicted
    | AdapterLookup
    | ImagesEncoded
    | ImageLookup
    | DecodeStalled
    | StepRetried
)


class Observer(Protocol):
    def record(self, event: Event) -> None: ...


class SilentObserver:
    """Drops everything; for tests and tools."""

    def record(self, event: Event) -> None:
        return None
