"""DataFile: a data file read as Conversations, its format found from the first row and enforced on every other.

Owns: which format a file is in. Does not know: tokens, other files, what is done about a fault.
Place in a training run: the first phase, under the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from training.data.faults import Fault, FaultKind, Found, RowRejected
from training.data.formats.conversation import Conversation
from training.data.formats.drafts import finish
from training.data.formats.fields import Fields, as_fields
from training.data.formats.pictures import PictureRoot
from training.data.formats.rows import Row, read_rows
from training.data.formats.shapes import REQUIRED, Format, drafts_of, formats_of


class DataFile:
    """One file. Iterate once; ``kind`` and ``unused`` are known afterwards."""

    def __init__(
        self,
        path: Path,
        *,
        root: PictureRoot | None = None,
        kind: Format | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """``root`` is the file's own folder if not given; ``kind`` is found if not given."""
        self.path = path
        self.kind = kind
        self._is_named = kind is not None
        self.unused: Counter[str] = Counter()
        """Columns that nothing was learnt from, with the number of rows that have them."""
        self.renamed: set[str] = set()
        """Names of ``columns`` that at least one row had."""
        self._root = root or PictureRoot(path.parent)
        self._columns = columns

    def __iter__(self) -> Iterator[Conversation | Fault]:
        """Each row in the file's order, as a Conversation or as what is wrong with it."""
        for item in read_rows(self.path, self._columns, self.renamed.add):
            yield item if isinstance(item, Fault) else self._conversation(item)

    def _conversation(self, row: Row) -> Conversation | Fault:
        try:
            self.kind = kind = self._kind_of(row)
            fields = Fields(row.fields)
            turns = finish(*drafts_of(kind, fields, self._root))
            tools = tuple(_tool(fields, i, item) for i, item in enumerate(fields.items("tools")))
        except RowRejected as rejected:
            return rejected.complaint.at(row.origin)
        self.unused.update(fields.unread())
        return Conversation(turns, tools, row.origin)

    def _kind_of(self, row: Row) -> Format:
        found = formats_of(row.fields)
        if self.kind is None:
            return _only(found, row)
        if self.kind in found:
            return self.kind
        if self.kind == Format.OPENAI and Format.ROLE_CONTENT in found and not row.fields.get("images"):
            return self.kind
        if found:
            raise RowRejected(
                FaultKind.MIXED_FORMAT, "", Found(f"a row of {found[0]}"),
                f"{self.kind}, as was asked for" if self._is_named else f"{self.kind}, as the rows before",
                f"name the format {found[0]}, or none" if self._is_named
                else "keep one format in a file: split it, or give every row the same fields",
            )  # fmt: skip
        missing = sorted(REQUIRED[self.kind] - row.fields.keys())
        raise RowRejected(
            FaultKind.MISSING_FIELD,
            missing[0],
            list(row.fields),
            f"the fields of {self.kind}",
            "add it, or remove the row",
        )


def _only(found: list[Format], row: Row) -> Format:
    if len(found) == 1:
        return found[0]
    expected = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in REQUIRED.items())
    raise RowRejected(
        FaultKind.UNKNOWN_FORMAT, "", list(row.fields),
        f"the fields of one format ({expected})" if not found else f"one format, not {' and '.join(found)}",
        _fix(row) if not found else "name the format",
    )  # fmt: skip


def _fix(row: Row) -> str:
    for name in row.fields:
        if ";" in name or "\t" in name:
            return f"separate columns by commas, not by {'semicolons' if ';' in name else 'tabs'}"
    return "rename columns, or name the format"


def _tool(fields: Fields, index: int, value: object) -> Mapping[str, object]:
    as_fields(value, f"{fields.at('tools')}[{index}]")
    return dict(value) if isinstance(value, dict) else {}
