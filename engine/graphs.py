"""DecodeGraphs: steps in which every sequence has one row, recorded once for each bucket of rows and then replayed.

A step that fits takes one launch instead of some hundreds. Each bucket is recorded with adapters and without: a step of
the base alone has no adapter's kernels in it. All that changes from step to step is device data that is refilled in
place: DecodeBuffers here, tile and slot tables in adapters.triton_lora. A bucket that cannot be recorded (no memory, an
operation that may not be) is left to the eager way, with a line in the log; the eager way is also what replays are held
to (tests/engine/test_graphs.py).

A recording ends with each row's likeliest token, so that greedy rows need no more; who is sampled otherwise is sampled
from the logits. A step may be started while another one is on the device, with that one's tokens as its inputs: all of
a step, its uploads too, is ordered in one stream.

Owns: which step fits which recording. Does not know: how else tokens are chosen. Place in a request's way: step 8.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Final

import torch

from adapters.routing import Routing
from adapters.triton_lora import TritonLora
from base.attention import DecodeAttention, LayerAttention
from base.model import BaseModel
from engine.decode_buffers import DecodeBuffers, DecodeRows
from engine.flight import Choose, Flight, Replayed
from engine.kv import KVCache
from engine.ranking import write_best
from engine.readback import Readback
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
        self._readback = Readback(buffers.num_rows, base.device)
        self._latest: Flight | None = None
        """Whose tokens the buffers hold."""

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

    def fits(self, plan: StepPlan) -> bool:
        return _kind(plan, self._bucket(len(plan.chunks))) in self._replays and self._suits(plan)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Replayed | None:
        self._latest = None
        rows = self._replay(plan, None)
        if rows is None:
            return None
        logits = rows.logits[: len(plan.chunks)]
        is_kept = any(chunk.sequence.request.on_logits is not None for chunk in plan.chunks)
        return Replayed(logits.clone() if is_kept else logits, rows.chosen[: len(plan.chunks)])

    @torch.inference_mode()
    def launch(self, plan: StepPlan, after: Flight | None, choose: Choose | None) -> Flight | None:
        if after is not None and after is not self._latest:
            raise ValueError("a step can follow only the one that was launched last")
        rows = self._replay(plan, None if after is None else _sources(plan, after))
        if rows is None:
            return None
        chosen = rows.chosen[: len(plan.chunks)]
        if choose is not None:
            chosen.copy_(choose(rows.logits[: len(plan.chunks)]))
        self._latest = Flight(plan.chunks, after is not None, self._readback.send(chosen))
        return self._latest

    def _replay(self, plan: StepPlan, sources: Seq[int] | None) -> DecodeRows | None:
        """Start the plan, its inputs known or the tokens of the last replay's rows ``sources``."""
        if not self.fits(plan):
            return None
        num_rows = self._bucket(len(plan.chunks))
        kind = _kind(plan, num_rows)
        self._buffers.fill(plan.chunks, num_rows, sources)
        if kind[1]:
            slots = [chunk.sequence.slot for chunk in plan.chunks]
            self._route([*slots, *[BASE_SLOT] * (num_rows - len(slots))])
        self._replays[kind]()
        return self._buffers.rows(num_rows)

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
            replay = recorder.record(lambda: self._decode(rows, attend))
        except Exception as error:  # noqa: BLE001  (whatever a recording meets, the eager way is still there)
            name = type(error).__name__
            logger.warning(
                "graphs.not_recorded rows=%d adapters=%s error=%s: %s", num_rows, has_adapters, name, error
            )
            return
        self._replays[num_rows, has_adapters] = replay

    def _decode(self, rows: DecodeRows, attend: LayerAttention) -> None:
        """What is recorded."""
        self._base.decode_into(rows.logits, rows.ids, rows.positions, attend)
        write_best(rows.chosen, rows.logits)


def _kind(plan: StepPlan, num_rows: int) -> tuple[int, bool]:
    """Of the recording that the plan needs: rows, and whether adapters are in it."""
    return num_rows, any(chunk.sequence.slot != BASE_SLOT for chunk in plan.chunks)


def _sources(plan: StepPlan, after: Flight) -> list[int]:
    """The row of ``after`` in which each of the plan's sequences is."""
    rows = {chunk.sequence: row for row, chunk in enumerate(after.chunks)}
    return [rows[chunk.sequence] for chunk in plan.chunks]


def _is_one_token(chunk: Chunk) -> bool:
    """One row, the embedding of one token, whose logits are wanted: a decode, or the rest of a cached prompt."""
    wants_one = chunk.num_tokens == 1 and chunk.yields_token and not chunk.wants_prompt_logits
    return wants_one and not chunk.images()
