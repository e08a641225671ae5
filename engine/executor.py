"""Executor: a plan in, one outcome a chunk out. It runs the model and the sampler, and when a step throws it halves the
plan until only the culprit fails; its neighbours' tokens are the same as without it.

A step that runs out of memory has no culprit: it is done in smaller parts, and later steps stay small for a while.
Where one sequence's part does not fit alone, its images are encoded one by one, then its piece of the prompt is halved;
only what still does not fit fails. All but the last are exact to the bit on a CPU; a halved piece rounds its attention
otherwise, which is better than no answer.

Where the plan after this one is known already (``ahead``), it is started before this one's tokens are read. A step that
was started and fails is done again as if it had not been, and so is the one behind it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial

from engine.clock import StepClock
from engine.errors import EngineError, NumericalError, OutOfMemory, StepFailed
from engine.exhaustion import Ceiling, halves, is_out_of_memory
from engine.flight import Flight
from engine.messages import TokenLogprob
from engine.observer import ImagesEncoded, Observer, Passed, SteppedAhead, StepRetried
from engine.runner import Runner, StepLogits
from engine.sampler import NumericalFailure, SampledRow, SampledToken, Sampler, sampled, score_prompt
from engine.step import Chunk, StepPlan

logger = logging.getLogger("lorikeet.engine")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one chunk: a token, an error, or (in the middle of a prefill) neither."""

    chunk: Chunk
    token: SampledToken | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For the prompt tokens that follow the chunk's rows."""
    error: EngineError | None = None
    is_halved: bool = False
    """It had to be computed in pieces other than its own: what it left in the cache is for its sequence alone."""


