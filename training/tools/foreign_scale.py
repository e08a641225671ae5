"""Scales: what a foreign configuration says of each module's rank and alpha.

Owns: patterns resolved as PEFT resolves them (expressions of the configuration's own are run: this is a tool at a
person's desk, not the server), alphas that stand beside the tensors, and rsLoRA's square root written out.
Place in a training run: none; under ``import``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from peft.utils.other import get_pattern_key
from torch import Tensor

from training.tools.foreign_keys import ForeignKey
from training.tools.refusals import ImportRefused

PEFT_DEFAULT: Final = 8
"""Rank and alpha of a PEFT configuration that leaves them out."""


@dataclass(frozen=True, slots=True)
class Scales:
    """What a configuration says of ranks and alphas, as PEFT reads it."""

    config: Mapping[str, object]
    alpha: float | None

    def alpha_of(self, key: ForeignKey, stored: Tensor | None, rank: int) -> float:
        """Such that alpha / rank multiplies B @ A; of rsLoRA (alpha / sqrt(rank)) the alpha that comes to the same."""
        said = self._said(key, "alpha_pattern", "lora_alpha")
        if stored is not None:
            if said is not None and float(stored) != said:
                raise ImportRefused(
                    f"{key.module} has alpha {float(stored):g} in the tensor file and {said:g} in "
                    "adapter_config.json: which one was it trained with?"
                )
            said = float(stored)
        said = self.alpha if said is None else said
        if said is None:
            raise ImportRefused(
                "no file says the adapter's alpha (its scale is alpha / rank): give the one that it was trained with "
                "by --alpha"
            )
        return said * math.sqrt(rank) if self.config.get("use_rslora") else said

    def check_rank(self, key: ForeignKey, rank: int) -> None:
        said = self._said(key, "rank_pattern", "r")
        if said is not None and said != rank:
            raise ImportRefused(
                f"{key.module} has rank {rank}, and adapter_config.json says {said:g}: its scale cannot be "
                "known; is the configuration this adapter's?"
            )

    def _said(self, key: ForeignKey, pattern: str, default: str) -> float | None:
        patterns = self.config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise ImportRefused(f"adapter_config.json: {pattern} is no map of module names")
        is_peft = "peft_type" in self.config
        value: object = self.config.get(default, PEFT_DEFAULT if is_peft else None)
        for name in (key.module, key.site):
            try:
                named = get_pattern_key(list(patterns), name)
            except re.error as error:
                raise ImportRefused(
                    f"adapter_config.json: {pattern} has a key that is no expression ({error})"
                ) from error
            if named in patterns:
                value = patterns[named]
                break
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ImportRefused(f"adapter_config.json: {default} or {pattern} holds {value!r}, no number")
        return float(value)
