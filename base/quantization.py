"""Which linears are in 4 bits, decided before loading: by us for 16-bit checkpoints, by the files for 4-bit ones.

Skip lists in the wild spell modules in older layouts (``visual`` for ``model.visual``) and then match nothing. So the
list is made anew: from the tensors that a pre-quantised checkpoint really holds, or for the language linears.

Place in a request's way: none; once, at load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

from base.checkpoint import Checkpoint, tensor_names
from base.config import BaseConfig
from base.errors import BaseNotFound, UnsupportedBase

SKIPPED_MODULES: Final = ("model.visual", "lm_head")
"""Kept in 16 bits: the vision MLP's widths do not suit 4-bit kernels, and the head decides near ties."""
_QUANTISED_KEY: Final = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__(nf4|fp4)")
_OLD_PREFIXES: Final = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?=layers\.)"), "model.language_model."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
)


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """What to give to transformers, and what must come of it."""

    kind: str
    """``nf4``, ``fp4`` or ``none``."""
    four_bit_names: frozenset[str]
    """Linears that must be in 4 bits after loading, in today's layout."""
    on_the_fly: BitsAndBytesConfig | None = None
    """For a 16-bit checkpoint."""
    stored: dict[str, object] | None = None
    """For a pre-quantised checkpoint: its own configuration with the skip list made anew."""


def plan_quantization(checkpoint: Checkpoint, base: BaseConfig) -> QuantizationPlan:
    """Raises UnsupportedBase when a pre-quantised checkpoint's 4-bit tensors are no such model's."""
    linears = _linear_names(checkpoint)
    if checkpoint.stored_quantization is not None:
        return _stored_plan(checkpoint, base, linears)
    if base.quantization == "none":
        return QuantizationPlan(kind="none", four_bit_names=frozenset())
    four_bit = frozenset(n for n in linears if not n.startswith(tuple(f"{s}." for s in SKIPPED_MODULES)))
    on_the_fly = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, base.dtype),
        llm_int8_skip_modules=list(SKIPPED_MODULES),
    )
    return QuantizationPlan(kind="nf4", four_bit_names=four_bit - set(SKIPPED_MODULES), on_the_fly=on_the_fly)


def today_name(name: str) -> str:
    """A module's name in today's layout."""
    for pattern, prefix in _OLD_PREFIXES:
        name, count = pattern.subn(prefix, name)
        if count:
            break
    return name


def _stored_plan(checkpoint: Checkpoint, base: BaseConfig, linears: frozenset[str]) -> QuantizationPlan:
    try:
        names = frozenset().union(*(tensor_names(path) for path in checkpoint.weight_files))
    except (OSError, SafetensorError) as error:
        raise BaseNotFound(base.source, f"its weights cannot be read ({error}): fetch them again") from error
    four_bit, kinds = _stored_modules(names)
    if not four_bit or len(kinds) != 1 or (unknown := sorted(four_bit - linears)):
        found = f"such as {unknown[0]}" if four_bit and len(kinds) == 1 else f"of kinds {sorted(kinds)}"
        raise UnsupportedBase(
            base.source, f"its {len(four_bit)} 4-bit tensors, {found}, are not a Qwen2.5-VL's"
        )
    stored = dict(checkpoint.stored_quantization or {})
    stored["llm_int8_skip_modules"] = sorted(linears - four_bit)
    stored["bnb_4bit_compute_dtype"] = base.dtype
    return QuantizationPlan(kind=kinds.pop(), four_bit_names=four_bit, stored=stored)


def _stored_modules(names: Iterable[str]) -> tuple[frozenset[str], set[str]]:
    """The modules that 4-bit tensors belong to, and the kinds of 4 bits."""
    matches = [match for name in names if (match := _QUANTISED_KEY.fullmatch(name))]
    return frozenset(today_name(match.group(1)) for match in matches), {match.group(2) for match in matches}


def _linear_names(checkpoint: Checkpoint) -> frozenset[str]:
    with torch.device("meta"):
        skeleton = Qwen2_5_VLForConditionalGeneration(checkpoint.config)
    return frozenset(name for name, child in skeleton.named_modules() if isinstance(child, nn.Linear))
