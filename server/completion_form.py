"""CompletionForm: POST /v1/completions between the wire and a generation: its requests, its frames, its whole body.

With ``echo`` a choice's text and logprobs begin with the prompt's. Place in a request's way: steps 3 and 11.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import orjson

from engine.messages import TokenLogprob
from engine.request import GenerationRequest
from engine.stream import Delta, Finish
from server.generation import Event
from server.logprobs import CompletionLogprobs
from server.replies import Collected, Head, usage, usage_of
from server.schemas import CompletionRequest
from server.sse import Frames
from server.state import ServerState
from server.translate import Origin, translate_completion

KIND = "text_completion"


class CompletionForm:
    id_prefix = "cmpl"

    def __init__(self, request: CompletionRequest, head: Head, state: ServerState) -> None:
        self._request = request
        self._head = head
        self._state = state

    async def translate(self, origin: Origin) -> tuple[GenerationRequest, ...]:
        return await translate_completion(self._request, origin, self._state)

    def body(self, choices: Sequence[Collected], requests: Sequence[GenerationRequest]) -> dict[str, object]:
        """The whole response."""
        return {
            **self._head.fields(KIND),
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": self._usage([choice.end for choice in choices]),
        }

    def _choice(self, index: int, choice: Collected) -> dict[str, object]:
        writer = self._writer(index)
        delta = Delta(
            "".join(choice.text), tuple(choice.token_ids), tuple(choice.logprobs), choice.prompt_logprobs
        )
        text, logprobs = writer.take(delta)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason(choice.end),
            "stop_reason": choice.end.stop,
        }

    def _writer(self, index: int) -> CompletionChoice:
        prompt = self._request.prompts[index // self._request.n]
        return CompletionChoice(prompt, self._request, self._state)

    def _finish_reason(self, finish: Finish) -> str:
        """With ``max_tokens: 0`` the limit is what ended it, whatever the one token was."""
        return "length" if self._request.is_echo_only else finish.reason

    def _usage(self, finishes: Sequence[Finish]) -> dict[str, object]:
        counted = usage_of(finishes, self._request.n)
        if self._request.is_echo_only:
            prompt_tokens = counted["prompt_tokens"]
            counted |= {"completion_tokens": 0, "total_tokens": prompt_tokens}
        return counted

    async def frames(
        self, events: AsyncIterator[Event], requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[bytes]:
        """The stream's frames, up to usage; the end mark is not among them."""
        request = self._request
        frames = Frames(self._head, KIND, includes_usage=request.includes_usage)
        writers = [self._writer(i) for i in range(len(requests))]
        num_prompt_tokens = sum(len(each.prompt.ids) for each in requests[:: request.n])
        num_tokens = 0
        counts_along = request.includes_running_usage
        finishes: dict[int, Finish] = {}
        async for index, item in events:
            if isinstance(item, Finish):
                finishes[index] = item
                piece = self._end(index, item, writers[index])
            else:
                num_tokens += 0 if request.is_echo_only else len(item.token_ids)
                piece = _piece(index, *writers[index].take(item))
            running = None
            if counts_along:
                running = usage(prompt_tokens=num_prompt_tokens, completion_tokens=num_tokens)
            yield frames.choice(piece, running)
        if request.includes_usage:
            yield frames.usage(self._usage([finishes[i] for i in range(len(requests))]))

    def _end(self, index: int, finish: Finish, writer: CompletionChoice) -> bytes:
        return orjson.dumps(
            {
                "index": index,
                "text": writer.rest(),
                "logprobs": None,
                "finish_reason": self._finish_reason(finish),
                "stop_reason": finish.stop,
            }
        )


def _piece(index: int, text: str, logprobs: dict[str, object] | None) -> bytes:
    return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null,"stop_reason":null}' % (
        index,
        orjson.dumps(text),
        b"null" if logprobs is None else orjson.dumps(logprobs),
    )


class CompletionChoice:
    """One choice: deltas in, its text and logprobs out, the prompt's before its own where they are echoed."""

    def __init__(self, prompt: str | list[int], request: CompletionRequest, state: ServerState) -> None:
        self._prompt = prompt
        self._request = request
        self._processor = state.processor
        self._lists = CompletionLogprobs(state.processor.token_bytes)
        self._has_echoed = not request.echo

    def take(self, delta: Delta) -> tuple[str, dict[str, object] | None]:
        text, ids, logprobs = self.rest(), list[int](), list[TokenLogprob | None]()
        if delta.prompt_logprobs is not None:
            ids += self._prompt_ids()
            logprobs += delta.prompt_logprobs
        if not self._request.is_echo_only:
            text += delta.text
            ids += delta.token_ids
            logprobs += delta.logprobs
        if self._request.logprobs is None:
            return text, None
        return text, self._lists.add(ids, logprobs, self._request.logprobs)

    def rest(self) -> str:
        """The prompt's text, once, where it is echoed."""
        if self._has_echoed:
            return ""
        self._has_echoed = True
        if isinstance(self._prompt, str):
            return self._prompt
        return self._processor.decode(self._prompt, skip_special_tokens=False)

    def _prompt_ids(self) -> Sequence[int]:
        return self._processor.encode(self._prompt) if isinstance(self._prompt, str) else self._prompt
