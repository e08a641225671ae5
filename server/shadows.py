"""Shadows: copies of answered requests, asked of another version in idle time, and what the comparison says.

Owns which requests are copied, how many wait, and what comes of each. A copy is made when its primary has been answered
in full, and runs in the engine's background: only while no client's request runs or waits. What it says is compared and
forgotten; no client is ever sent it. Place in a request's way: beside it, after step 12.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from adapters.errors import AdapterError
from adapters.ref import AdapterRef
from engine.errors import DeadlineExceeded, Draining, EngineError, QueueFull
from engine.messages import Timings
from engine.request import GenerationRequest
from engine.stream import Delta, Finish
from server.budgets import TokenBudget
from server.shadow_series import ShadowSeries
from server.splitting import Draw, Side

if TYPE_CHECKING:
    from adapters.leases import Lease

logger = logging.getLogger("lorikeet.server")

Outcome = Literal["same", "different", "unpaired", "dropped", "failed"]
MAX_PENDING = 8
"""Copies that wait or run at once; each keeps its prompt's pictures in memory."""
MAX_PENDING_TOKENS = 65_536
TIMEOUT_S = 60.0
"""A copy that has found no idle time by then is dropped."""


Event = tuple[int, Delta | Finish]
"""Which choice, and what came."""


class Asked(Protocol):
    def __aiter__(self) -> AsyncIterator[Delta | Finish]: ...

    def abort(self) -> None: ...


class Asks(Protocol):
    def submit(self, request: GenerationRequest) -> Asked: ...


class Leases(Protocol):
    def lease(self, ref: AdapterRef) -> Lease: ...


class Background(Protocol):
    def start(self, work: Coroutine[None, None, None]) -> None: ...


class HasSeries(Protocol):
    shadows: ShadowSeries


class House(Protocol):
    """The server's state, as far as a copy needs it."""

    @property
    def engine(self) -> Asks: ...

    @property
    def registry(self) -> Leases: ...

    @property
    def background(self) -> Background: ...

    @property
    def metrics(self) -> HasSeries: ...


@dataclass(slots=True)
class Answer:
    """What one choice came to."""

    token_ids: list[int] = field(default_factory=list)
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """One request that is to be asked again, once it is answered."""

    alias: str
    side: Side
    answer: Answer = field(default_factory=Answer)


class Shadows:
    """Belongs to one event loop. ``draw`` is uniform in [0, 1)."""

    def __init__(
        self, draw: Callable[[], float] = random.random, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._draw = draw
        self._clock = clock
        self._pending: dict[str, int] = {}
        self._budgets: dict[str, TokenBudget] = {}

    def copy_of(self, draw: Draw, adapters: Sequence[AdapterRef]) -> Copy | None:
        """Whether a request is to be copied. Of several adapters side by side none is."""
        found = draw.shadow_of(adapters[0]) if len(adapters) == 1 else None
        if found is None or found[1].terms is None or self._draw() >= found[1].terms.share:
            return None
        return Copy(*found)

    def follow(
        self,
        events: AsyncIterator[Event],
        requests: Sequence[GenerationRequest],
        copy: Copy | None,
        house: House,
    ) -> AsyncIterator[Event]:
        """The same events; after the last of them the copy of the first choice, if any, is sent on its way."""
        return events if copy is None else self._followed(events, requests[0], copy, house)

    async def _followed(
        self, events: AsyncIterator[Event], request: GenerationRequest, copy: Copy, house: House
    ) -> AsyncIterator[Event]:
        async for index, item in events:
            if index == 0:
                if isinstance(item, Finish):
                    copy.answer.timings = item.timings
                else:
                    copy.answer.token_ids += item.token_ids
            yield index, item
        if copy.answer.timings is not None:
            self._offer(copy, request, house)

    def _offer(self, copy: Copy, request: GenerationRequest, house: House) -> None:
        num_tokens = len(request.prompt.ids)
        is_full = len(self._pending) >= MAX_PENDING
        is_full = is_full or sum(self._pending.values()) + num_tokens > MAX_PENDING_TOKENS
        budget = self._budget(copy)
        if is_full or (budget is not None and budget.wait_s() > 0):
            house.metrics.shadows.count(copy.side.primary, "dropped")
            return
        self._pending[request.request_id] = num_tokens
        house.background.start(self._run(copy, request, house))

    def _budget(self, copy: Copy) -> TokenBudget | None:
        limit = copy.side.terms.tokens_per_minute if copy.side.terms is not None else None
        if limit is None:
            self._budgets.pop(copy.alias, None)
            return None
        budget = self._budgets.get(copy.alias)
        if budget is None or budget.tokens_per_minute != limit:
            budget = self._budgets[copy.alias] = TokenBudget(limit, self._clock)
        return budget

    async def _run(self, copy: Copy, request: GenerationRequest, house: House) -> None:
        primary = copy.side.primary
        outcome: Outcome = "failed"
        try:
            answer = await _ask(copy, request, house)
            budget = self._budget(copy)
            if budget is not None:
                budget.spend(len(request.prompt.ids) + len(answer.token_ids))
            outcome = _compare(copy, answer, request, house)
        except (QueueFull, DeadlineExceeded, Draining, asyncio.CancelledError):
            outcome = "dropped"
        except (EngineError, AdapterError) as error:
            logger.warning("shadow.failed ref=%s error=%s", copy.side.shadow, type(error).__name__)
        finally:
            del self._pending[request.request_id]
            house.metrics.shadows.count(primary, outcome)


async def _ask(copy: Copy, request: GenerationRequest, house: House) -> Answer:
    if copy.side.shadow is None:
        raise RuntimeError("a copy without a shadow")
    answer = Answer()
    with house.registry.lease(copy.side.shadow):
        stream = house.engine.submit(_copied(request, copy.side.shadow))
        try:
            async for item in stream:
                if isinstance(item, Finish):
                    answer.timings = item.timings
                else:
                    answer.token_ids += item.token_ids
        finally:
            stream.abort()
    return answer


def _copied(request: GenerationRequest, shadow: AdapterRef) -> GenerationRequest:
    """The same prompt and parameters: what is compared is the weights alone."""
    return replace(
        request,
        request_id=f"shadow-{request.request_id}",
        adapter=shadow,
        arrival_s=time.monotonic(),
        queue_timeout_s=TIMEOUT_S,
        total_timeout_s=TIMEOUT_S,
        is_background=True,
    )


def _compare(copy: Copy, answer: Answer, request: GenerationRequest, house: House) -> Outcome:
    """Agreement, where chance has no part in the answers; seconds, where nothing interrupted them."""
    primary, series = copy.side.primary, house.metrics.shadows
    for name, timings in (("primary", copy.answer.timings), ("shadow", answer.timings)):
        if timings is not None and timings.num_preemptions == 0:
            series.observe_seconds(primary, name, timings.prefill_s + timings.decode_s)
    sampling = request.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        return "unpaired"
    agreement = shared_prefix(copy.answer.token_ids, answer.token_ids)
    series.observe_agreement(primary, agreement)
    return "same" if agreement == 1.0 else "different"


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> float:
    """The part of the longer answer's tokens up to the first that differs; 1 where nothing does."""
    longest = max(len(one), len(other))
    if longest == 0:
        return 1.0
    same = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return same / longest
