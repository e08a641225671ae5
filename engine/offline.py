"""OfflineEngine: a synchronous door to the very engine that serves, for whoever judges an adapter before it is served.

Owns the life of one engine over a base that somebody else uses before and after: the KV memory that the prompts need, a
registry and a store in a temporary folder, and at the end the base's own linears, back in their places. Computes
nothing itself: what it answers is what a server with this base, on this device, answers. Fits training's ``Generator``.

Place in a request's way: beside the server's routes; it submits as they do. One thread at a time, outside event loops.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from adapters.layer import detach
from adapters.package import package_digest
from adapters.ref import BASE, AdapterRef
from adapters.registry import Registry
from adapters.sites import discover_sites
from adapters.validation import Limits
from base.config import CpuAdapters
from base.model import BaseModel
from base.prompt import PromptInputs
from engine.build import build_engine
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.kv import kv_bytes_per_token
from engine.reading import Stream
from engine.request import GenerationRequest
from engine.sampling import SamplingParams
from engine.stream import Delta

NUM_SLOTS = 2
"""One adapter is judged at a time; the second slot takes the next while the first is still held."""
MAX_RANK = 1024
"""A check of last resort: what a server allows is its own to say, and nobody trains this much."""
MAX_PACKAGE_BYTES = 16 << 30
FEW_TOKENS = 4096
"""KV room that is taken at once, where the bound allows it, so that a few short prompts build one engine, not many."""
_ANYWHERE = Path("/")
"""The folders are the caller's own; a hub cache's snapshot is links into its neighbour ``blobs``."""


class OfflineEngine:
    """Until ``close`` the base's linears are the engine's. Afterwards another may be made over the same base."""

    def __init__(
        self,
        base: BaseModel,
        *,
        kv_bytes: int = 512 << 20,
        scratch: Path | None = None,
        cpu_adapters: CpuAdapters = "auto",
    ) -> None:
        """Cheap: the engine is built at the first question, when it is known how long the prompts are.

        ``kv_bytes`` bounds the KV memory unless a single prompt needs more; ``scratch`` is where packages are copied
        while it lives (the system's temporary folder, if not given). ``cpu_adapters`` as a server's: with ``torch`` a
        CPU adds adapters by the products that PEFT would use.
        """
        self._base = base
        self._kv_bytes = kv_bytes
        self._cpu_adapters: CpuAdapters = cpu_adapters
        self._folder = tempfile.TemporaryDirectory(prefix="lorikeet-offline-", dir=scratch)
        limits = Limits(max_rank=MAX_RANK, max_package_bytes=MAX_PACKAGE_BYTES)
        self._registry = Registry(
            Path(self._folder.name),
            discover_sites(base.module),
            limits,
            [base.spec.name],
            base_fingerprint=base.spec.fingerprint,
        )
        self._refs: dict[str, AdapterRef] = {}
        self._client: EngineClient | None = None
        self._num_kv_tokens = 0
        self._numbers = itertools.count()
        self._is_closed = False

    # ---- questions ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[PromptInputs],
        adapter: Path | None,
        *,
        max_tokens: int,
        on_answer: Callable[[], None] | None = None,
    ) -> list[tuple[int, ...]]:
        """Each prompt's greedy answer as ids, end token excluded, in the prompts' order; all in one continuous batch.

        ``adapter`` is a package's folder, checked as a server checks it; None is the base. ``on_answer`` is called as
        each ends. Raises AdapterError when the package is refused, EngineError when a prompt cannot be answered.
        """
        self._require_open()
        if not prompts:
            return []
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return self._ask(prompts, adapter, sampling, on_answer)

    def last_logits(self, prompt: PromptInputs, adapter: Path | None) -> Tensor:
        """[V] float32 on the CPU: what follows the prompt's last token, as the engine computes it when alone.

        Raises as ``generate``.
        """
        self._require_open()
        taken: list[Tensor] = []
        # a token is always chosen, so whatever ends an answer cannot end it before it began
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        self._ask([prompt], adapter, sampling, None, lambda row: taken.append(row.float().cpu().clone()))
        return taken[-1]

    def _ask(
        self,
        prompts: Sequence[PromptInputs],
        adapter: Path | None,
        sampling: SamplingParams,
        on_answer: Callable[[], None] | None,
        on_logits: Callable[[Tensor], None] | None = None,
    ) -> list[tuple[int, ...]]:
        client = self._engine_for(prompts, sampling.max_tokens)
        ref = BASE if adapter is None else self._ref(adapter)
        requests = [
            GenerationRequest(
                f"offline-{next(self._numbers)}", prompt, ref, sampling, time.monotonic(), on_logits=on_logits
            )
            for prompt in prompts
        ]
        return asyncio.run(_answers(client, ref, requests, on_answer))

    # ---- adapters ----------------------------------------------------------------------------------------------

    def _ref(self, folder: Path) -> AdapterRef:
        """What the folder holds now; registered when that is new. Raises AdapterError."""
        try:
            digest = package_digest(folder, _ANYWHERE)
        except OSError:
            digest = ""  # the registry says what is wrong with it
        if digest not in self._refs:
            name = f"judged-{len(self._refs)}"
            entry, _ = self._registry.register(name, folder, within=_ANYWHERE)
            self._refs[entry.ref.digest] = entry.ref
            return entry.ref
        return self._refs[digest]

    # ---- the engine's life -------------------------------------------------------------------------------------

    def _engine_for(self, prompts: Sequence[PromptInputs], max_tokens: int) -> EngineClient:
        """The engine, with KV room for the longest prompt and its answer, and for all together where that fits."""
        sizes = [self._num_tokens(prompt, max_tokens) for prompt in prompts]
        bound = self._kv_bytes // kv_bytes_per_token(self._base.spec, self._base.dtype)
        wanted = _in_blocks(max(*sizes, min(max(sum(sizes), FEW_TOKENS), bound)))
        if self._client is None or wanted > self._num_kv_tokens:
            self._stop()
            self._num_kv_tokens = wanted
            self._client = self._build()
        return self._client

    def _build(self) -> EngineClient:
        try:
            return build_engine(self._base, self._registry, self._config())
        except BaseException:
            detach(self._base.module)  # no memory for the KV, say: the base must not stay half wrapped
            raise

    def _num_tokens(self, prompt: PromptInputs, max_tokens: int) -> int:
        """KV rows that a request may come to take, in whole blocks; the engine refuses what the base cannot hold."""
        return _in_blocks(min(len(prompt.ids) + max_tokens, self._base.spec.max_positions))

    def _config(self) -> EngineConfig:
        """A server's, but for the memory, and a queue that takes every prompt there is."""
        return EngineConfig(
            num_slots=NUM_SLOTS,
            max_rank=MAX_RANK,
            kv_bytes=self._num_kv_tokens * kv_bytes_per_token(self._base.spec, self._base.dtype),
            max_waiting=sys.maxsize,
            max_waiting_tokens=sys.maxsize,
            host_adapter_bytes=0,  # the store is as near
            cpu_adapters=self._cpu_adapters,
        )

    def _stop(self) -> None:
        """The engine's thread ends, and the base is as it was; nothing happens when none was built."""
        client, self._client = self._client, None
        if client is None:
            return
        client.close()
        detach(self._base.module)
        del client
        gc.collect()  # engine and mover refer to each other, and to the KV memory

    def _require_open(self) -> None:
        if self._is_closed:
            raise ValueError("this offline engine is closed; make another over the same base")

    def close(self) -> None:
        """End the engine, put the base's own linears back, remove what was written. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop()
        self._registry.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _in_blocks(num_tokens: int) -> int:
    """Rounded up to whole blocks of the engine's."""
    block_size = EngineConfig().block_size
    return -(-num_tokens // block_size) * block_size


async def _answers(
    client: EngineClient,
    ref: AdapterRef,
    requests: Sequence[GenerationRequest],
    on_answer: Callable[[], None] | None,
) -> list[tuple[int, ...]]:
    """All requests at once; the first that fails ends the others."""
    if not ref.is_base:
        await client.load_adapter(ref)
    streams: list[Stream] = []
    try:
        for request in requests:
            streams.append(client.submit(request))
        return list(await asyncio.gather(*(_gather(stream, on_answer) for stream in streams)))
    finally:
        for stream in streams:
            stream.abort()


async def _gather(stream: Stream, on_answer: Callable[[], None] | None) -> tuple[int, ...]:
    ids: list[int] = []
    async for item in stream:
        if isinstance(item, Delta):
            ids += item.token_ids
    if on_answer is not None:
        on_answer()
    return tuple(ids)
