"""ChatForm: POST /v1/chat/completions between the wire and a generation: its requests, its frames, its whole body.

Place in a request's way: steps 3 and 11.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

import orjson

from engine.messages import TokenLogprob
from engine.request import GenerationRequest
from engine.stream import Delta, Finish
from server.generation import Event
from server.logprobs import TokenBytes, chat_logprobs
from server.replies import Collected, Head, usage, usage_of
from server.schemas import ChatRequest
from server.sse import Frames
from server.state import ServerState
from server.tools import Call, CallReader, may_call
from server.translate import Origin, translate_chat

_CONTINUES = b',"finish_reason":null}'


class ChatForm:
    id_prefix = "chatcmpl"

    def __init__(self, request: ChatRequest, head: Head, state: ServerState) -> None:
        self._request = request
        self._head = head
        self._state = state

    async def translate(self, origin: Origin) -> tuple[GenerationRequest, ...]:
        return await translate_chat(self._request, origin, self._state)

    def body(self, choices: Sequence[Collected], requests: Sequence[GenerationRequest]) -> dict[str, object]:
        """The whole response."""
        return {
            **self._head.fields("chat.completion"),
            "choices": [
                {"index": i, **self._served_by(requests[i]), **self._choice(choice)}
                for i, choice in enumerate(choices)
            ],
            "usage": usage_of([choice.end for choice in choices], self._request.n),
        }

    def _served_by(self, request: GenerationRequest) -> dict[str, str]:
        """Each choice names who answered, where several did."""
        return {} if self._request.fan_out is None else {"adapter": str(request.adapter)}

    def _choice(self, choice: Collected) -> dict[str, object]:
        text, calls = self._read("".join(choice.text))
        message: dict[str, object] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = [call.as_object() for call in calls]
        return {
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": finish_reason(choice.end, len(calls)),
            "stop_reason": choice.end.stop,
        }

    def _read(self, text: str) -> tuple[str, list[Call]]:
        if not may_call(self._request):
            return text, []
        reader = CallReader(self._request.parallel_tool_calls)
        items = [*reader.feed(text), *reader.finish()]
        return (
            "".join(item for item in items if isinstance(item, str)),
            [item for item in items if isinstance(item, Call)],
        )

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, object] | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(logprobs, self._request.top_logprobs, self._state.processor.token_bytes)

    async def frames(
        self, events: AsyncIterator[Event], requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[bytes]:
        """The stream's frames, up to usage; the end mark is not among them."""
        request = self._request
        frames = Frames(self._head, "chat.completion.chunk", includes_usage=request.includes_usage)
        token_bytes = self._state.processor.token_bytes
        choices = [
            ChatChoice({"index": i, **self._served_by(each)}, request, token_bytes)
            for i, each in enumerate(requests)
        ]
        num_prompt_tokens = sum(len(each.prompt.ids) for each in requests[:: request.n])
        num_tokens = 0
        counts_along = request.includes_running_usage
        finishes: dict[int, Finish] = {}
        yield b"".join(frames.choice(choice.opening()) for choice in choices)
        async for index, item in events:
            if isinstance(item, Finish):
                finishes[index] = item
            else:
                num_tokens += len(item.token_ids)
            running = None
            if counts_along:
                running = usage(prompt_tokens=num_prompt_tokens, completion_tokens=num_tokens)
            for choice in choices[index].take(item):
                yield frames.choice(choice, running)
        if request.includes_usage:
            yield frames.usage(usage_of([finishes[i] for i in range(len(requests))], request.n))


class ChatChoice:
    """One choice of a stream: events in, its JSON out."""

    def __init__(self, fields: Mapping[str, object], request: ChatRequest, token_bytes: TokenBytes) -> None:
        """``fields`` begin each of its frames: its index first."""
        self._begin = orjson.dumps(fields)[:-1] + b',"delta":'
        self._reader = CallReader(request.parallel_tool_calls) if may_call(request) else None
        self._num_top = request.num_logprobs
        self._token_bytes = token_bytes

    def opening(self) -> bytes:
        return self._begin + b'{"role":"assistant","content":""},"logprobs":null' + _CONTINUES

    def take(self, item: Delta | Finish) -> list[bytes]:
        return self._end(item) if isinstance(item, Finish) else self._piece(item)

    def _piece(self, delta: Delta) -> list[bytes]:
        logprobs = self._logprobs(delta.logprobs)
        if self._reader is None:
            return [self._content(delta.text, logprobs)] if delta.text or delta.logprobs else []
        pieces = [self._item(item) for item in self._reader.feed(delta.text)]
        if not pieces and delta.logprobs:
            pieces = [b'{"content":""}']  # its text is held back, its tokens are not
        return [
            self._begin + piece + b',"logprobs":' + (b"null" if i else logprobs) + _CONTINUES
            for i, piece in enumerate(pieces)
        ]

    def _content(self, text: str, logprobs: bytes) -> bytes:
        return self._begin + b'{"content":' + orjson.dumps(text) + b'},"logprobs":' + logprobs + _CONTINUES

    def _item(self, item: str | Call) -> bytes:
        if isinstance(item, str):
            return b'{"content":' + orjson.dumps(item) + b"}"
        return orjson.dumps({"tool_calls": [{"index": item.index, **item.as_object()}]})

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> bytes:
        if self._num_top is None or not logprobs:
            return b"null"
        return orjson.dumps(chat_logprobs(logprobs, self._num_top, self._token_bytes))

    def _end(self, finish: Finish) -> list[bytes]:
        rest = [] if self._reader is None else [self._item(item) for item in self._reader.finish()]
        num_calls = self._reader.num_calls if self._reader is not None else 0
        reason = orjson.dumps(finish_reason(finish, num_calls))
        stop = orjson.dumps(finish.stop)
        return [
            *(self._begin + piece + b',"logprobs":null' + _CONTINUES for piece in rest),
            self._begin + b'{},"logprobs":null,"finish_reason":' + reason + b',"stop_reason":' + stop + b"}",
        ]


def finish_reason(finish: Finish, num_calls: int) -> str:
    """``tool_calls`` where the model called and ended by itself; a cut answer stays ``length``."""
    return "tool_calls" if num_calls and finish.reason == "stop" else finish.reason
