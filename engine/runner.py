"""Runner: carries out a StepPlan on the device. It encodes the images, refills the routing, calls the language model
once, and returns logits. It decides nothing and keeps nothing but the KV and the image embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from adapters.routing import RoutingSet
from base.model import BaseModel
from engine.batch import Batch, build_batch
from engine.clock import Phase, StepClock
from engine.flight import Choose, Flight, Launcher
from engine.kv import KVCache
from engine.observer import Way
from engine.step import ImageJob, StepPlan
from engine.tiling import Tiling
from engine.vision_cache import VisionCache


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits of a plan's chunks, in plan order; ``counts[i]`` rows belong to chunk i. Valid until the next run."""

    logits: Tensor  # [L, V] float32
    counts: tuple[int, ...]
    num_images: int
    """Images that were encoded for it, and their patches."""
    num_patches: int
    seconds: Mapping[Phase, float]
    """Of encode, batch and forward."""
    cpu_seconds: Mapping[Phase, float]
    """The processor time of the engine's thread in them."""
    way: Way = "eager"
    chosen: Tensor | None = None  # [L] int64
    """Each row's likeliest token, or NO_TOKEN, where the device has chosen them already."""

    def last_rows(self, places: Seq[int]) -> Tensor:
        """[S, V]: the last row of each of these chunks, which want one; the logits themselves where they are all."""
        ends = list(accumulate(self.counts))
        rows = [ends[i] - 1 for i in places]
        return self.logits if rows == list(range(len(self.logits))) else self.logits[rows]

    def split(self) -> tuple[Tensor, ...]:
        """One [n, V] view a chunk; n is 0 for a chunk that wants none."""
        return torch.split(self.logits, list(self.counts))


class Runner:
    """Not reentrant; the engine's thread only."""

    def __init__(
        self,
        base: BaseModel,
        routing: RoutingSet,
        cache: KVCache,
        vision_cache: VisionCache,
        tiling: Tiling,
    ) -> None:
        self._base = base
        self._routing = routing
        self._cache = cache
        self._vision_cache = vision_cache
        self._tiling = tiling
        self._graphs: Launcher | None = None

    def replay_with(self, graphs: Launcher) -> None:
        """From here on, steps that are recorded there are replayed."""
        self._graphs = graphs

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepLogits:
        """Compute the plan. If it raises, nothing but KV rows that the plan itself would rewrite has changed."""
        clock = StepClock()
        if self._graphs is not None and (replayed := self._graphs.run(plan)) is not None:
            clock.lap("forward")
            counts = (1,) * len(plan.chunks)
            return StepLogits(
                replayed.logits, counts, 0, 0, clock.seconds, clock.cpu_seconds, "graph", replayed.chosen
            )
        encoded = self._encode(plan.image_jobs)
        clock.lap("encode")
        batch = build_batch(plan, self._cache, self._base.device, self._tiling)
        clock.lap("batch")
        self._routing.language.fill(batch.segments)
        hidden = self._base.forward(self._embed(batch), batch.positions, batch.attention)  # [T, H]
        logits = self._base.logits(hidden[batch.logit_rows])
        clock.lap("forward")
        return StepLogits(
            logits=logits,
            counts=batch.logit_counts,
            num_images=len(encoded),
            num_patches=sum(job.image.pixels.shape[0] for job in encoded),
            seconds=clock.seconds,
            cpu_seconds=clock.cpu_seconds,
        )

    def can_launch(self, plan: StepPlan) -> bool:
        return self._graphs is not None and self._graphs.fits(plan)

    def launch(self, plan: StepPlan, after: Flight | None, choose: Choose | None) -> Flight | None:
        """Start the plan, and do not wait for it: see ``Launcher.launch``. None where it cannot be."""
        return None if self._graphs is None else self._graphs.launch(plan, after, choose)

    @torch.inference_mode()
    def encode_each(self, jobs: Iterable[ImageJob]) -> None:
        """Encode images one at a time: the same embeddings in the least room."""
        for job in jobs:
            self._encode((job,))

    def free_memory(self) -> None:
        """Give back what no running sequence needs: embeddings that wait for another question, unused blocks."""
        self._vision_cache.shed()
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _embed(self, batch: Batch) -> Tensor:
        """[T, H]: token embeddings, with image rows in the places of their placeholders."""
        embeds = self._base.embed_tokens(batch.ids)
        for span in batch.image_spans:
            image = self._vision_cache.get(span.key)
            embeds[span.row : span.row + span.num_tokens] = image[span.start : span.start + span.num_tokens]
        return embeds

    def _encode(self, wanted: Iterable[ImageJob]) -> list[ImageJob]:
        """Encode in one call the images that the cache lacks, each with its own adapter's vision weights; those."""
        jobs = [job for job in wanted if job.key not in self._vision_cache]
        if not jobs:
            return []
        merge = self._base.spec.merge_size**2
        num_patches = [job.image.pixels.shape[0] for job in jobs]
        self._routing.vision.fill([(n, job.slot) for n, job in zip(num_patches, jobs, strict=True)])
        self._routing.merger.fill([(n // merge, job.slot) for n, job in zip(num_patches, jobs, strict=True)])
        pixels = torch.cat([job.image.pixels for job in jobs]).to(self._base.device)
        embeds = self._base.embed_images(pixels, [job.image.grid for job in jobs])
        for job, rows in zip(jobs, torch.split(embeds, [job.image.num_tokens for job in jobs]), strict=True):
            self._vision_cache.put(job.key, rows.clone())
        return jobs
