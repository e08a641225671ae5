"""What docs/recipes.md repeats from the code: the table of fields, the bundled recipes, names of other trainers.

Owns those tables, between marks in the page. ``python -m training.recipe.page docs/recipes.md`` writes them anew; a
test compares. Place in a training run: none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import groupby
from pathlib import Path

from training.recipe.file import FOLDER, bundled
from training.recipe.flags import default_of
from training.recipe.names import FIXED, IDLE, RENAMED
from training.recipe.recipe import FieldDoc, PartRecipe, Recipe, Stage, doc_of
from training.recipe.sources import KEYS


def fields_table() -> str:
    """A table for each group of fields."""
    names = [field.name for field in fields(Recipe)]
    groups = groupby(names, key=lambda name: doc_of(Recipe, name).group)
    tables = []
    for group, members in groups:
        rows = [_row(f"`{name}`", doc_of(Recipe, name), _default(name)) for name in members]
        tables.append("\n".join([f"### {group}", "", *_head(), *rows]))
    return "\n\n".join(tables)


def _default(name: str) -> str:
    return default_of(name) if name in KEYS else "none"


def parts_table() -> str:
    return "\n".join(
        [*_head(), *(_row(f"`{name}`", doc_of(PartRecipe, name), "none") for name in ("r", "alpha", "lr"))]
    )


def stages_table() -> str:
    names = ("parts", "lr", "rates", "epochs", "max_steps")
    return "\n".join([*_head(), *(_row(f"`{name}`", doc_of(Stage, name), "none") for name in names)])


def recipes_table() -> str:
    rows = [f"| `{name}` | {_opening(FOLDER / f'{name}.yaml')} |" for name in bundled()]
    return "\n".join(["| recipe | for |", "|---|---|", *rows])


def names_table() -> str:
    """Other trainers' names, by what they are called here."""
    keys = sorted(set(RENAMED.values()), key=list(KEYS).index)
    renamed = [f"| `{key}` | {', '.join(f'`{n}`' for n, k in RENAMED.items() if k == key)} |" for key in keys]
    fixed = [
        f"| {', '.join(f'`{name}`' for name in FIXED)} | read only with the value that this trainer has anyway |"
    ]
    idle = f"| {', '.join(f'`{name}`' for name in IDLE)} | left out of a file, with a note: they decide nothing of it |"
    return "\n".join(
        ["| here | elsewhere |", "|---|---|", *renamed, "", "| name | |", "|---|---|", *fixed, idle]
    )


SECTIONS: Mapping[str, Callable[[], str]] = {
    "fields": fields_table,
    "parts": parts_table,
    "stages": stages_table,
    "recipes": recipes_table,
    "names": names_table,
}


def page(text: str) -> str:
    """``text`` with every section between its marks written anew. Raises ValueError when a mark is missing."""
    for name, make in SECTIONS.items():
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- /{name} -->")
        if not opening or not closing:
            raise ValueError(f"the page has no marks <!-- {name} --> and <!-- /{name} -->")
        text = f"{before}{opening}{make()}\n{closing}{after}"
    return text


def _head() -> tuple[str, str]:
    return "| field | unit | default | range | reason |", "|---|---|---|---|---|"


def _row(name: str, doc: FieldDoc, default: str) -> str:
    return f"| {name} | {doc.unit} | {default} | {_range(doc)} | {doc.reason} |".replace("<", "&lt;")


def _range(doc: FieldDoc) -> str:
    limits = (("from", doc.low), ("above", doc.above), ("to", doc.high), ("below", doc.below))
    return " ".join(
        f"{word} {limit:,g}" if limit < 1e7 else f"{word} {limit:,}"
        for word, limit in limits
        if limit is not None
    )


def _opening(path: Path) -> str:
    """The first comment of a recipe: what it is for."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines[: lines.index("")])
    return comment.replace("|", "/")


def main() -> None:
    """Rewrite the page that is named on the command line."""
    path = Path(sys.argv[1])
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
