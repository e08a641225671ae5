"""Site: one linear of the base that an adapter may change, and the table of all of them.

Owns the list of places where LoRA weights may land, under today's names (``model.language_model.layers.0…``), with
their widths. Does not know packages, key layouts or devices. The table is made once, after the base is loaded, and
everything that reads a package or holds adapter weights is measured against it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

Part = Literal["language", "vision", "merger"]
PARTS: tuple[Part, ...] = ("language", "vision", "merger")

_LAYOUT: tuple[tuple[Part, re.Pattern[str]], ...] = (
    (
        "language",
        re.compile(r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"),
    ),
    (
        "vision",
        re.compile(r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)"),
    ),
    ("merger", re.compile(r"model\.visual\.merger\.mlp\.[02]")),
)
"""Module names of ``Qwen2_5_VLForConditionalGeneration`` in transformers 5."""


@dataclass(frozen=True, slots=True)
class Site:
    """One linear, ``[..., in_features] -> [..., out_features]``."""

    name: str
    in_features: int
    out_features: int
    part: Part

    @property
    def leaf(self) -> str:
        """The name that a person would target: ``q_proj``, ``attn.qkv``, ``merger.mlp.0``."""
        tokens = self.name.split(".")
        if self.part == "merger":
            return ".".join(tokens[-3:])
        return tokens[-1] if tokens[-1].endswith("_proj") else ".".join(tokens[-2:])


SiteTable = Mapping[str, Site]


def discover_sites(module: nn.Module) -> dict[str, Site]:
    """All sites of a ``Qwen2_5_VLForConditionalGeneration``, in the module's order.

    Asks for ``in_features`` and ``out_features`` only, so it works on the meta device, over 4-bit linears, and over
    linears that adapters are already attached to. Raises ValueError if the module has no such linears.
    """
    sites = {name: site for name, child in module.named_modules() if (site := _site(name, child)) is not None}
    if not sites:
        raise ValueError(
            f"{type(module).__name__} has no linear that an adapter may change; is it a Qwen2.5-VL?"
        )
    return sites


def _site(name: str, child: nn.Module) -> Site | None:
    for part, pattern in _LAYOUT:
        if pattern.fullmatch(name):
            linear = child if hasattr(child, "in_features") else child.get_submodule("base")
            return Site(name, _width(linear, "in_features"), _width(linear, "out_features"), part)
    return None


def _width(linear: nn.Module, attribute: str) -> int:
    width = getattr(linear, attribute)
    if not isinstance(width, int):
        raise TypeError(f"{type(linear).__name__}.{attribute} is not a whole number")
    return width
