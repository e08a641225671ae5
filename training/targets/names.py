"""A recipe's ``targets`` read against a base: an anchored expression, or a plain list of names.

Owns the trap of Qwen2.5-VL's names: gate_proj, up_proj and down_proj are linears of the language model and of the
vision tower. A list of plain names is narrowed to the language model and says so; an expression that reaches the tower
without naming it is refused. Does not know: ranks, PEFT. Place in a training run: under `targets.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from adapters.sites import Site

_PLAIN = re.compile(r"[A-Za-z0-9_.]+(\s*,\s*[A-Za-z0-9_.]+)*\s*")
_NAMES_TOWER = re.compile(r"visual|blocks|merger|attn\\?\.(qkv|proj)|qkv")
"""What an expression holds that means the tower or the merger on purpose."""
_SHARED = ("embed_tokens", "lm_head", "norm", "patch_embed", "all-linear")


class TargetsError(ValueError):
    """``targets``, a pattern or a part names what the base does not have, or more than was meant."""


def read_targets(text: str, sites: Mapping[str, Site]) -> tuple[list[Site], tuple[str, ...]]:
    """The sites that ``text`` names, in the base's order, and notes on what was understood otherwise.

    Raises TargetsError.
    """
    if text.strip() == "all-linear":
        raise TargetsError(
            "targets 'all-linear' would take the vision tower and the patch embedding with it: "
            "name presets instead (language; all is language, vision and merger)"
        )
    if _PLAIN.fullmatch(text.strip()) and not _matches(text, sites):
        return _from_names([name.strip() for name in text.split(",")], sites)
    return _from_expression(text, sites), ()


def is_named_by(site: Site, literal: str) -> bool:
    """Whether ``literal`` is the module's whole name or the end of it from a dot on, as PEFT reads names.

    Whole names of older layouts (``model.layers.0…``, ``visual…``) are read too.
    """
    literal = literal.removeprefix("^").replace("\\.", ".").removesuffix("$")
    if site.name == literal or site.name.endswith("." + literal):
        return True
    return literal.startswith(("model.layers.", "language_model.")) and site.name.endswith(
        "." + literal[literal.find("layers.") :]
    )


def near(name: str, sites: Iterable[Site]) -> str:
    """``; did you mean …?`` with a leaf or a module's name, or nothing."""
    known = {word for site in sites for word in (site.leaf, site.leaf.split(".")[-1], site.name)}
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _matches(expression: str, sites: Mapping[str, Site]) -> list[Site]:
    try:
        pattern = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise TargetsError(f"targets is no regular expression ({error}): {expression[:200]!r}") from error
    return [site for site in sites.values() if pattern.fullmatch(site.name)]


def _from_expression(expression: str, sites: Mapping[str, Site]) -> list[Site]:
    chosen = _matches(expression, sites)
    if not chosen:
        some = ", ".join(list(sites)[:2])
        raise TargetsError(
            f"targets {expression[:200]!r} matches no module: it must match whole names, such as {some}"
        )
    stray = [site for site in chosen if site.part != "language"]
    if stray and not _NAMES_TOWER.search(expression):
        raise TargetsError(
            f"targets {expression[:200]!r} also matches {len(stray)} modules outside the language model, such as "
            f"{stray[0].name}: begin it with model\\.language_model\\. to leave them out, or name visual to mean them"
        )
    return chosen


def _from_names(names: list[str], sites: Mapping[str, Site]) -> tuple[list[Site], tuple[str, ...]]:
    by_name = {name: [site for site in sites.values() if is_named_by(site, name)] for name in names}
    for name, found in by_name.items():
        if not found:
            raise TargetsError(_unknown(name, sites))
    shared = [name for name, found in by_name.items() if len({site.part for site in found}) > 1]
    if shared and any(
        site.part != "language" for name in names if name not in shared for site in by_name[name]
    ):
        raise TargetsError(
            f"targets names {', '.join(shared)}, which the language model and the vision tower both have, beside "
            "modules of the tower: use presets (language, vision, merger), or one anchored expression"
        )
    left_out = {site.name for name in shared for site in by_name[name] if site.part != "language"}
    meant = {site.name for found in by_name.values() for site in found} - left_out
    chosen = [site for name, site in sites.items() if name in meant]
    return chosen, (_narrowed(shared, len(left_out), len(chosen)),) if shared else ()


def _narrowed(shared: list[str], num_left_out: int, num_chosen: int) -> str:
    return (
        f"targets: {', '.join(shared)} are also names of {num_left_out} linears of the vision tower, which a plain "
        f"list of names would train by accident; narrowed to the {num_chosen} of the language model "
        "(preset language,vision means both)"
    )


def _unknown(name: str, sites: Mapping[str, Site]) -> str:
    if any(word in name for word in _SHARED):
        return (
            f"targets names {name!r}: embeddings, head, norms and patch embedding belong to the base that all "
            "adapters share and stay as they are; name linears of its layers"
        )
    return (
        f"targets names {name!r}, which is no linear that an adapter may change{near(name, sites.values())}"
    )
