"""Tensor names: from every key layout in the wild to ``(site, role)``.

Owns the spelling of names and nothing else: what PEFT, transformers 4 and 5 and their wrappers write in front of and
behind a module's name. Does not know which sites exist; ``placement`` looks the result up in the site table.

    base_model.model. | model.language_model.layers.0.self_attn.q_proj | .lora_A(.default).weight
    wrapper, optional | module, in today's layout or an older one       | role
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What one tensor is to its site."""

    A = "lora_A"
    B = "lora_B"
    MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class TensorKey:
    """One tensor's name, taken apart."""

    module: str
    """The module as the package spells it, without PEFT's wrapper; its patterns and targets speak this name."""
    site: str
    """The same module in today's layout."""
    role: Role


_WRAPPER = "base_model.model."
_LANGUAGE = "model.language_model."
_VISUAL = "model.visual."
_LAYOUTS: tuple[tuple[str, str], ...] = (
    ("model.language_model.model.", _LANGUAGE),
    ("model.language_model.", _LANGUAGE),
    ("language_model.model.", _LANGUAGE),
    ("language_model.", _LANGUAGE),
    ("model.visual.", _VISUAL),
    ("visual.", _VISUAL),
    ("model.layers.", _LANGUAGE + "layers."),
    ("layers.", _LANGUAGE + "layers."),
)
"""Prefixes by which Qwen2.5-VL's two halves have been saved: transformers from 4.52 on; LLaVA-style conversions; and
transformers up to 4.51, where the language model sat directly in ``model`` and the tower in ``visual``."""

_SUFFIXES: dict[str, Role] = {
    f".{role}{adapter}{weight}": role
    for role in Role
    for adapter in ("", ".default")
    for weight in ((".weight",) if role is not Role.MAGNITUDE else (".weight", ""))
}
"""DoRA's magnitude is saved without ``.weight`` by PEFT; with it by tools that dump the state dict."""


def parse_key(name: str) -> TensorKey | None:
    """``name`` taken apart, or None when it is not a LoRA tensor of a Qwen2.5-VL linear in any known layout."""
    role, stem = _split_role(name)
    if role is None:
        return None
    module = stem
    while module.startswith(_WRAPPER):
        module = module.removeprefix(_WRAPPER)
    return TensorKey(module=module, site=_today(module), role=role)


def _today(module: str) -> str:
    """A module's name in today's layout; a name of no known layout comes back as it is."""
    for old, new in _LAYOUTS:
        if module.startswith(old):
            return new + module.removeprefix(old)
    return module


def is_named_by(key: TensorKey, literal: str) -> bool:
    """Whether a target or pattern names this module: all of its name, or the end of it from a dot on.

    PEFT does this with ``(.*\\.)?(literal)$`` over the module's name, where a leading ``^`` means the whole name. The
    name is the package's own spelling, which its author's patterns speak, or today's.
    """
    whole = literal.removeprefix("^")
    if whole in (key.module, key.site):
        return True
    return whole == literal and (key.module.endswith("." + literal) or key.site.endswith("." + literal))


def _split_role(name: str) -> tuple[Role | None, str]:
    for suffix, role in _SUFFIXES.items():
        if name.endswith(suffix):
            return role, name[: -len(suffix)]
    return None, name
