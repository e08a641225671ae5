"""Targets: exactly which linears an adapter sits on, each with its rank and alpha.

Owns what a preset means, and how a recipe's `targets` is read: presets and expressions become explicit modules here,
before anything is attached, and their number is known. Knows a base by its module's names and widths only, so the meta
device is enough. Place in a training run: before the plan, and again when the adapter is attached.

    recipe (preset | targets, r, alpha, parts, patterns) + module -> Targets (names, ranks, one expression for PEFT)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.sites import PARTS, Site, discover_sites
from training.recipe.recipe import Part, PartRecipe, Preset, Recipe
from training.targets.names import TargetsError, is_named_by, near, read_targets
from training.targets.pattern import literal_of, pattern_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PRESETS", "Target", "Targets", "TargetsError", "resolve_targets", "resolve_targets_on"]

PRESETS: Mapping[Preset, Mapping[Part, tuple[str, ...]]] = {
    "language": {"language": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
    "attention": {"language": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "qv": {"language": ("q_proj", "v_proj")},
    "merger": {"merger": ("merger.mlp.0", "merger.mlp.2")},
    "vision": {"vision": ("attn.qkv", "attn.proj", "gate_proj", "up_proj", "down_proj")},
    "all": {
        "language": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "vision": ("attn.qkv", "attn.proj", "gate_proj", "up_proj", "down_proj"),
        "merger": ("merger.mlp.0", "merger.mlp.2"),
    },
}
"""Preset -> part -> leaf names (``Site.leaf``), in every layer."""


@dataclass(frozen=True, slots=True)
class Target:
    """One linear that the adapter changes by B [out, r] @ A [r, in]."""

    name: str
    """``model.language_model.layers.0.self_attn.q_proj``."""
    part: Part
    leaf: str
    in_features: int
    out_features: int
    r: int
    alpha: float

    @property
    def num_parameters(self) -> int:
        """Of A and B; DoRA's magnitude not counted."""
        return self.r * (self.in_features + self.out_features)

    @property
    def literal(self) -> str:
        """The end of the name that is this module's in every layout."""
        return literal_of(Site(self.name, self.in_features, self.out_features, self.part))


@dataclass(frozen=True, slots=True)
class Targets:
    """What the adapter will sit on, resolved; modules in the base's order."""

    modules: tuple[Target, ...]
    pattern: str
    """For PEFT's ``target_modules``: matches these modules of this base whole, and no other, in every layout."""
    rslora: bool
    dora: bool
    dropout: float
    notes: tuple[str, ...] = ()
    """What was understood otherwise than it was written, for the user to read."""

    @property
    def r(self) -> int:
        """The rank of most modules; the others are in ``rank_pattern``."""
        return Counter(target.r for target in self.modules).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The alpha of most modules; the others are in ``alpha_pattern``."""
        return Counter(target.alpha for target in self.modules).most_common(1)[0][0]

    @property
    def rank_pattern(self) -> dict[str, int]:
        """For PEFT: literal ends of module names -> rank, where it is not ``r``."""
        return {target.literal: target.r for target in self.modules if target.r != self.r}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """For PEFT: literal ends of module names -> alpha, where it is not ``alpha``."""
        return {target.literal: target.alpha for target in self.modules if target.alpha != self.alpha}

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for part in PARTS if self.of(part))

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, DoRA's magnitudes included."""
        magnitudes = sum(target.out_features for target in self.modules) if self.dora else 0
        return sum(target.num_parameters for target in self.modules) + magnitudes

    def counts(self) -> dict[Part, int]:
        """Part -> number of modules; parts without any are left out."""
        return {part: len(self.of(part)) for part in self.parts}

    def of(self, part: Part) -> tuple[Target, ...]:
        return tuple(target for target in self.modules if target.part == part)

    def text(self) -> str:
        """One line a part: how many modules, their leaf names and ranks."""
        lines = [_line(part, self.of(part)) for part in self.parts]
        return "\n".join([*lines, f"{self.num_parameters:,} trainable numbers", *self.notes])


