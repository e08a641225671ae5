"""Quotas: how many tokens a key may have in a minute; 429 before any work, and an honest time to come back.

Owns one budget for each key that has a quota. Prompts are charged when they are accepted, answers token by token as
they come; a prompt counts once, however many choices it has. Place in a request's way: steps 1 and 11.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from engine.stream import Delta, Finish
from server.budgets import TokenBudget
from server.errors import WireError

if TYPE_CHECKING:
    from engine.request import GenerationRequest
    from server.keys import Caller

Event = tuple[int, Delta | Finish]
"""Which choice, and what came."""


class Quotas:
    """Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._budgets: dict[str, TokenBudget] = {}

    def require_room(self, caller: Caller) -> None:
        """Raises WireError 429 rate_limited with Retry-After while the key has nothing left."""
        budget = self._budget(caller)
        wait_s = 0.0 if budget is None else budget.wait_s()
        if wait_s > 0:
            raise WireError(
                429,
                "rate_limited",
                f"this key may have {caller.tokens_per_minute} tokens a minute and has spent them: "
                f"come back in {math.ceil(wait_s)} s",
                headers={"retry-after": str(math.ceil(wait_s))},
            )

    def metered(
        self, events: AsyncIterator[Event], requests: Sequence[GenerationRequest], caller: Caller
    ) -> AsyncIterator[Event]:
        """The same events, each charged to the caller."""
        budget = self._budget(caller)
        return events if budget is None else _charged(events, requests, budget)

    def _budget(self, caller: Caller) -> TokenBudget | None:
        if caller.tokens_per_minute is None:
            return None
        budget = self._budgets.get(caller.name)
        if budget is None:
            budget = self._budgets[caller.name] = TokenBudget(caller.tokens_per_minute, self._clock)
        return budget


async def _charged(
    events: AsyncIterator[Event], requests: Sequence[GenerationRequest], budget: TokenBudget
) -> AsyncIterator[Event]:
    prompts = {id(request.prompt): len(request.prompt.ids) for request in requests}
    budget.spend(sum(prompts.values()))
    async for event in events:
        if not isinstance(event[1], Finish):
            budget.spend(len(event[1].token_ids))
        yield event
