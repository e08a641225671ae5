"""import: somebody else's adapter made into a plain package that our server takes, or refused with every reason.

Owns the order: read, judge, make plain (names, scale, initialisation), write, check as the server would, prove that it
acts, and only then give it its name. Place in a training run: none; beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch

from adapters.profile import MAX_PROFILE_BYTES
from training.package.provenance import sha256_of, write_provenance
from training.package.whole_folder import check_free, whole_folder
from training.tools.base_files import BaseAtHand, BaseFiles, base_meant, find_base
from training.tools.foreign import ForeignAdapter, read_foreign
from training.tools.foreign_sites import plain_sites
from training.tools.import_report import ImportReport
from training.tools.initial import against, check_convertible, family, from_base
from training.tools.logit_check import LogitCheck, LogitDifference, compare
from training.tools.low_rank import norm
from training.tools.plain import PlainSite, read_adapter, write_plain
from training.tools.refusals import ImportRefused

Progress = Callable[[str, int, int], None]
NO_EFFECT: Final = 1e-6
"""|B A| / (|A| |B|) below which a product is rounding."""


def import_adapter(
    source: Path,
    out: Path,
    *,
    name: str = "",
    base: str | None = None,
    revision: str | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
    initial: Path | None = None,
    check_logits: bool = True,
    on_progress: Progress = lambda phase, done, total: None,
) -> ImportReport:
    """Write a plain package at ``out`` from a foreign folder or ``.safetensors`` file.

    Raises ImportRefused, AdapterRejected, BaseNotAtHand (only for a base that was named), FolderRefused.
    """
    check_free(out)
    on_progress("read", 0, 1)
    foreign = read_foreign(source)
    with find_base(foreign.base_name, base, revision) as found:
        on_progress("read", 1, 1)
        notes: list[str] = []
        sites = plain_sites(foreign, found.sites, alpha=alpha, adapter_name=adapter_name)
        sites = _plain_initialised(foreign, sites, initial, found, notes, on_progress)
        notes += [*_config_notes(foreign), *_base_notes(foreign, found)]
        deltas = _deltas(sites)
        base_name = found.files.checkpoint.name if found.files is not None else found.source
        with whole_folder(out) as partial:
            write_plain(partial, {name: sites[name] for name in deltas}, base_name)
            write_provenance(partial, name or out.name, base_name, "import", _facts(source, foreign, notes))
            report = read_adapter(partial, found.sites).report
            logits = _prove(found.files, partial, on_progress) if check_logits else None
        return ImportReport(
            folder=out,
            source=str(source),
            source_sha256=sha256_of(foreign.file),
            base=base_name,
            package=report,
            deltas=deltas,
            num_silent=len(sites) - len(deltas),
            logits=logits,
            notes=tuple(notes),
        )


def _plain_initialised(
    foreign: ForeignAdapter,
    sites: dict[str, PlainSite],
    initial: Path | None,
    found: BaseAtHand,
    notes: list[str],
    on_progress: Progress,
) -> dict[str, PlainSite]:
    """The adapter against the untouched base, whatever its initialisation took out of it."""
    init = (foreign.config or {}).get("init_lora_weights", True)
    kind = family(init)
    if not kind:
        if initial is not None:
            raise ImportRefused(
                f"--initial is given, and init_lora_weights is {init!r}, which left the base alone: leave it out"
            )
        return sites
    check_convertible(str(init), has_initial=initial is not None, has_base=found.files is not None)
    notes.append(f"{init} made plain LoRA of twice the rank, against the untouched base")
    if initial is not None:
        return against(sites, plain_sites(read_foreign(initial), found.sites))
    if found.files is None:
        raise ImportRefused(f"the base of the {init} adapter is not at hand: name it with --base")
    return from_base(str(init), sites, found.files, on_progress)


def _config_notes(foreign: ForeignAdapter) -> list[str]:
    config = foreign.config
    if config is None:
        return ["there was no adapter_config.json; names, shapes and alpha say all"]
    notes: list[str] = []
    if config.get("fan_in_fan_out"):
        notes.append(
            "fan_in_fan_out was set and is off now: it means the base's storage, and this base's is [out, in]"
        )
    if config.get("use_rslora"):
        notes.append("rsLoRA's scale is written out as alpha: the numbers are the same")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        notes.append("patterns are written out for each module")
    return notes


def _base_notes(foreign: ForeignAdapter, found: BaseAtHand) -> list[str]:
    named = base_meant(foreign.base_name, None)
    if found.files is None:
        where = repr(found.source) if found.source else "which no file names"
        return [f"the base ({where}) is not here, so it was not tried on it: --base names one"]
    if named and named != found.source:
        return [f"adapter_config.json says it was made on {named!r}; taken for {found.source!r}, as you said"]
    return []


def _deltas(sites: Mapping[str, PlainSite]) -> dict[str, float]:
    """The size of what each module adds, without those that add nothing. Raises ImportRefused when none does."""
    deltas: dict[str, float] = {}
    for name, site in sites.items():
        if not all(bool(torch.isfinite(each).all()) for each in (site.a, site.b)):
            raise ImportRefused(f"{name} holds NaN or infinity: the training run diverged")
        size = norm(site.a, site.b)
        scale_of_factors = float(site.a.double().norm() * site.b.double().norm())
        if (size > NO_EFFECT * scale_of_factors and site.alpha != 0) or site.magnitude is not None:
            deltas[name] = abs(site.scale) * size
    if not deltas:
        raise ImportRefused(
            "it changes nothing: B @ A is zero at every module; was it saved before training, or are A and B of "
            "another run?"
        )
    return deltas


def _prove(files: BaseFiles | None, package: Path, on_progress: Progress) -> LogitDifference | None:
    """The base's logits without and with the package, by stock PEFT. Raises ImportRefused when they are the same."""
    if files is None:
        return None
    check = LogitCheck(files.checkpoint)
    on_progress("prove", 0, 2)
    model = check.base()
    plain = check.logits(model)
    on_progress("prove", 1, 2)
    adapted = check.adapted(model, package)
    on_progress("prove", 2, 2)
    found = compare(adapted, adapted, plain)
    if not found.effect > 0:
        raise ImportRefused(
            "the base answers the same with it as without: its change is below the base's precision"
        )
    if not bool(torch.isfinite(adapted).all()):
        raise ImportRefused("the base's logits are not finite with it: the training run diverged")
    return found


def _facts(source: Path, foreign: ForeignAdapter, notes: list[str]) -> dict[str, object]:
    return {
        "source": source.name,
        "weights_file": foreign.file.name,
        "weights_sha256": sha256_of(foreign.file),
        "config": None if _is_long(foreign.config) else foreign.config,
        "notes": list(notes),
    }


def _is_long(config: Mapping[str, object] | None) -> bool:
    """Whether it would take a good part of the space that ``lorikeet.json`` may have."""
    return len(json.dumps(config)) > MAX_PROFILE_BYTES // 4
