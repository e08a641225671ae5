"""A whole engine over a real base, for tests: submit chats, gather what came back."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from PIL import Image

from adapters.composition import compose
from adapters.ref import BASE, AdapterRef
from adapters.registry import Registry
from adapters.sites import discover_sites
from adapters.validation import Limits
from base.config import BaseConfig, CpuLinear, CudaKernels
from base.loader import load_base
from base.prompt import ImagePart, Message, PromptInputs, TextPart
from engine.build import build_engine
from engine.config import DEFAULT_KV_BYTES, EngineConfig
from engine.engine import Engine
from engine.observer import Event
from engine.reading import Stream
from engine.request import GenerationRequest
from engine.sampling import SamplingParams
from engine.stream import Delta, Finish
from engine.transport import ThreadTransport

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat turn for one adapter; ``adapter`` None is the base."""

    text: str
    adapter: str | None = None
    images: tuple[Image.Image, ...] = ()
    num_tokens: int = 12


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    finish: Finish


class Recorder:
    """An observer that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)


class Rig:
    """Base, registry and engine in one; ``close`` it. Asks run their full length: end tokens are ordinary ones."""

    def __init__(
        self,
        checkpoint: str,
        state: Path,
        config: EngineConfig | None = None,
        device: str = "cpu",
        cpu_linear: CpuLinear = "auto",
        cuda_kernels: CudaKernels = "auto",
    ) -> None:
        self.base = load_base(
            BaseConfig(source=checkpoint, device=device, cpu_linear=cpu_linear, cuda_kernels=cuda_kernels)
        )
        self.sites = discover_sites(self.base.module)
        self.registry = Registry(state, self.sites, Limits(), [self.base.spec.name])
        self.recorder = Recorder()
        self.compositions: dict[str, AdapterRef] = {}
        chosen = config or EngineConfig()
        if chosen.kv_bytes is None:
            chosen = replace(chosen, kv_bytes=DEFAULT_KV_BYTES)  # several rigs share one GPU
        self.engine = build_engine(self.base, self.registry, chosen, self.recorder)

    def register(self, packages: Mapping[str, Path]) -> None:
        for name, folder in packages.items():
            self.registry.register(name, folder)

    def compose(self, name: str, weights: Mapping[str, float]) -> None:
        """From here on asks may name the composition as if it were an adapter."""
        self.compositions[name] = compose((self.registry.resolve(each), weights[each]) for each in weights)

    def prompt(self, ask: Ask) -> PromptInputs:
        pictures = tuple(ImagePart(image) for image in ask.images)
        return self.base.processor.prepare_chat([Message("user", (*pictures, TextPart(ask.text)))])

    def ref(self, ask: Ask) -> AdapterRef:
        if ask.adapter is None:
            return BASE
        return self.compositions.get(ask.adapter) or self.registry.resolve(ask.adapter)

    def request(self, ask: Ask, **params: object) -> GenerationRequest:
        settings = {"max_tokens": ask.num_tokens, "temperature": 0.0, "ignore_eos": True, **params}
        sampling = SamplingParams(**settings)  # type: ignore[arg-type]
        request_id = f"test-{next(_numbers)}"
        return GenerationRequest(request_id, self.prompt(ask), self.ref(ask), sampling, time.monotonic())

    def submit(self, ask: Ask, **params: object) -> Stream:
        return self.engine.submit(self.request(ask, **params))

    async def answer(self, ask: Ask, **params: object) -> Answer:
        return await gather(self.submit(ask, **params))

    async def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """All at once, in one mixed batch."""
        streams = [self.submit(ask) for ask in asks]
        return list(await asyncio.gather(*(gather(stream) for stream in streams)))

    async def alone(self, asks: Sequence[Ask]) -> list[Answer]:
        """One after the other."""
        return [await self.answer(ask) for ask in asks]

    @property
    def core(self) -> Engine:
        """The engine behind the client, for tests that look inside or plant a fault."""
        return cast(ThreadTransport, self.engine._transport)._engine

    def close(self) -> None:
        self.engine.close()
        self.registry.close()


async def gather(stream: Stream) -> Answer:
    ids: list[int] = []
    text = ""
    finish: Finish | None = None
    async for item in stream:
        if isinstance(item, Delta):
            ids += item.token_ids
            text += item.text
        else:
            finish = item
    if finish is None:
        raise AssertionError("the stream ended without a Finish")
    return Answer(tuple(ids), text, finish)
