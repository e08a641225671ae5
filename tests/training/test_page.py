"""The page on training data says what is so: each row of it is read, each format and fault is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.training.rows import put_pictures
from training.data.faults import FaultKind
from training.data.formats import Conversation, DataFile, Format
from training.data.formats.shapes import REQUIRED

PAGE = (Path(__file__).parents[2] / "docs" / "training-data.md").read_text("utf-8")
ROWS = PAGE.split("```jsonl\n")[1].split("```")[0].splitlines()


@pytest.mark.parametrize(("kind", "row"), list(zip(Format, ROWS, strict=True)))
def test_each_format_s_example_is_of_that_format(tmp_path: Path, kind: Format, row: str) -> None:
    put_pictures(tmp_path)
    (tmp_path / "rows.jsonl").write_text(row, "utf-8")
    file = DataFile(tmp_path / "rows.jsonl")
    assert [type(item) for item in file] == [Conversation]
    assert file.kind == kind


def test_each_format_s_fields_are_told() -> None:
    told = {
        name: set(re.findall(r"`(\w+)`", fields))
        for name, fields in re.findall(r"\| `(\w+)` \| (.*?) \| .* \|\n", PAGE)
    }
    assert {str(kind): set(fields) for kind, fields in REQUIRED.items()} == {
        kind: told[kind] for kind in Format
    }


def test_the_faults_are_those_that_exist() -> None:
    table = PAGE.split("## What can be wrong")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == [str(kind) for kind in FaultKind]
