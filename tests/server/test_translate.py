"""From wire requests to generation requests: what costs nothing is refused first, pictures load together."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters.ref import BASE
from base.errors import InvalidMessage
from base.prompt import ImagePart
from engine.errors import QueueFull
from server.errors import WireError
from server.prompts import chat_prompt
from server.sampling import max_tokens_for, seed_of
from server.schemas import parse_chat
from server.settings import Settings
from server.state import ServerState
from server.translate import Origin, require_room, translate_chat
from tests.fakes import FakeEngineClient, FakeMedia, FakeProcessor
from tests.support.wire import ask

PICTURES: dict[str, object] = {
    "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": f"data:,{i}"} for i in range(3)]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": "data:,3"}],
        },
    ]
}


class State(SimpleNamespace):
    """As much of a ServerState as translation reads."""

    def __init__(self) -> None:
        super().__init__(
            engine=FakeEngineClient(),
            processor=FakeProcessor(),
            media=FakeMedia(),
            settings=Settings(),
            max_model_len=4096,
        )

    @property
    def whole(self) -> ServerState:
        return cast(ServerState, self)


def translated(state: State, body: dict[str, object]) -> Any:
    origin = Origin("chatcmpl-x", (BASE,), time.monotonic())
    return asyncio.run(translate_chat(parse_chat(body), origin, state.whole))


def refused(state: State, body: dict[str, object]) -> WireError:
    with pytest.raises(WireError) as caught:
        translated(state, body)
    return caught.value


def test_every_choice_shares_one_prompt() -> None:
    state = State()
    first, second = translated(state, ask(n=2))
    assert first.prompt is second.prompt
    assert len(state.processor.chats) == 1
    assert (first.request_id, second.request_id) == ("chatcmpl-x-0", "chatcmpl-x-1")


def test_no_seed_stays_none() -> None:
    assert [each.sampling.seed for each in translated(State(), ask(n=2))] == [None, None]


def test_seeds_wrap_to_64_bits() -> None:
    assert seed_of(2**63 - 1, 1) == -(2**63)
    assert seed_of(-1, 1) == 0
    assert seed_of(None, 1) is None


def test_a_wrong_bias_is_refused_before_pictures_are_loaded() -> None:
    state = State()
    for bias in ({"99999999": 1}, {"x": 1}, {"-1": 1}, {"٣": 1}, {"1" * 50: 1}):
        assert refused(state, {**PICTURES, "logit_bias": bias}).param == "logit_bias"
    assert state.media.loads == []


def test_a_stop_token_that_the_base_lacks_is_the_clients_mistake() -> None:
    assert refused(State(), ask(stop_token_ids=[2**63 - 1])).param == "stop_token_ids"


def test_a_wrong_schema_is_refused_before_pictures_are_loaded() -> None:
    state = State()
    schema = {"type": "string", "description": "x" * 200_000}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert refused(state, {**PICTURES, "response_format": form}).param == "response_format"
    assert state.media.loads == []


def test_min_tokens_over_the_limit_is_refused() -> None:
    assert refused(State(), ask(min_tokens=6, max_tokens=5)).param == "min_tokens"


def test_the_context_is_told_in_numbers() -> None:
    assert max_tokens_for(10, None, 16, "messages") == 6
    assert max_tokens_for(10, 6, 16, "messages") == 6
    for num_prompt, wanted in ((10, 7), (16, None), (20, 1)):
        with pytest.raises(WireError) as caught:
            max_tokens_for(num_prompt, wanted, 16, "messages")
        assert caught.value.code == "context_length_exceeded"
        assert "16" in caught.value.message
        assert str(num_prompt) in caught.value.message


def test_the_processors_refusal_is_a_400_for_messages() -> None:
    state = State()
    state.processor.failure = InvalidMessage("two systems")
    error = refused(state, ask())
    assert (error.status, error.code, error.param) == (400, "invalid_request", "messages")


class TogetherMedia(FakeMedia):
    """Each picture waits until all four have been asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.all_asked = asyncio.Event()
        self.num_cancelled = 0

    async def load(
        self, url: str, detail: str = "auto", budget: object = None, usual: object = None
    ) -> ImagePart:
        part = await super().load(url, detail, budget)
        if len(self.loads) == 4:
            self.all_asked.set()
        try:
            await self.all_asked.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return part


def test_pictures_load_together_and_stay_in_order() -> None:
    state = State()
    state.media = TogetherMedia()
    prompt = asyncio.run(chat_prompt(parse_chat(PICTURES), state.whole))
    assert state.media.loads == [(f"data:,{i}", "auto") for i in range(4)]
    assert [image.offset for image in prompt.images] == [5, 9, 13, 23]


def test_the_first_refused_picture_ends_the_others() -> None:
    class Media(TogetherMedia):
        async def load(
            self, url: str, detail: str = "auto", budget: object = None, usual: object = None
        ) -> ImagePart:
            if url.endswith("2"):
                raise WireError(400, "invalid_image", "bad")
            return await super().load(url, detail, budget)

    state = State()
    state.media = Media()
    error = refused(state, PICTURES)
    assert (error.code, error.param) == ("invalid_image", "messages[0].content[2].image_url")
    assert state.media.num_cancelled == 3


def test_room_is_counted_over_all_adapters() -> None:
    state = State()

    async def check() -> None:
        require_room(state.whole)

    asyncio.run(check())
    state.engine.waiting = {"base": 128, "french": 128}
    with pytest.raises(QueueFull):
        asyncio.run(check())
