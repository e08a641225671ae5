"""Account: what a step is in figures, as events for the observer. Pure.

Rows that were computed for nobody are in no plan and no outcome by then, and so in no figure here.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

from engine.clock import StepClock
from engine.observer import ImageLookup, StepDone
from engine.step import Chunk, StepPlan


def image_lookups(plan: StepPlan) -> Iterator[ImageLookup]:
    """Each image once, with the chunk that meets it: a miss for the one for which it is encoded."""
    fresh = {job.key for job in plan.image_jobs}
    for chunk in plan.chunks:
        if not chunk.sequence.request.is_background:
            for key in map(chunk.sequence.image_key, chunk.images_met()):
                yield ImageLookup(key not in fresh)
                fresh.discard(key)


def step_done(chunks: Seq[Chunk], clock: StepClock) -> StepDone:
    """Of the chunks that came to something."""
    num_decodes = sum(chunk.is_decode for chunk in chunks)
    refs = {chunk.sequence.adapter for chunk in chunks if not chunk.sequence.adapter.is_base}
    return StepDone(clock.seconds, clock.cpu_seconds, num_decodes, len(refs))