class Executor:
    def __init__(self, runner: Runner, sampler: Sampler, observer: Observer) -> None:
        self._runner = runner
        self._sampler = sampler
        self._observer = observer
        self._ceiling = Ceiling()
        self._flight: Flight | None = None
        """The step that was started ahead, in the call before."""

    def can_launch(self, plan: StepPlan) -> bool:
        """Whether it can be started and read later: recorded, and no shortage of memory is remembered."""
        return self._ceiling.is_lifted and self._runner.can_launch(plan)

    def execute(self, plan: StepPlan, clock: StepClock, ahead: StepPlan | None = None) -> list[Outcome]:
        """Outcomes in plan order. Raises nothing that a request's content can cause.

        ahead: the step after this one; the next call is given it, without the rows that have ended meanwhile.
        """
        flight, self._flight = self._flight, None
        if ahead is not None:
            flight = flight or self._launch(plan)
            self._flight = self._launch(ahead, flight) if flight is not None else None
            clock.lap("forward")
        return self._run(plan, clock) if flight is None else self._land(flight, plan, clock)

    def abandon(self) -> None:
        """Wait for the step that was started ahead, and forget it: nobody wants its tokens."""
        flight, self._flight = self._flight, None
        if flight is not None:
            try:
                flight.wait()
            except Exception as error:  # noqa: BLE001  (as in _execute)
                logger.warning("step.abandoned error=%s", type(error).__name__)

    # ---- a step that is started, and read later --------------------------------------------------------------

    def _launch(self, plan: StepPlan, after: Flight | None = None) -> Flight | None:
        """None where it cannot be; whatever is wrong is met again, and handled, when it is run."""
        states = [chunk.sequence.sampler for chunk in plan.chunks]
        is_greedy = all(state.params.is_greedy for state in states)
        uniforms = [chunk.sequence.sampler.uniform(chunk.num_unknown) for chunk in plan.chunks]
        choose = None if is_greedy else partial(self._sampler.choose, states=states, uniforms=uniforms)
        try:
            return self._runner.launch(plan, after, choose)
        except Exception as error:  # noqa: BLE001  (as in _execute)
            traceback.clear_frames(error.__traceback__)
            logger.warning("step.not_launched is_ahead=%s error=%s", after is not None, type(error).__name__)
            return None

    def _land(self, flight: Flight, plan: StepPlan, clock: StepClock) -> list[Outcome]:
        """Read the tokens. ``plan`` is what is left of the flight: rows whose sequences have ended are dropped."""
        try:
            token_ids = flight.wait()
        except Exception as error:  # noqa: BLE001  (as in _execute)
            traceback.clear_frames(error.__traceback__)
            clock.lap("sample")
            return self._run_again(plan, error, clock)
        clock.lap("sample")
        if flight.is_ahead:
            self._observer.record(SteppedAhead(len(flight.chunks) - len(plan.chunks)))
        if plan.chunks:
            self._observer.record(Passed("graph"))
            self._ceiling.note_success()
        rows = dict(zip(flight.chunks, map(sampled, token_ids), strict=True))
        return [self._outcome(chunk, rows[chunk], ()) for chunk in plan.chunks]

    def _run_again(self, plan: StepPlan, error: Exception, clock: StepClock) -> list[Outcome]:
        """The ordinary way, which finds the culprit: it may have been a row that was dropped, or of the step behind,
        which had this one's tokens as its inputs and is not to be trusted either.
        """
        self.abandon()
        self._observer.record(StepRetried(0, type(error).__name__))
        logger.warning("step.flight_failed chunks=%d error=%s", len(plan.chunks), type(error).__name__)
        if is_out_of_memory(error):
            self._runner.free_memory()
        return self._run(plan, clock)

    # ---- a step that is run at once --------------------------------------------------------------------------

    def _run(self, plan: StepPlan, clock: StepClock) -> list[Outcome]:
        if not plan.chunks:
            return []
        return [outcome for part in self._ceiling.parts(plan) for outcome in self._execute(part, clock)]

    def _execute(self, plan: StepPlan, clock: StepClock) -> list[Outcome]:
        try:
            outcomes = self._attempt(plan, clock)
        except Exception as error:  # noqa: BLE001  (whatever a step throws, only its culprit may fail)
            # the frames hold the failed step's tensors: after "out of memory" the retry needs their room
            traceback.clear_frames(error.__traceback__)
            clock.lap("forward")
            return self._shrink(plan, clock) if is_out_of_memory(error) else self._isolate(plan, error, clock)
        self._ceiling.note_success()
        return outcomes

    def _shrink(self, plan: StepPlan, clock: StepClock) -> list[Outcome]:
        """It found no room: give back what can be spared and do less at once."""
        self._runner.free_memory()
        self._observer.record(StepRetried(0, "OutOfMemory"))
        logger.warning("step.out_of_memory chunks=%d tokens=%d", len(plan.chunks), plan.num_tokens)
        if len(plan.chunks) == 1:
            return [self._squeeze(plan, clock)]
        self._ceiling.lower(plan.num_tokens)
        return self._halve(plan, clock)

    def _squeeze(self, plan: StepPlan, clock: StepClock) -> Outcome:
        """One chunk in as little room as it can be done in."""
        try:
            self._runner.encode_each(plan.image_jobs)
            return self._attempt(plan, clock)[0]
        except Exception as error:  # noqa: BLE001  (as in _execute)
            traceback.clear_frames(error.__traceback__)
            if not is_out_of_memory(error):
                return self._isolate(plan, error, clock)[0]
        self._runner.free_memory()
        chunk = plan.chunks[0]
        if chunk.num_tokens == 1:
            logger.error("step.no_memory request_id=%s", chunk.sequence.request_id)
            self._observer.record(StepRetried(1, "OutOfMemory"))
            return Outcome(
                chunk, error=OutOfMemory("the device has no memory for this request; try again later")
            )
        first, second = halves(chunk)
        before = self._squeeze(plan.only([first]), clock)
        if before.error is not None:
            return replace(before, chunk=chunk)
        after = self._squeeze(plan.only([second]), clock)
        scored = before.prompt_logprobs + after.prompt_logprobs
        return replace(after, chunk=chunk, prompt_logprobs=scored, is_halved=True)

    def _isolate(self, plan: StepPlan, error: Exception, clock: StepClock) -> list[Outcome]:
        """Halve and retry. A single chunk that throws is the culprit."""
        if len(plan.chunks) == 1:
            name = type(error).__name__
            logger.exception("step.failed request_id=%s error=%s", plan.chunks[0].sequence.request_id, name)
            self._observer.record(StepRetried(1, name))
            failure = StepFailed(f"this request made its step fail ({name})")
            return [Outcome(plan.chunks[0], error=error if isinstance(error, EngineError) else failure)]
        return self._halve(plan, clock)

    def _halve(self, plan: StepPlan, clock: StepClock) -> list[Outcome]:
        half = len(plan.chunks) // 2
        parts = (plan.only(plan.chunks[:half]), plan.only(plan.chunks[half:]))
        return [outcome for part in parts for outcome in self._execute(part, clock)]

    def _attempt(self, plan: StepPlan, clock: StepClock) -> list[Outcome]:
        step = self._runner.run(plan)
        clock.split(step.seconds, step.cpu_seconds)
        self._observer.record(Passed(step.way))
        if step.num_images:
            encode_s = step.seconds.get("encode", 0.0)
            self._observer.record(ImagesEncoded(step.num_images, step.num_patches, encode_s))
        outcomes = self._sample(plan, step)
        clock.lap("sample")
        return outcomes

    def _sample(self, plan: StepPlan, step: StepLogits) -> list[Outcome]:
        if step.chosen is not None and all(_is_likeliest(chunk) for chunk in plan.chunks):
            rows = map(sampled, step.chosen.tolist())
            return [self._outcome(chunk, row, ()) for chunk, row in zip(plan.chunks, rows, strict=True)]
        prompt_logprobs = self._prompt_logprobs(plan.chunks, step)
        yielding = [i for i, chunk in enumerate(plan.chunks) if chunk.yields_token]
        logits = step.last_rows(yielding)
        for place, i in enumerate(yielding):
            if (on_logits := plan.chunks[i].sequence.request.on_logits) is not None:
                on_logits(logits[place])
        chosen = self._sampler.sample(logits, [plan.chunks[i].sequence.sampler for i in yielding])
        tokens = dict(zip(yielding, chosen, strict=True))
        return [
            self._outcome(chunk, tokens.get(i), prompt_logprobs.get(i, ()))
            for i, chunk in enumerate(plan.chunks)
        ]

    @staticmethod
    def _outcome(chunk: Chunk, token: SampledRow | None, prompt: tuple[TokenLogprob, ...]) -> Outcome:
        if isinstance(token, NumericalFailure):
            error = NumericalError("the model gave no finite probabilities for this request")
            return Outcome(chunk, error=error)
        return Outcome(chunk, token, prompt)

    @staticmethod
    def _prompt_logprobs(chunks: Seq[Chunk], step: StepLogits) -> dict[int, tuple[TokenLogprob, ...]]:
        """Of the chunks that owe some, by place. Row i of a chunk predicts prompt token ``start + i + 1``."""
        asking = [i for i, chunk in enumerate(chunks) if chunk.wants_prompt_logits]
        if not asking:
            return {}
        logits, found = step.split(), {}
        for i in asking:
            request = chunks[i].sequence.request
            targets = request.prompt.ids[chunks[i].start + 1 : chunks[i].end + 1]
            num_top = request.prompt_logprobs or 0
            found[i] = tuple(score_prompt(logits[i][: len(targets)], targets, num_top))
        return found


def _is_likeliest(chunk: Chunk) -> bool:
    """Whether its token is its logits' likeliest, and all that is asked for."""
    return chunk.sequence.sampler.params.is_greedy and not chunk.needs_host
