"""Requests and sequences made of plain numbers, for tests that need no model."""

from __future__ import annotations

import torch

from adapters.ref import BASE, AdapterRef
from base.prompt import PromptImage, PromptInputs
from engine.request import GenerationRequest
from engine.sampler import SamplerState
from engine.sampling import SamplingParams
from engine.sequence import Sequence

VOCAB_SIZE = 64


def ref(name: str, version: int = 1) -> AdapterRef:
    return AdapterRef(name, version, digest=f"digest-{name}-{version}", language_digest=f"l-{name}-{version}")


def make_prompt(num_tokens: int, images: tuple[PromptImage, ...] = ()) -> PromptInputs:
    positions = torch.arange(num_tokens).expand(3, -1)
    return PromptInputs(tuple(i % VOCAB_SIZE for i in range(num_tokens)), images, positions, 0)


def make_image(name: str, offset: int, num_tokens: int, merge: int = 4) -> PromptImage:
    pixels = torch.zeros(num_tokens * merge, 6)
    return PromptImage(pixels, (1, 2, 2 * num_tokens), name, offset, num_tokens)


def make_request(
    request_id: str = "r",
    num_tokens: int = 5,
    adapter: AdapterRef = BASE,
    images: tuple[PromptImage, ...] = (),
    arrival_s: float = 0.0,
    **params: object,
) -> GenerationRequest:
    sampling = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **params})  # type: ignore[arg-type]
    return GenerationRequest(request_id, make_prompt(num_tokens, images), adapter, sampling, arrival_s)


def make_sequence(
    request_id: str = "r",
    num_tokens: int = 5,
    adapter: AdapterRef = BASE,
    images: tuple[PromptImage, ...] = (),
    arrival_s: float = 0.0,
    **params: object,
) -> Sequence:
    request = make_request(request_id, num_tokens, adapter, images, arrival_s, **params)
    return Sequence(request, SamplerState(request.sampling, request.prompt.ids, (), VOCAB_SIZE))
