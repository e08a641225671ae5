"""Wire messages and prompts -> PromptInputs: pictures loaded, text checked, and the processor run off the event loop.

What is too long whatever its tokens is refused before it is tokenised. Knows the processor; knows nothing of sampling
or of the engine. Place in a request's way: step 3.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

from base.errors import PromptError
from base.prompt import ImagePart, Message, PromptInputs, TextPart, ToolCall
from server.errors import WireError, to_wire
from server.media import PixelRange
from server.profiles import NO_PROFILE, Profile
from server.schemas import ChatRequest
from server.schemas.messages import AssistantMessage, ChatMessage, ImageContent, TextContent, ToolMessage
from server.state import ServerState

T = TypeVar("T")

NUM_PREPARERS = 2
"""Worker threads: tokenising and patching hold the interpreter for part of their time; more would only interleave."""
MAX_TOKEN_CHARS = 256
"""No token of these bases is longer; so text of so many times the context cannot fit, whatever its tokens are."""

_preparers: RunVar[CapacityLimiter] = RunVar("lorikeet_preparers")
Images = dict[tuple[int, int], ImagePart]
"""By message and part."""


def num_waiting_for_preparers() -> int:
    return _limiter().statistics().tasks_waiting


async def chat_prompt(
    request: ChatRequest, state: ServerState, profile: Profile = NO_PROFILE
) -> PromptInputs:
    """Raises WireError naming the part at fault."""
    system = profile.system_for(request)
    num_chars = _num_chars(request.messages) + len(system or "")
    check_length(num_chars, state.max_model_len, "messages")
    images = await _load_images(request.messages, state, (profile.min_pixels, profile.max_pixels))
    first = [] if system is None else [Message("system", (TextPart(system),))]
    tools = (
        []
        if request.tool_choice == "none"
        else [tool.model_dump(exclude_none=True) for tool in request.tools]
    )
    prepare = partial(
        state.processor.prepare_chat,
        [*first, *(_message(i, message, images) for i, message in enumerate(request.messages))],
        tools=tools,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )
    return await off_loop(prepare, "messages")


async def text_prompt(prompt: str | list[int], state: ServerState, param: str = "prompt") -> PromptInputs:
    """A completion's prompt: text without a template, or ids. Raises WireError."""
    if isinstance(prompt, str):
        check_length(len(prompt), state.max_model_len, param)
        return await off_loop(partial(state.processor.prepare_text, prompt), param)
    check_length(len(prompt) * MAX_TOKEN_CHARS, state.max_model_len, param)
    return await off_loop(partial(state.processor.prepare_ids, prompt), param)


# ---- messages --------------------------------------------------------------------------------------------------


async def _load_images(messages: Sequence[ChatMessage], state: ServerState, usual: PixelRange) -> Images:
    """All pictures of a request, at once; the first that is refused ends the others."""
    wanted = [
        (i, j, part)
        for i, message in enumerate(messages)
        if not isinstance(message.content, str)
        for j, part in enumerate(message.content or ())
        if isinstance(part, ImageContent)
    ]
    if not wanted:
        return {}
    budget = state.media.budget()

    async def load(i: int, j: int, part: ImageContent) -> ImagePart:
        try:
            return await state.media.load(part.url, part.detail, budget, usual)
        except Exception as error:
            raise to_wire(error).with_param(f"messages[{i}].content[{j}].image_url") from error

    try:
        async with asyncio.TaskGroup() as group:
            tasks = {(i, j): group.create_task(load(i, j, part)) for i, j, part in wanted}
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return {place: task.result() for place, task in tasks.items()}


def _message(index: int, message: ChatMessage, images: Images) -> Message:
    calls: tuple[ToolCall, ...] = ()
    if isinstance(message, AssistantMessage):
        calls = tuple(
            ToolCall(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls or ()
        )
    return Message(
        role="system" if message.role == "developer" else message.role,
        parts=_parts(index, message, images),
        tool_calls=calls,
        tool_call_id=message.tool_call_id if isinstance(message, ToolMessage) else None,
    )


def _parts(index: int, message: ChatMessage, images: Images) -> tuple[TextPart | ImagePart, ...]:
    if message.content is None:
        return ()
    if isinstance(message.content, str):
        return (TextPart(message.content),)
    return tuple(
        TextPart(part.text) if isinstance(part, TextContent) else images[index, j]
        for j, part in enumerate(message.content)
    )


# ---- lengths and threads ---------------------------------------------------------------------------------------


def _num_chars(messages: Sequence[ChatMessage]) -> int:
    return sum(
        len(message.content)
        if isinstance(message.content, str)
        else sum(len(part.text) for part in message.content or () if isinstance(part, TextContent))
        for message in messages
    )


def check_length(num_chars: int, max_model_len: int, param: str) -> None:
    """Raises WireError 400 context_length_exceeded for text that no tokens could make fit."""
    least = math.ceil(num_chars / MAX_TOKEN_CHARS)
    if least > max_model_len:
        raise WireError(
            400,
            "context_length_exceeded",
            f"this model's context is {max_model_len} tokens; the prompt has {least} at the very least: shorten it",
            param=param,
        )


async def off_loop(work: Callable[[], T], param: str) -> T:
    """``work`` in one of the few worker threads. The processor's errors become WireErrors that name ``param``."""
    try:
        return await anyio.to_thread.run_sync(work, limiter=_limiter())
    except PromptError as error:
        raise to_wire(error).with_param(param) from error


def _limiter() -> CapacityLimiter:
    """One for each event loop."""
    try:
        return _preparers.get()
    except LookupError:
        limiter = CapacityLimiter(NUM_PREPARERS)
        _preparers.set(limiter)
        return limiter