def resolve_targets(recipe: Recipe, module: nn.Module) -> Targets:
    """What ``recipe`` means on ``module``, a Qwen2.5-VL on any device, meta included. Raises TargetsError.

    ``module`` is not changed.
    """
    return resolve_targets_on(recipe, discover_sites(module))


def resolve_targets_on(recipe: Recipe, sites: Mapping[str, Site]) -> Targets:
    """As ``resolve_targets``, on a table of sites alone. Raises TargetsError."""
    chosen, notes = _chosen(recipe, sites)
    modules = tuple(_target(site, recipe) for site in chosen)
    _check_patterns(recipe, modules)
    _check_parts(recipe, modules)
    pattern = pattern_of(chosen, sites)
    return Targets(modules, pattern, recipe.rslora, recipe.dora, recipe.dropout, notes)


def _chosen(recipe: Recipe, sites: Mapping[str, Site]) -> tuple[list[Site], tuple[str, ...]]:
    if recipe.targets is not None:
        return read_targets(recipe.targets, sites)
    named = {
        (part, leaf)
        for preset in recipe.preset
        for part, leaves in PRESETS[preset].items()
        for leaf in leaves
    }
    chosen = [site for site in sites.values() if (site.part, site.leaf) in named]
    if not chosen:
        raise TargetsError(f"preset {', '.join(recipe.preset) or 'none'} names no module of this base")
    return chosen, ()


def _target(site: Site, recipe: Recipe) -> Target:
    """A pattern's first key that names the module wins, then its part's value, then the recipe's: as in PEFT."""
    part = recipe.of(site.part)
    r = part.r if part.r is not None else recipe.r
    alpha = part.alpha if part.alpha is not None else recipe.alpha
    r = next((rank for key, rank in recipe.rank_pattern.items() if is_named_by(site, key)), r)
    alpha = next((a for key, a in recipe.alpha_pattern.items() if is_named_by(site, key)), alpha)
    return Target(site.name, site.part, site.leaf, site.in_features, site.out_features, r, alpha)


def _check_patterns(recipe: Recipe, modules: tuple[Target, ...]) -> None:
    sites = [_site_of(target) for target in modules]
    for field, keys in (("rank_pattern", recipe.rank_pattern), ("alpha_pattern", recipe.alpha_pattern)):
        for key in keys:
            if not any(is_named_by(site, key) for site in sites):
                raise TargetsError(
                    f"{field} names {key!r}, which is no module that this adapter changes{near(key, sites)}; "
                    "give a module's name or its end (q_proj, layers.3.mlp.up_proj): expressions are not read here"
                )


def _check_parts(recipe: Recipe, modules: tuple[Target, ...]) -> None:
    present = {target.part for target in modules}
    for index, stage in enumerate(recipe.stages, start=1):
        for part in stage.parts:
            if part not in present:
                raise TargetsError(
                    f"stage {index} trains {part}, but the adapter has no module there: add the preset {part!r}"
                )
    for part in PARTS:
        if part not in present and recipe.of(part) != PartRecipe():
            raise TargetsError(
                f"{part} has values of its own, but the adapter has no module there: "
                f"add the preset {part!r}, or take the values out"
            )


def _site_of(target: Target) -> Site:
    return Site(target.name, target.in_features, target.out_features, target.part)


def _line(part: Part, targets: tuple[Target, ...]) -> str:
    ranks = Counter((target.r, target.alpha) for target in targets).most_common()
    leaves = ", ".join(dict.fromkeys(target.leaf for target in targets))
    scales = "; ".join(
        f"r {r}, alpha {alpha:g}" + (f" x{n}" if len(ranks) > 1 else "") for (r, alpha), n in ranks
    )
    return f"{part}: {len(targets)} modules ({leaves}), {scales}"
