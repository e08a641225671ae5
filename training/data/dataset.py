"""check_data: the whole data set judged before a model is loaded, every bad row named in one report.

Owns: what is done about bad rows, duplicates, leaks from training into evaluation, and the data set's hash.
Does not know: one format from another, tensors, models. Place in a training run: its first phase.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from base.processor import Processor
from training.data.checks import RowCheck, RowSize
from training.data.faults import Complaint, Fault, FaultKind, Found, Origin, shown
from training.data.formats import Conversation, DataFile, Format, PictureRoot
from training.data.formats.pictures import DEFAULT_MAX_PIXELS
from training.data.histogram import Histogram
from training.data.report import DataReport, SplitReport

logger = logging.getLogger("lorikeet.training")
OnBad = Literal["error", "skip", "quarantine"]


@dataclass(frozen=True, slots=True)
class DataRules:
    """What the data must satisfy, and what happens to rows that do not."""

    max_length: int | None = None
    """Tokens of a row, pictures included."""
    on_bad: OnBad = "error"
    quarantine: Path | None = None
    """Where ``quarantine`` writes the faults of the rows that it leaves out, as JSON lines."""
    root: Path | None = None
    """Folder that pictures must lie in; each file's own folder if not given."""
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    """Of one picture before resizing."""
    kind: Format | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    """Name in the file -> name of the format."""

    def __post_init__(self) -> None:
        if (self.on_bad == "quarantine") != (self.quarantine is not None):
            raise ValueError("on_bad quarantine needs a file to write to, and only it does")


