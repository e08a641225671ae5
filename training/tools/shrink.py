"""shrink: an adapter of high rank made into one of low rank, and what that costs, said exactly.

Owns: the choice of each module's rank, the truncation (the best there is, by Eckart and Young, in the Frobenius norm),
and the errors, measured on the numbers that were written. The scale of alpha, rsLoRA and patterns is folded into A and
B, so that the result is plain: alpha = r at every module.
Place in a training run: none; after it.

DoRA: B A is truncated and the magnitudes are kept. Its rows are brought to the same lengths as before, so only their
directions change; the truncation is the best of B A, though not of the weight that DoRA makes of it, whose own error is
stated where the base's weights are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from adapters.sites import PARTS
from adapters.weights import SiteWeights
from training.package.provenance import write_provenance
from training.package.whole_folder import check_free, whole_folder
from training.tools.base_files import BaseFiles, find_base
from training.tools.logit_check import LogitCheck, LogitDifference, compare
from training.tools.low_rank import Product, decompose, distance, norm, rank_for_energy
from training.tools.merge import merged_weight
from training.tools.plain import PlainSite, ReadAdapter, part_of, read_adapter, write_plain
from training.tools.refusals import ToolRefused

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class SiteLoss:
    """What one module lost."""

    site: str
    old_rank: int
    rank: int
    error: float
    """|B A - B' A'| / |B A|, of what was written."""
    norm: float
    """|B A|, scale included."""
    weight_error: float | None = None
    """DoRA: the same of the changed weight itself, |W' - W''| / |W' - W|; None where the base is not at hand."""

    @property
    def kept(self) -> float:
        """Share of the squared norm."""
        return 1 - self.error**2


@dataclass(frozen=True, slots=True)
class ShrinkReport:
    """What was written, and what it cost."""

    folder: Path
    base: str
    kind: str
    sites: tuple[SiteLoss, ...]
    old_bytes: int
    num_bytes: int
    logits: LogitDifference | None
    """None when the base is not at hand, or was not to be asked."""

    @property
    def error(self) -> float:
        """Of all modules as one: the root of the lost over the whole squared norm."""
        return _total(self.sites)

    def as_dict(self) -> dict[str, object]:
        return {
            "folder": str(self.folder),
            "base": self.base,
            "kind": self.kind,
            "error": self.error,
            "kept_energy": 1 - self.error**2,
            "old_bytes": self.old_bytes,
            "num_bytes": self.num_bytes,
            "sites": [asdict(each) | {"kept_energy": each.kept} for each in self.sites],
            "logits": None if self.logits is None else self.logits.as_dict(),
        }

    @property
    def text(self) -> str:
        old, new = max(each.old_rank for each in self.sites), [each.rank for each in self.sites]
        ranks = f"{min(new)}" if min(new) == max(new) else f"between {min(new)} and {max(new)}"
        worst = max(self.sites, key=lambda each: each.error)
        lines = [
            f"shrunk from rank {old} to {ranks} at {len(self.sites)} linears, {self.old_bytes / 1e6:.2f} MB to "
            f"{self.num_bytes / 1e6:.2f} MB: {self.folder}",
            f"relative error {self.error:.3g} in all, energy kept {100 * (1 - self.error**2):.3f} %; "
            f"the worst is {worst.site} with {worst.error:.3g}",
        ]
        for part in PARTS:
            found = tuple(each for each in self.sites if part_of(each.site) == part)
            if found:
                lines.append(f"  {part}: {len(found)} linears, error {_total(found):.3g}")
        known = [each.weight_error for each in self.sites if each.weight_error is not None]
        if self.kind == "dora":
            of_weights = (
                f"of the changed weights {max(known):.3g} at most" if known else "of the weights unknown"
            )
            lines.append(f"DoRA: magnitudes kept; the errors above are of B A, {of_weights}")
        lines.append("logits: not compared" if self.logits is None else self.logits.text)
        return "\n".join(lines)


def shrink(
    adapter: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    revision: str | None = None,
    check_logits: bool = True,
    on_progress: Progress = lambda phase, done, total: None,
) -> ShrinkReport:
    """Write the adapter at ``out`` with at most ``rank`` directions a module, or with as few as hold ``energy``
    (a share, 0 to 1) of each module's squared norm, or with both: as few as hold it, and at most ``rank``.

    Raises ToolRefused, AdapterRejected, FolderRefused, BaseNotAtHand (for a base that was named).
    """
    _check_wish(rank, energy)
    check_free(out)
    named = read_adapter(adapter).manifest.base_name
    with find_base(named, base, revision) as found:
        read = read_adapter(adapter, found.sites)
        plain: dict[str, PlainSite] = {}
        losses: list[SiteLoss] = []
        for number, (name, site) in enumerate(read.weights.sites.items(), 1):
            plain[name] = _truncated(site, rank, energy, dtype)
            losses.append(_loss(name, site, plain[name], found.files))
            on_progress("decompose", number, len(read.weights.sites))
        with whole_folder(out) as partial:
            write_plain(partial, plain, named)
            facts = {
                "rank": rank,
                "energy": energy,
                "from_digest": read.report.digest,
                "error": _total(tuple(losses)),
            }
            write_provenance(partial, out.name, named, "shrink", facts)
            num_bytes = read_adapter(partial, found.sites).report.num_bytes
            logits = _compare(found.files, read, partial, on_progress) if check_logits else None
    return ShrinkReport(
        folder=out,
        base=found.name,
        kind=read.report.kind,
        sites=tuple(losses),
        old_bytes=read.report.num_bytes,
        num_bytes=num_bytes,
        logits=logits,
    )


def _check_wish(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise ToolRefused("say how far to shrink: --rank 16, or --energy 0.99, or both")
    if rank is not None and rank < 1:
        raise ToolRefused(f"--rank is {rank}; a rank is a whole number from 1")
    if energy is not None and not 0 < energy <= 1:
        raise ToolRefused(f"--energy is {energy}; it is a share of the squared norm, above 0 and at most 1")


def _total(sites: tuple[SiteLoss, ...]) -> float:
    whole = sum(each.norm**2 for each in sites)
    return math.sqrt(sum((each.error * each.norm) ** 2 for each in sites) / whole) if whole else 0.0


def _truncated(site: SiteWeights, rank: int | None, energy: float | None, dtype: torch.dtype) -> PlainSite:
    product = decompose(site.a, site.b)
    kept = _rank(product, site.a.shape[0], rank, energy)
    b, a = product.truncated(kept)
    return PlainSite(a.to(dtype), b.to(dtype), alpha=float(kept), magnitude=site.magnitude)


def _rank(product: Product, old: int, rank: int | None, energy: float | None) -> int:
    """At least 1, also where DoRA's B A is zero and its magnitudes do all."""
    wished = old if rank is None else rank
    if energy is not None:
        wished = min(wished, rank_for_energy(product.values, energy))
    return max(1, min(wished, len(product.values)))


