"""DecodeGraphs: steps in which every sequence has one row, recorded once for each bucket of rows and then replayed.

A step that fits takes one launch instead of some hundreds. Each bucket is recorded with adapters and without: a step of
the base alone has no adapter's kernels in it. All that changes from step to step is device data that is refilled in
place: DecodeBuffers here, tile and slot tables in adapters.triton_lora. A bucket that cannot be recorded (no memory, an
operation that may not be) is left to the eager way, with a line in the log; the eager way is also what replays are held
to (tests/engine/test_graphs.py).

Owns: which step fits which recording. Does not know: sampling, which stays outside. Place in a request's way: step 8.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Final

import torch
from torch import Tensor

from adapters.routing import Routing
from adapters.triton_lora import TritonLora
from base.attention import DecodeAttention
from base.model import BaseModel
from engine.decode_buffers import DecodeBuffers
from engine.kv import KVCache
from engine.recorder import Recorder
from engine.sequence import BASE_SLOT
from engine.step import Chunk, StepPlan

logger = logging.getLogger("lorikeet.engine")

BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of rows that steps are padded to; beyond 128 a launch is no longer what a step waits for."""


def buckets_up_to(max_running: int) -> tuple[int, ...]:
    """Those that steps of up to ``max_running`` rows can need, ascending."""
    return tuple(rows for place, rows in enumerate(BUCKETS) if place == 0 or BUCKETS[place - 1] < max_running)


class DecodeGraphs:
    """The engine's thread only."""

    def __init__(
        self,
        base: BaseModel,
        attention: DecodeAttention,
        cache: KVCache,
        routing: Routing,
        lora: TritonLora | None,
        buffers: DecodeBuffers,
    ) -> None:
        """lora: None where adapters are not computed from device tables; steps with adapters are then never replayed.

        ``buffers`` is as large as the largest bucket.
        """
        self._base = base
        self._attention = attention
        self._cache = cache
        self._routing = routing
        self._lora = lora
        self._buffers = buffers
        self._buckets = tuple(rows for rows in BUCKETS if rows <= buffers.num_rows)
        self._replays: dict[tuple[int, bool], Callable[[], None]] = {}
        """By rows, and whether adapters are in it."""

    @property
    def recorded(self) -> tuple[tuple[int, bool], ...]:
        """Rows, and whether adapters are in it, of each recording, in the order in which they were made."""
        return tuple(self._replays)

    @torch.inference_mode()
    def record(self, recorder: Recorder) -> None:
        """Record every bucket, the largest first, so that the smaller ones live in its memory. Once, at start."""
        begin_s = time.monotonic()
        kinds = (False,) if self._lora is None else (True, False)
        for num_rows in reversed(self._buckets):
            for has_adapters in kinds:
                self._record(recorder, num_rows, has_adapters)
        self._routing.clear()
        wanted = len(kinds) * len(self._buckets)
        took_s = time.monotonic() - begin_s
        logger.info("graphs.ready num=%d wanted=%d took_s=%.1f", len(self._replays), wanted, took_s)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor | None:
        """[S, V] float32 logits of the plan's sequences, valid until the next run; None where nothing is recorded that
        fits.

        Raises ValueError if a row is routed to an empty slot.
        """
        chunks = plan.chunks
        slots = [chunk.sequence.slot for chunk in chunks]
        has_adapters = any(slot != BASE_SLOT for slot in slots)
        num_rows = self._bucket(len(chunks))
        replay = self._replays.get((num_rows, has_adapters))
        if replay is None or not self._suits(plan):
            return None
        self._buffers.fill(chunks, num_rows)
        if has_adapters:
            self._route([*slots, *[BASE_SLOT] * (num_rows - len(slots))])
        replay()
        logits = self._buffers.rows(num_rows).logits[: len(chunks)]
        is_kept = any(chunk.sequence.request.on_logits is not None for chunk in chunks)
        return logits.clone() if is_kept else logits

    def _bucket(self, num_rows: int) -> int:
        """The smallest that holds them; 0 where none does."""
        return next((rows for rows in self._buckets if rows >= num_rows), 0)

    def _suits(self, plan: StepPlan) -> bool:
        """Whether each sequence has one row, which is a token and chooses the next one."""
        size, most = self._cache.block_size, self._buffers.max_blocks
        return not plan.image_jobs and all(_is_one_token(c) and c.end <= most * size for c in plan.chunks)

    def _route(self, slots: Seq[int], *, is_open: bool = False) -> None:
        """What a step's linears would do when they are called; a replay has no linears that could."""
        self._routing.fill([(1, slot) for slot in slots], is_open=is_open)
        if self._lora is not None:
            self._lora.prepare(self._routing)

    def _record(self, recorder: Recorder, num_rows: int, has_adapters: bool) -> None:
        rows = self._buffers.rows(num_rows)
        attend = self._attention.begin_decodes(rows.tensors, self._cache.keys, self._cache.values)
        self._buffers.fill((), num_rows)
        if has_adapters:
            self._route([BASE_SLOT] * num_rows, is_open=True)
        else:
            self._routing.clear()
        try:
            replay = recorder.record(
                lambda: self._base.decode_into(rows.logits, rows.ids, rows.positions, attend)
            )
        except Exception as error:  # noqa: BLE001  (whatever a recording meets, the eager way is still there)
            name = type(error).__name__
            logger.warning(
                "graphs.not_recorded rows=%d adapters=%s error=%s: %s", num_rows, has_adapters, name, error
            )
            return
        self._replays[num_rows, has_adapters] = replay


def _is_one_token(chunk: Chunk) -> bool:
    """One row, the embedding of one token, whose logits are wanted: a decode, or the rest of a cached prompt."""
    wants_one = chunk.num_tokens == 1 and chunk.yields_token and not chunk.wants_prompt_logits
    return wants_one and not chunk.images()
