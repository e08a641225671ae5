"""export: a base and one adapter made into one 16-bit checkpoint that needs no adapter.

Owns: what may be merged into what, the order (check, write in a stream, read back, compare answers, rename), and the
tolerances. The source's key layout, file names of settings and untouched tensors stay as they are. Never more than one
tensor is held while writing. Place in a training run: none; after it.

Only a 16-bit (or wider) base is merged into. NF4 keeps 16 levels a block: most of an adapter's small change falls
between two of them, and what comes back has a cosine of 0.02 to 0.05 with it.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

import torch

from adapters.sites import PARTS
from training.package.whole_folder import check_free, whole_folder
from training.tools.base_files import BaseFiles, base_meant, open_base
from training.tools.logit_check import LogitCheck, LogitDifference, compare
from training.tools.merge import SiteFigure
from training.tools.merged_checkpoint import MergedCheckpoint, Progress
from training.tools.plain import ReadAdapter, part_of, read_adapter
from training.tools.refusals import ExportRefused

MAX_SHARD_BYTES: Final = 5 * 10**9
TOLERANCE: Final = 0.05
"""Of the logits' spread. Rounding to bf16 takes 0.2 % of each weight, which on real bases is about 1 % of logits."""
MAX_LOST: Final = 0.5
"""Of the adapter's effect: beyond it the merged model is nearer to the base than to what was trained."""
REPORT_NAME: Final = "merge_report.json"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how true it is."""

    folder: Path
    base: str
    adapter_digest: str
    dtype: str
    files: tuple[str, ...]
    num_bytes: int
    num_untouched: int
    """Tensors that are the base's, bit for bit (where ``dtype`` is the base's own)."""
    sites: tuple[SiteFigure, ...]
    logits: LogitDifference | None
    """None when the comparison was left out."""

    def as_dict(self) -> dict[str, object]:
        facts = {name: value for name, value in asdict(self).items() if name not in ("folder", "logits")}
        return facts | {
            "folder": str(self.folder),
            "logits": None if self.logits is None else self.logits.as_dict(),
        }

    @property
    def text(self) -> str:
        worst = max(self.sites, key=lambda each: each.error)
        lines = [
            f"merged {len(self.sites)} linears of {self.base} into {self.folder} "
            f"({len(self.files)} files of weights, {self.num_bytes / 1e9:.2f} GB, {self.dtype})",
            f"weights: relative error {worst.error:.2g} at most (rounding to {self.dtype} allows {worst.limit:.2g}); "
            f"{self.num_untouched} other tensors are the base's",
        ]
        lines += [self._part_line(part) for part in PARTS if self._of(part)]
        lines.append("logits: not compared" if self.logits is None else self.logits.text)
        return "\n".join(lines)

    def _of(self, part: str) -> list[SiteFigure]:
        return [each for each in self.sites if part_of(each.site) == part]

    def _part_line(self, part: str) -> str:
        found = self._of(part)
        return (
            f"  {part}: {len(found)} linears, change {100 * fmean(each.delta for each in found):.2g} % of the weight, "
            f"of which rounding keeps a cosine of {min(each.kept for each in found):.4f} or more"
        )


def export(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    check_logits: bool = True,
    tolerance: float = TOLERANCE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress = lambda phase, done, total: None,
) -> ExportReport:
    """Write base and adapter as one Hugging Face folder at ``out``, which is whole or not there.

    ``dtype`` None keeps the base's. Raises AdapterRejected, BaseNotAtHand, FolderRefused, and ExportRefused when the
    base is quantised or the result would not be what base and adapter compute together.
    """
    check_free(out)
    named = read_adapter(adapter).manifest.base_name
    source = base_meant(named, base)
    if not source:
        raise ExportRefused("the adapter does not say which base it is for: name it with --base")
    with open_base(source, revision) as files:
        _check_base(files, source)
        read = read_adapter(adapter, files.sites)
        _check_weights(files, read)
        with whole_folder(out) as partial:
            merged = MergedCheckpoint(files, read.weights.sites, partial, dtype, on_progress)
            names = merged.write(max_shard_bytes)
            figures, num_untouched = merged.read_back()
            _check_figures(figures)
            logits = _compare(files, read, partial, on_progress) if check_logits else None
            _check_logits(logits, tolerance)
            report = ExportReport(
                folder=out,
                base=files.checkpoint.name,
                adapter_digest=read.report.digest,
                dtype=merged.dtype_name,
                files=names,
                num_bytes=merged.num_bytes,
                num_untouched=num_untouched,
                sites=figures,
                logits=logits,
            )
            (partial / REPORT_NAME).write_text(json.dumps(report.as_dict(), indent=1) + "\n", "utf-8")
    return report


def _check_base(files: BaseFiles, source: str) -> None:
    if files.is_quantised:
        raise ExportRefused(
            f"the base {source!r} is stored in 4 bits. Merging into 4 bits loses most of an adapter's small change "
            "(what is left has a cosine of 0.02 to 0.05 with it): name the 16-bit checkpoint that it was made from, "
            "such as --base Qwen/Qwen2.5-VL-7B-Instruct"
        )


def _check_weights(files: BaseFiles, read: ReadAdapter) -> None:
    for name in read.weights.sites:
        stored = files.weights.get(name)
        if stored is None:
            raise ExportRefused(f"the base's files hold no weight for {name}: fetch the base again")
        if stored.dtype not in ("F32", "F16", "BF16"):
            raise ExportRefused(
                f"the base's weight of {name} is stored as {stored.dtype}: give a 16-bit one with --base"
            )


def _check_figures(figures: tuple[SiteFigure, ...]) -> None:
    wrong = [each for each in figures if not each.is_true]
    if wrong:
        raise ExportRefused(
            f"{len(wrong)} stored weights are not base and adapter together, such as {wrong[0].site}: relative error "
            f"{wrong[0].error:.2g}, where rounding allows {wrong[0].limit:.2g}. Nothing was written; is the disk sound?"
        )


def _check_logits(found: LogitDifference | None, tolerance: float) -> None:
    if found is None:
        return
    if not found.of_spread <= tolerance:
        raise ExportRefused(
            f"the merged model is not base and adapter. {found.text}; {100 * tolerance:g} % of the spread are allowed. "
            "Nothing was written: try --dtype float32, or --tolerance if you accept it"
        )
    if found.effect > 0 and not found.of_effect <= MAX_LOST:
        raise ExportRefused(
            f"rounding loses the adapter: its change is too small for the base's type. {found.text}. "
            "Nothing was written: export with --dtype float32, or serve the adapter unmerged"
        )


def _compare(files: BaseFiles, read: ReadAdapter, merged: Path, on_progress: Progress) -> LogitDifference:
    """One model at a time: the base, the base with the adapter by PEFT, then what was written."""
    check = LogitCheck(files.checkpoint)
    on_progress("compare logits", 0, 3)
    model = check.base()
    base = check.logits(model)
    on_progress("compare logits", 1, 3)
    wanted = check.adapted_by(model, read.as_plain(), merged)
    on_progress("compare logits", 2, 3)
    del model
    gc.collect()  # the module's cycles would keep a second copy of the base
    made = check.logits(check.load(merged))
    on_progress("compare logits", 3, 3)
    return compare(made, wanted, base)