def _loss(name: str, old: SiteWeights, new: PlainSite, files: BaseFiles | None) -> SiteLoss:
    size = norm(old.a, old.b)
    lost = distance(old.a, old.b, new.a, new.b)
    return SiteLoss(
        site=name,
        old_rank=old.a.shape[0],
        rank=new.rank,
        error=lost / size if size else 0.0,
        norm=size,
        weight_error=None if old.magnitude is None else _weight_error(name, old, new, files),
    )


def _weight_error(name: str, old: SiteWeights, new: PlainSite, files: BaseFiles | None) -> float | None:
    """What truncation did to the weight that DoRA makes, over what the adapter did to the base's."""
    if files is None or files.is_quantised:
        return None
    weight = files.read(files.weights[name]).float()
    before = merged_weight(weight, old)
    after = merged_weight(weight, SiteWeights(new.a.float(), new.b.float(), new.magnitude))
    change = float(torch.linalg.vector_norm(before - weight))
    return float(torch.linalg.vector_norm(before - after)) / change if change else 0.0


def _compare(
    files: BaseFiles | None, read: ReadAdapter, shrunk: Path, on_progress: Progress
) -> LogitDifference | None:
    """Base, old and new on the same prompts, by stock PEFT; None when the base is not at hand."""
    if files is None:
        return None
    check = LogitCheck(files.checkpoint)
    on_progress("compare logits", 0, 2)
    model = check.base()
    plain = check.logits(model)
    old = check.adapted_by(model, read.as_plain(), shrunk)
    on_progress("compare logits", 1, 2)
    new = check.adapted(model, shrunk)
    on_progress("compare logits", 2, 2)
    return compare(new, old, plain)
