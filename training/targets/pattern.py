"""The regular expression and the literal names by which PEFT is told what an adapter sits on.

Owns their spelling: short where every layer is meant, a list of layers where not, and the same modules in every layout
that a Qwen2.5-VL has been saved in. Does not know: recipes, ranks. Place in a training run: written once, at attaching,
into ``adapter_config.json``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from adapters.sites import Site

_LANGUAGE = r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers"
"""transformers from 4.52 on, LLaVA-style conversions, transformers up to 4.51, and a bare language model."""
_VISUAL = r"(?:model\.)?visual"


def pattern_of(chosen: Iterable[Site], sites: Mapping[str, Site]) -> str:
    """An anchored expression that ``re.fullmatch`` finds for ``chosen`` and for no other of ``sites``.

    PEFT compares a text ``target_modules`` by ``fullmatch`` with whole names, so it needs no ``^`` and ``$``.
    """
    everywhere, meant = _layers_by_leaf(sites.values()), _layers_by_leaf(chosen)
    leaves_of: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (stem, leaf), layers in meant.items():
        is_every = layers == everywhere[stem, leaf] and leaf != ""
        leaves_of[stem, r"\d+" if is_every else _any_of(layers)].append(leaf)
    return "|".join(_branch(stem, layers, leaves) for (stem, layers), leaves in leaves_of.items())


def _branch(stem: str, layers: str, leaves: list[str]) -> str:
    ends = [re.escape(leaf) for leaf in leaves if leaf]
    return rf"{stem}\.{layers}" + (rf"\.{_any_of(ends)}" if ends else "")


def literal_of(site: Site) -> str:
    """The end of a module's name that is the same in every layout and no other module's: ``layers.0.mlp.up_proj``."""
    name = site.name
    return name[name.index("layers.") :] if site.part == "language" else name[name.index("visual.") :]


def _layers_by_leaf(sites: Iterable[Site]) -> dict[tuple[str, str], list[str]]:
    """(stem, leaf with its block) -> numbers of its layers; the merger has no layers but numbered linears."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for site in sites:
        tokens = literal_of(site).split(".")
        if site.part == "language":
            found[_LANGUAGE, ".".join(tokens[2:])].append(tokens[1])
        elif site.part == "vision":
            found[rf"{_VISUAL}\.blocks", ".".join(tokens[3:])].append(tokens[2])
        else:
            found[rf"{_VISUAL}\.merger\.mlp", ""].append(tokens[-1])
    return found


def _any_of(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"
