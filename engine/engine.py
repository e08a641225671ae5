"""Engine: the whole system on one page. One inbox, one step, one outbox; one thread.

A request comes in as ``Submit``, becomes a Sequence, waits for its adapter and for blocks, is prefilled in chunks,
decodes a token a step, and leaves as ``Tokens`` and one ``Finished`` or ``Failed``. Deciding is the Scheduler's and
Residency's; doing is the Runner's and Mover's; this file is the order in which they are asked.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq

from adapters.errors import AdapterError, AdapterNotLoaded
from adapters.ref import AdapterRef
from engine.account import image_lookups, step_done
from engine.ahead import Surroundings, rows_ahead
from engine.clock import StepClock
from engine.config import EngineConfig
from engine.errors import AdapterUnavailable, DeadlineExceeded, Draining, EngineDown, EngineError, StepFailed
from engine.executor import Executor, Outcome
from engine.fairness import foreground
from engine.lifecycle import Lifecycle
from engine.messages import Abort, Failed, Inbound, LoadAdapter, Outbound, Stop, Submit, UnloadAdapter, Wake
from engine.observer import Observer
from engine.request import GenerationRequest
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.status import Picture, StatusBoard
from engine.step import StepPlan
from engine.swaps import AdapterSwaps

logger = logging.getLogger("lorikeet.engine")

IDLE_WAIT_S = 0.5  # how long an idle engine sleeps between heartbeats
PENDING_WAIT_S = 0.02  # the same while an unload drains or a load is awaited: its deadline must be noticed
MAX_BACKOFF_S = 2.0  # longest pause after a reset, so that a lasting fault does not spin


class Engine:
    """Built by ``engine.build``; driven by one thread that calls ``run``. Everything else talks to the inbox."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        executor: Executor,
        swaps: AdapterSwaps,
        lifecycle: Lifecycle,
        board: StatusBoard,
        observer: Observer,
        deliver: Callable[[Seq[Outbound]], None],
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._executor = executor
        self._swaps = swaps
        self._lifecycle = lifecycle
        self._board = board
        self._observer = observer
        self._deliver = deliver
        self._sequences: dict[str, Sequence] = {}
        self._is_stopping = False
        self.inbox: queue.SimpleQueue[Inbound] = queue.SimpleQueue()
        self.num_steps = 0
        self.num_recoveries = 0

    # ---- the step ----------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Everything that happens, in order."""
        clock = StepClock()
        self._receive()
        clock.lap("receive")
        self._settle_adapters()
        self._start_moves()
        clock.lap("adapters")
        plan = self._plan()
        ahead = self._plan_ahead(plan)
        clock.lap("plan")
        outcomes = self._executor.execute(plan, clock, ahead)
        self._commit(outcomes)
        clock.lap("commit")
        self._send()
        clock.lap("send")
        self._account(outcomes, clock)

    def _receive(self) -> None:
        """Take all that is in the inbox, in order."""
        while True:
            try:
                message = self.inbox.get_nowait()
            except queue.Empty:
                return
            self._accept(message)

    def _accept(self, message: Inbound) -> None:
        match message:
            case Submit(request):
                self._birth(request)
            case Abort(request_id, reason):
                if (sequence := self._sequences.get(request_id)) is not None:
                    self._end(sequence, self._lifecycle.finish(sequence, reason, time.monotonic()))
            case LoadAdapter():
                self._swaps.request_load(message, time.monotonic())
            case UnloadAdapter():
                self._swaps.request_unload(message, time.monotonic())
            case Wake():
                pass
            case Stop():
                self._is_stopping = True

    def _birth(self, request: GenerationRequest) -> None:
        try:
            sequence = self._lifecycle.birth(request)
        except Exception as error:  # a request that cannot even be born must not touch the others
            logger.exception("request.stillborn request_id=%s", request.request_id)
            failure = StepFailed(f"the request could not be started ({type(error).__name__})")
            self._lifecycle.outbox.append(Failed(request.request_id, failure))
        else:
            self._admit(sequence)

    def _admit(self, sequence: Sequence) -> None:
        """Into the queue, unless its adapter may not be fetched for it."""
        self._sequences[sequence.request_id] = sequence
        self._scheduler.add(sequence)
        is_on_device = self._lifecycle.is_on_device(sequence)
        self._lifecycle.look_up(sequence, is_on_device, self._swaps.is_on_host(sequence.adapter))
        absent = self._lifecycle.absent_versions(sequence)
        if absent and not self._config.load_on_demand:
            cause = AdapterNotLoaded(absent[0].name)
            self._fail(sequence, AdapterUnavailable(str(sequence.adapter), cause))

    def _settle_adapters(self) -> None:
        """Adapters whose loading ended become visible; the sequences of those that failed are answered."""
        for ref, error in self._swaps.settle(bool(self._scheduler.running)):
            self._fail_waiting_for(ref, error)

    def _start_moves(self) -> None:
        self._scheduler.draining = self._swaps.draining
        self._swaps.start(self._scheduler.wanted(time.monotonic()))

    def _plan(self) -> StepPlan:
        now = time.monotonic()
        for sequence in self._lifecycle.expired(self._sequences.values(), now):
            self._fail(sequence, DeadlineExceeded("the request's deadline passed before it was finished"))
        plan = self._scheduler.plan(now)
        for lookup in image_lookups(plan):
            self._observer.record(lookup)
        for chunk in plan.chunks:
            if chunk.sequence.started_s is None:
                self._lifecycle.start(chunk.sequence, now)
        return plan

    def _plan_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after this one, where it is certain before this one's tokens are known."""
        if self._config.step_ahead == "off" or not self._executor.can_launch(plan):
            return None
        around = Surroundings(
            has_messages=not self.inbox.empty(),
            has_prompts=self._scheduler.has_prompts,
            has_queue=self._scheduler.has_queue,
            has_moves=self._swaps.has_work or self._swaps.has_pending,
        )
        return self._scheduler.plan_ahead(rows_ahead(plan, around, self._lifecycle.max_model_len))

    def _commit(self, outcomes: Seq[Outcome]) -> None:
        self._scheduler.land()
        now = time.monotonic()
        for outcome in outcomes:
            sequence = outcome.chunk.sequence
            if outcome.error is not None:
                self._scheduler.distrust(sequence)
                self._fail(sequence, outcome.error)
                continue
            if outcome.is_halved:
                self._scheduler.distrust(sequence)
            reason = self._lifecycle.advance(sequence, outcome, now)
            if outcome.token is not None:
                self._scheduler.keep(sequence)
            if sequence.num_computed >= sequence.num_prompt_tokens and sequence.pinned_images:
                self._scheduler.end_prefill(sequence)
            if reason is not None:
                self._end(sequence, self._lifecycle.finish(sequence, reason, now))

    def _send(self) -> None:
        """Publish the status first: whoever gets an answer finds it true."""
        self._board.publish(self._picture())
        self._swaps.send_answers()
        messages = self._lifecycle.take_outbox()
        if messages:
            self._deliver(messages)

    def _account(self, outcomes: Seq[Outcome], clock: StepClock) -> None:
        if outcomes:
            self.num_steps += 1
            self._observer.record(step_done([outcome.chunk for outcome in outcomes], clock))

    # ---- ends --------------------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, farewell: Outbound) -> None:
        self._scheduler.end(sequence)
        del self._sequences[sequence.request_id]
        self._lifecycle.outbox.append(farewell)

    def _fail(self, sequence: Sequence, error: EngineError) -> None:
        self._end(sequence, self._lifecycle.fail(sequence, error))

    def _fail_waiting_for(self, ref: AdapterRef, error: AdapterError) -> None:
        for sequence in [s for s in self._scheduler.waiting if s.adapter == ref]:
            self._fail(sequence, AdapterUnavailable(str(ref), error))

    def _fail_all(self, error: EngineError) -> None:
        for sequence in list(self._sequences.values()):
            self._fail(sequence, error)
        self._swaps.fail_pending(error)
        self._send()

    def _land_nothing(self) -> None:
        """Nobody will read the step that is ahead."""
        self._executor.abandon()
        self._scheduler.forget_ahead()

    # ---- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until stopped. Does not raise: a step that throws outside a request's own work ends all streams with
        an error, and the engine goes on with an empty queue."""
        while not self._is_stopping:
            try:
                self._sleep_if_idle()
                self.step()
            except Exception:  # nothing may end the loop but Stop
                logger.exception("engine.recovered")
                self.num_recoveries += 1
                self._scheduler.distrust_all()
                self._land_nothing()
                self._fail_all(EngineDown("the engine met an internal error and was reset; try again"))
                time.sleep(min(MAX_BACKOFF_S, 0.05 * 2 ** min(self.num_recoveries, 10)))
        self._land_nothing()
        self._receive()
        self._fail_all(Draining("the server is stopping"))

    def _sleep_if_idle(self) -> None:
        self._board.beat()
        if (
            self._scheduler.running
            or self._scheduler.is_ahead
            or self._swaps.has_work
            or not self.inbox.empty()
        ):
            return
        is_pending = self._swaps.has_pending or bool(self._scheduler.waiting)
        try:
            message = self.inbox.get(timeout=PENDING_WAIT_S if is_pending else IDLE_WAIT_S)
        except queue.Empty:
            return
        self._accept(message)

    def _picture(self) -> Picture:
        return Picture(
            running=Counter(s.adapter.name for s in foreground(self._scheduler.running)),
            waiting=Counter(s.adapter.name for s in foreground(self._scheduler.waiting)),
            waiting_for_adapter=self._scheduler.num_waiting_for_adapter,
            kv_blocks_used=self._scheduler.num_blocks_used,
            swaps=self._swaps.picture(),
            num_steps=self.num_steps,
            num_recoveries=self.num_recoveries,
        )
