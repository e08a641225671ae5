"""StepBudget: what one step may still take. Integers only."""

from __future__ import annotations

from engine.step import ImageJob


class StepBudget:
    """What one step may still take; made for one plan and dropped with it."""

    def __init__(self, num_tokens: int, num_patches: int) -> None:
        self.num_tokens = num_tokens
        self.num_patches = num_patches
        self.image_jobs: list[ImageJob] = []
        self.has_prefill = False

    @property
    def is_spent(self) -> bool:
        return self.has_prefill and self.num_tokens <= 0

    def take_prefill(self, num_tokens: int, jobs: list[ImageJob]) -> bool:
        """Whether a piece of a prompt, with the images it needs encoded, goes into this step.

        The first piece of a step always does, and so does an image larger than the whole vision budget if it is first.
        """
        taken = {job.key for job in self.image_jobs}
        new = list({job.key: job for job in jobs if job.key not in taken}.values())
        num_patches = sum(job.image.pixels.shape[0] for job in new)
        if self.has_prefill and num_tokens > self.num_tokens:
            return False
        if self.image_jobs and num_patches > self.num_patches:
            return False
        self.has_prefill = True
        self.num_tokens -= num_tokens
        self.num_patches -= num_patches
        self.image_jobs += new
        return True
