"""find_shape: the shape of whatever ``--base`` names, without its weights.

Owns: the order in which it is looked for. The two published bases are known by heart, so that a plan for them needs no
hub. Place in a training run: under the plan, before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path

from training.plan.shape import KNOWN_SHAPES, BaseShape, known_shape, shape_of


class BaseUnknown(ValueError):
    """Nothing tells the shape of the base that was named."""


def find_shape(source: str, revision: str | None = None) -> BaseShape:
    """Of ``pocket``, a checkpoint's folder, a published base by its hub id, or any other hub id, whose
    ``config.json`` alone is fetched. Raises BaseUnknown."""
    known = known_shape(source)
    if known is not None and not Path(source).exists():
        return known
    if source == "pocket":
        from base.pocket import CHECKPOINT

        return _read(str(CHECKPOINT), "pocket", None)
    return _read(source, source, revision)


def _read(source: str, name: str, revision: str | None) -> BaseShape:
    """Imports transformers."""
    from transformers import Qwen2_5_VLConfig

    try:
        config = Qwen2_5_VLConfig.from_pretrained(source, revision=revision or "main")
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"it is a {config.model_type}, not a Qwen2.5-VL")
        return shape_of(config, name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        names = ", ".join(shape.name for shape in KNOWN_SHAPES)
        raise BaseUnknown(
            f"the shape of base {name!r} cannot be read ({reason}); known without a hub: pocket, {names}"
        ) from error
