"""Replay: what a package's probes said when it was made, beside what this server answers to the same prompts.

Owns the comparison and its tolerance. On the path that recorded them (the same base, device and kernels) not a bit
differs; on another, rounding may. Runs nothing: engine/probe.py does. Place in a request's way: step 5, before an
adapter is shown to anyone.

The tolerance. bfloat16 keeps 8 bits, so each rounding is off by at most 2^-8 of its value; over the some 8 roundings a
layer of 28 layers that adds up to at most sqrt(8 * 28) * 2^-8 / sqrt(3), 3.4 % of a hidden state, and so of the
logits' spread; the largest of 64 logits lies at two to three of these, under 10 %. Measured, bfloat16 against float32
in all computations: 2 % on the embedded base, 6 % on 28 random layers, up to 5 % with trained adapters; random
adapters of full strength amplify it to 20 to 60 %, and so does what they change. Hence a quarter of the spread, and
beside it a tenth of what the adapter changes. An adapter that is scaled wrongly, or that sits on other weights, is off
by half of what it changes and more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from adapters.errors import AdapterRejected, RejectReason
from adapters.profile import ProcessorFacts, RecordedProbe
from adapters.ref import AdapterRef
from base.probes import ids_sha256, logits_sha256
from base.processor import Processor
from base.prompt import PromptInputs

SPREAD_TOLERANCE: Final = 0.25
"""Of the logits' standard deviation over the vocabulary."""
EFFECT_TOLERANCE: Final = 0.1
"""Of the largest change that the adapter makes to the recorded logits."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of one package's probes; where there are several, the worst."""

    difference: float
    """The largest between a recorded logit and ours."""
    limit: float
    is_exact: bool
    """Not one bit of any logit differs."""
    num_probes: int = 1

    def joined(self, other: Replay) -> Replay:
        worse = max(self, other, key=lambda replay: replay.difference / replay.limit)
        is_exact, num_probes = self.is_exact and other.is_exact, self.num_probes + other.num_probes
        return Replay(worse.difference, worse.limit, is_exact, num_probes)


def check_ids(
    ref: AdapterRef, recorded: RecordedProbe, prompt: PromptInputs, was: ProcessorFacts, processor: Processor
) -> None:
    """Raise AdapterRejected (probe_mismatch) unless the same words became the same ids."""
    if recorded.ids_sha256 == ids_sha256(prompt.ids):
        return
    differing = [
        name
        for name, theirs, ours in (
            ("tokenizer", was.tokenizer_sha256, processor.tokenizer_sha256),
            ("chat template", was.template_sha256, processor.template_sha256),
        )
        if theirs and theirs != ours
    ]
    raise _mismatch(
        f"adapter {ref} was trained on prompts of other ids: this base's {' and '.join(differing) or 'processor'} "
        "differs from the one in its lorikeet.json; serve the base that it was trained on"
    )


def compare(ref: AdapterRef, recorded: RecordedProbe, logits: Tensor, base_logits: Tensor) -> Replay:
    """Compare with our own [V] float32 logits, on the CPU, of the adapter and of the base.

    Raises AdapterRejected: probe_mismatch beyond the tolerance, bad_config for ids that the base does not have.
    """
    ours, theirs = _at(ref, recorded.top, logits)
    base_ours, base_theirs = _at(ref, recorded.base_top, base_logits)
    base_difference = float((base_ours - base_theirs).abs().max())
    base_limit = SPREAD_TOLERANCE * float(base_logits.std())
    if not base_difference <= base_limit:
        raise _mismatch(
            f"adapter {ref} was proven on a base that answers otherwise: without it a probe's logits are off by "
            f"{base_difference:.3g}, and {base_limit:.3g} is what rounding explains; serve the base it was trained on"
        )
    difference = float((ours - theirs).abs().max())
    effect = float((ours - base_logits[_ids(recorded.top)]).abs().max())
    limit = SPREAD_TOLERANCE * float(logits.std()) + EFFECT_TOLERANCE * effect
    if not difference <= limit:
        raise _mismatch(
            f"adapter {ref} does not answer as when it was made: a probe's logits are off by {difference:.3g}, and "
            f"{limit:.3g} is what rounding explains; its weights or its configuration were changed: package it again"
        )
    return Replay(difference, limit, recorded.logits_sha256 == logits_sha256(logits))


def _at(ref: AdapterRef, top: tuple[tuple[int, float], ...], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ours and the recorded at the recorded ids."""
    ids = _ids(top)
    if int(ids.max()) >= logits.numel():
        raise AdapterRejected(
            RejectReason.BAD_CONFIG,
            f"lorikeet.json of adapter {ref} has a probe with token {int(ids.max())}; this base has {logits.numel()}",
        )
    return logits[ids], torch.tensor([logit for _, logit in top], dtype=torch.float32)


def _ids(top: tuple[tuple[int, float], ...]) -> Tensor:
    return torch.tensor([number for number, _ in top])


def _mismatch(message: str) -> AdapterRejected:
    return AdapterRejected(RejectReason.PROBE_MISMATCH, message)
