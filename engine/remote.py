"""What crosses between the server's process and the engine's: frozen values around the messages of ``messages``.

Callables cannot cross, so an act that is answered (load, unload, compile) goes down with a number and its answer comes
up with the same. Place in a request's way: steps 4 and 11.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters.ref import AdapterRef
from adapters.sites import Site
from base.config import BaseConfig
from base.spec import BaseSpec
from engine.config import EngineConfig
from engine.memory import MemoryPlan
from engine.messages import LoadReport, Outbound, UnloadReport
from engine.observer import Event
from engine.sampling import GrammarSpec
from engine.status import Picture

# ---- down ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """The first value down: what to load and how to serve it."""

    base: BaseConfig
    engine: EngineConfig
    packages: str
    """The store's folder."""
    log_level: int


@dataclass(frozen=True, slots=True)
class LoadCall:
    ref: AdapterRef
    pin: bool


@dataclass(frozen=True, slots=True)
class UnloadCall:
    ref: AdapterRef
    timeout_s: float


@dataclass(frozen=True, slots=True)
class CompileCall:
    spec: GrammarSpec


Act = LoadCall | UnloadCall | CompileCall


@dataclass(frozen=True, slots=True)
class Call:
    number: int
    act: Act


# ---- up --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is known once the base is loaded and the engine warm."""

    spec: BaseSpec
    sites: Mapping[str, Site]
    device: str
    memory: MemoryPlan
    max_model_len: int
    num_blocks: int
    kernels: Mapping[str, str]
    picture: Picture


@dataclass(frozen=True, slots=True)
class NotReady:
    """It cannot start, and why; the process ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class Told:
    """What the engine's outbox held after a step."""

    messages: Sequence[Outbound]


@dataclass(frozen=True, slots=True)
class Drawn:
    picture: Picture


@dataclass(frozen=True, slots=True)
class Seen:
    event: Event


@dataclass(frozen=True, slots=True)
class Answered:
    number: int
    outcome: LoadReport | UnloadReport | Exception | None


@dataclass(frozen=True, slots=True)
class Pulse:
    """Sent all the time, also while loading: how long ago the engine's loop turned."""

    heartbeat_age_s: float


@dataclass(frozen=True, slots=True)
class Logged:
    name: str
    level: int
    created_s: float
    text: str
