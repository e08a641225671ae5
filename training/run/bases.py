"""Bases: the base as it trains and the base as it serves, each loaded when it is first needed.

On a GPU they are one object. Where training computes in another precision than the server (fp32 on a CPU that has no
bf16 of its own), the adapter is judged and probed on the server's, and the training base is let go first unless it is
needed again. Owns: which is which. Does not know: adapters. Place in a training run: under the phases.
"""

from __future__ import annotations

import gc

import torch

from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from training.model.loading import load_training_base
from training.recipe.recipe import Recipe
from training.run.data import serving_config
from training.run.progress import Progress


class Bases:
    """Those of one recipe, or of several that agree on base, precision and pixels."""

    def __init__(self, recipe: Recipe, progress: Progress, *, keeps_both: bool = False) -> None:
        self._recipe, self._progress, self._keeps_both = recipe, progress, keeps_both
        self._training: BaseModel | None = None
        self._serving: BaseModel | None = None

    def training(self) -> BaseModel:
        """Raises as ``load_base``."""
        if self._training is None:
            with self._progress.phase("load base"):
                self._training = load_training_base(self._recipe)
        return self._training

    def serving(self) -> BaseModel:
        """Whoever holds the training base has to be done with it. Raises as ``load_base``."""
        if self._serving is None:
            if self._training is not None and _serves(self._training):
                return self._training
            self._let_go()
            with self._progress.phase("load serving base"):
                self._serving = load_base(serving_config(self._recipe))
        return self._serving

    def _let_go(self) -> None:
        if self._training is None or self._keeps_both:
            return
        self._training = None
        gc.collect()  # modules and their parents refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _serves(base: BaseModel) -> bool:
    """Whether a server's base would be this very one. On a CPU a server's linears compute otherwise; on a GPU they
    sum the same numbers in another order, and all is judged by margins."""
    return base.device.type != "cpu" and base.spec.dtype == BaseConfig().dtype
