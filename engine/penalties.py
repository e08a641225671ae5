"""Penalties on tokens that already occurred: repetition (prompt and output), presence and frequency (output only)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling import SamplingParams


def has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )


class TokenCounts:
    """The distinct tokens of one sequence, and how often each was generated. A new token costs O(1)."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._num = len(distinct)
        self._ids = np.zeros(self._num + 64, dtype=np.int64)
        self._ids[: self._num] = distinct
        self._counts = np.zeros(self._num + 64, dtype=np.float32)
        self._position = {int(token_id): i for i, token_id in enumerate(distinct)}

    def add(self, token_id: int) -> None:
        """One more of this token in the output."""
        position = self._position.get(token_id)
        if position is None:
            position = self._append(token_id)
        self._counts[position] += 1

    def _append(self, token_id: int) -> int:
        if self._num == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[self._num] = token_id
        self._position[token_id] = self._num
        self._num += 1
        return self._num - 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """[U] distinct tokens of prompt and output; a view that is valid until the next ``add``."""
        return self._ids[: self._num]

    @property
    def output_counts(self) -> NDArray[np.float32]:
        """[U] occurrences in the output, 0 for a token of the prompt alone; a view, as ``ids``."""
        return self._counts[: self._num]


def apply_penalties(row: Tensor, params: SamplingParams, counts: TokenCounts) -> None:
    """Mutates ``row``, [V] float32. The formulas are transformers' RepetitionPenaltyLogitsProcessor and OpenAI's."""
    ids = torch.from_numpy(counts.ids).to(row.device, non_blocking=True)
    occurrences = torch.from_numpy(counts.output_counts).to(row.device, non_blocking=True)
    scores = row[ids]
    penalty = params.repetition_penalty
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    scores -= params.frequency_penalty * occurrences
    scores -= params.presence_penalty * (occurrences > 0)
    row[ids] = scores