class DataRejected(Exception):
    """The data has faults and ``on_bad`` is error, or nothing is left. Carries the whole report."""

    def __init__(self, report: DataReport, why: str) -> None:
        self.report = report
        super().__init__(f"{why}\n{report.text()}")


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Rows that may be trained on, and the report on all of them."""

    train: tuple[Conversation, ...]
    eval: tuple[Conversation, ...]
    report: DataReport


def check_data(
    train: Sequence[Path],
    processor: Processor,
    rules: DataRules,
    *,
    eval: Sequence[Path] = (),
    on_row: Callable[[], None] | None = None,
) -> CheckedData:
    """Read and check every row; ``on_row`` is called after each (for a progress bar).

    Raises DataRejected with the report: for any fault when ``on_bad`` is error, always when no row is left to train on,
    or none in the files of ``eval``.
    """
    check = RowCheck(processor, rules.max_length)
    root = (rules.root, processor.images.max_pixels, rules.max_image_pixels)
    held = _Split(check, rules, root, on_row).read(eval)
    asked = {row.question_digest(): row.origin for row in held.rows}
    learnt = _Split(check, rules, root, on_row, asked).read(train)
    report = DataReport(learnt.report(), held.report() if eval else None, (*learnt.faults, *held.faults))
    _check_columns(rules.columns, held.renamed | learnt.renamed, report)
    _settle(report, rules)
    return CheckedData(tuple(learnt.rows), tuple(held.rows), report)


def _check_columns(columns: Mapping[str, str], renamed: Collection[str], report: DataReport) -> None:
    """A name that no row has would be passed over in silence."""
    unknown = sorted(columns.keys() - set(renamed))
    if unknown:
        raise DataRejected(
            report,
            f"columns renames {', '.join(map(repr, unknown))}, which no row has: columns is "
            "NAME_IN_THE_FILE=NAME_OF_THE_FORMAT; correct it, or leave it out",
        )


def _settle(report: DataReport, rules: DataRules) -> None:
    logger.info(
        "data.checked rows=%d bad=%d digest=%s",
        report.train.num_rows,
        report.num_bad_rows,
        report.train.digest,
    )
    if rules.quarantine is not None:
        lines = (json.dumps(fault.as_json(), ensure_ascii=False) + "\n" for fault in report.faults)
        rules.quarantine.write_text("".join(lines), encoding="utf-8")
    if report.faults and rules.on_bad == "error":
        raise DataRejected(report, f"{report.num_bad_rows} rows cannot be trained on (on_bad is error)")
    if not report.train.num_kept:
        raise DataRejected(report, _missing("data", report.train))
    if report.eval is not None and not report.eval.num_kept:
        raise DataRejected(report, _missing("eval", report.eval))


def _missing(name: str, split: SplitReport) -> str:
    """A file that was named and holds nothing is a mistake: without it a run would go on unjudged, say."""
    if split.num_rows:
        return f"no row of {name} is left: none of the {split.num_rows} is without fault"
    return f"there is no row in {name}: the files named for it are empty"


class _Split:
    """The rows of one split as they are judged."""

    def __init__(
        self,
        check: RowCheck,
        rules: DataRules,
        root: tuple[Path | None, int, int],
        on_row: Callable[[], None] | None,
        held_out: Mapping[str, Origin] | None = None,
    ) -> None:
        """``held_out``: questions of the evaluation, which training may not hold."""
        self._check, self._rules, self._root, self._on_row = check, rules, root, on_row
        self._held_out = held_out or {}
        self._seen: dict[str, Origin] = {}
        self._files: list[DataFile] = []
        self._sizes: list[RowSize] = []
        self._num_rows = self._num_examples = self._num_labels = 0
        self.rows: list[Conversation] = []
        self.faults: list[Fault] = []

    def read(self, paths: Iterable[Path]) -> _Split:
        for item in self._items(paths):
            self._num_rows += 1
            if isinstance(item, Fault):
                self.faults.append(item)
            else:
                self._judge(item)
            if self._on_row is not None:
                self._on_row()
        return self

    def _items(self, paths: Iterable[Path]) -> Iterator[Conversation | Fault]:
        for path in paths:
            folder, base_pixels, most_pixels = self._root
            root = PictureRoot(folder or path.parent, base_pixels, most_pixels)
            file = DataFile(path, root=root, kind=self._rules.kind, columns=self._rules.columns)
            self._files.append(file)
            yield from file

    def _judge(self, row: Conversation) -> None:
        complaints, size = self._check.complaints(row)
        if size is not None:
            self._sizes.append(size)
            complaints += self._of_others(row)
        self.faults += [complaint.at(row.origin) for complaint in complaints]
        if size is not None and not complaints:
            self.rows.append(row)
            self._num_examples += size.num_examples
            self._num_labels += size.num_labels

    def _of_others(self, row: Conversation) -> Iterator[Complaint]:
        """What is wrong with a row only because of another."""
        first = self._seen.setdefault(row.digest(), row.origin)
        if first is not row.origin:
            yield Complaint(
                FaultKind.DUPLICATE, "", shown(Found(f"the same as {first}")), "each row once",
                "remove it; to weigh a row more, train longer",
            )  # fmt: skip
        other = self._held_out.get(row.question_digest()) if self._held_out else None
        if other is not None:
            yield Complaint(
                FaultKind.LEAK, "", shown(Found(f"the question of {other} in the evaluation")),
                "training rows that the evaluation does not hold", "remove it from one of them",
            )  # fmt: skip

    @property
    def renamed(self) -> set[str]:
        """Names of ``columns`` that a row had."""
        return {name for file in self._files for name in file.renamed}

    def report(self) -> SplitReport:
        pictured = [size.num_image_tokens for size in self._sizes if size.num_image_tokens]
        unused = sum((file.unused for file in self._files), Counter[str]())
        return SplitReport(
            formats={file.path.name: str(file.kind or "unknown") for file in self._files},
            num_rows=self._num_rows,
            num_kept=len(self.rows),
            num_examples=self._num_examples,
            num_labels=self._num_labels,
            tokens=Histogram.of(size.num_tokens for size in self._sizes),
            image_tokens=Histogram.of(pictured),
            unused_columns=dict(sorted(unused.items())),
            digest=hashlib.sha256("".join(row.digest() for row in self.rows).encode()).hexdigest(),
        )
