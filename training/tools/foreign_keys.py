"""Tensor names that other trainers write, taken apart.

Owns the spellings beyond PEFT's own: adapter names as infix, wrappers of DDP and ``torch.compile``, down and up for A
and B, and kohya's flattened module names. The layouts of Qwen2.5-VL's modules are ``adapters.keys``'; this only brings
names there. Place in a training run: none; under ``import``.

    module._orig_mod.base_model.model. | model.layers.0.self_attn.q_proj | .lora_A.my_adapter.weight
    lora_unet_                         | model_layers_0_self_attn_q_proj | .lora_down.weight, .alpha
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from adapters.keys import parse_key


class ForeignRole(StrEnum):
    """What a tensor is to its module."""

    A = "A"
    B = "B"
    MAGNITUDE = "magnitude"
    ALPHA = "alpha"


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """One tensor's name, taken apart."""

    module: str
    """As the trainer spells it, without wrappers; its configuration's patterns speak this name."""
    site: str
    """In today's layout; a name of no known layout as it is."""
    role: ForeignRole
    adapter: str
    """The adapter's name in it (``default``); empty when there is none."""


_SUFFIXES: Final[tuple[tuple[re.Pattern[str], ForeignRole], ...]] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"\.lora_[Aa](\.(?!weight$)(?P<adapter>[^.]+))?(\.weight)?", ForeignRole.A),
        (r"\.lora_[Bb](\.(?!weight$)(?P<adapter>[^.]+))?(\.weight)?", ForeignRole.B),
        (r"(\.lora|\.lora_linear_layer)?[._](lora_)?down\.weight", ForeignRole.A),
        (r"(\.lora|\.lora_linear_layer)?[._](lora_)?up\.weight", ForeignRole.B),
        (r"\.lora_magnitude_vector(\.(?!weight$)(?P<adapter>[^.]+))?(\.weight)?", ForeignRole.MAGNITUDE),
        (r"\.alpha", ForeignRole.ALPHA),
    )
)
_WRAPPERS: Final = ("base_model.model.", "module.", "_orig_mod.", "base_model.")
_FLAT_PREFIX: Final = re.compile(r"(lora|lycoris)_((te\d?|unet|transformer|llm|vlm|model)_)?")
_OLD_SPELLINGS: Final = (
    (
        "model.language_model.layers.",
        ("model.layers.", "language_model.model.layers.", "language_model.layers.", "layers."),
    ),
    ("model.visual.", ("visual.",)),
)


def parse_foreign(name: str, flat_names: Mapping[str, str]) -> ForeignKey | None:
    """``name`` taken apart, or None when no known trainer ends a LoRA tensor's name so.

    ``flat_names`` are ``flattened``'s, which alone can tell where a flattened name's dots were.
    """
    for pattern, role in _SUFFIXES:
        match = re.search(pattern.pattern + "$", name)
        if match is None:
            continue
        module = _unwrapped(name[: match.start()])
        adapter = match.groupdict().get("adapter") or ""
        return ForeignKey(module, _site(module, flat_names), role, adapter)
    return None


def flattened(sites: Iterable[str]) -> dict[str, str]:
    """Every spelling of the sites with ``_`` for each dot, to the site."""
    flat: dict[str, str] = {}
    for site in sites:
        for spelling in (site, *_spellings(site)):
            flat[spelling.replace(".", "_")] = site
    return flat


def _spellings(site: str) -> Iterable[str]:
    for today, olds in _OLD_SPELLINGS:
        if site.startswith(today):
            yield from (old + site.removeprefix(today) for old in olds)


def _unwrapped(module: str) -> str:
    module = module.replace("._orig_mod.", ".")
    while (wrapper := next((each for each in _WRAPPERS if module.startswith(each)), None)) is not None:
        module = module.removeprefix(wrapper)
    return module


def _site(module: str, flat_names: Mapping[str, str]) -> str:
    if "." not in module:
        found = [name for name in _unprefixed(module) if name in flat_names]
        return flat_names[found[0]] if found else module
    key = parse_key(f"{module}.lora_A.weight")
    return module if key is None else key.site


def _unprefixed(module: str) -> tuple[str, ...]:
    """A flattened name without what kohya's trainers put before it: ``lora_unet_``, or ``lora_`` alone."""
    match = _FLAT_PREFIX.match(module)
    if match is None:
        return (module,)
    return (module, module.removeprefix(f"{match.group(1)}_"), module[match.end() :])
