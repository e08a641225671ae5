"""Identity: which run a checkpoint is of.

Two runs are the same when their adapters would be: the same rows, the same base, and the same value for every key of
the recipe that decides something about the adapter. What a run is called, how often it is saved or shown and how it is
judged may change in between; so may the number of processes, which shifts sums by rounding only.

Owns: which keys those are. Does not know: folders. Place in a training run: before its first step, to be written into
each checkpoint and compared when one is found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from training.loop.checkpoints import Identity
from training.recipe.sources import recipe_as_dict

if TYPE_CHECKING:
    from base.model import BaseModel
    from training.model.collator import Examples
    from training.recipe.recipe import Recipe

FREE: Final = frozenset(
    {
        "name", "data", "eval", "eval_split", "data_root", "format", "columns", "on_bad",  # the rows themselves count
        "log_steps", "save_steps", "keep_checkpoints", "report_to", "vision_cache_mib",
        "metrics", "gate", "eval_rows", "max_new_tokens", "sample_rows",
    }
)  # fmt: skip
"""Keys that may differ when a run goes on."""


def identity_of(
    recipe: Recipe, base: BaseModel, train_rows: Examples, eval_rows: Examples | None
) -> Identity:
    """Opens each row's pictures once, for their digests."""
    splits = {"train": train_rows} | ({} if eval_rows is None else {"eval": eval_rows})
    deciding = {key: value for key, value in recipe_as_dict(recipe).items() if key not in FREE}
    return Identity(
        data={split: _digest(rows) for split, rows in splits.items()},
        recipe={**dict(_dotted("", deciding)), "base.fingerprint": base.spec.fingerprint},
    )


def _digest(rows: Examples) -> str:
    return hashlib.sha256("".join(row.digest() for row in rows.rows).encode()).hexdigest()


def _dotted(prefix: str, values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Leaves by dotted key, as the recipe's file has them."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value
