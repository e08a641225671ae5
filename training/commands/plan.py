"""`lorikeet plan`: what a training run would take of a device's memory, before anything is loaded.

Owns: the command's own options and what it prints. Does not know: formulas (`training/plan/plan.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import typer

from training.commands.parsing import AsJson, RecipeFile, option, parse, value

if TYPE_CHECKING:
    from training.plan.peak import Device

ABOUT: Final = """Foretell the memory of a training run, part by part, and what to change when it does not fit.

    lorikeet plan --base Qwen/Qwen2.5-VL-7B-Instruct --memory 24 --rows-tokens 2048

Nothing is loaded; the published bases need no download. Each key of a recipe is a flag."""
OPTIONS: Final = (
    option("recipe", RecipeFile),
    value("rows_tokens", int | None, "N", "Tokens of the largest row.  [default: max_length]", min=1),
    value("image_tokens", int | None, "N", "Its pictures'.  [default: a megapixel's, or max_pixels]", min=0),
    value("memory", float | None, "GIB", "Of the device.  [default: what is free here]", min=0),
    value("device", str | None, "NAME", "cuda or cpu.  [default: cuda with --memory, else what is here]"),
    option("as_json", AsJson, False),
)


def command(ctx: typer.Context) -> None:
    """Foretell the memory of a training run. --help lists every key of a recipe."""
    parse(ctx.args, "plan", ABOUT, _plan, OPTIONS)


def _plan(flags: Mapping[str, object], own: Mapping[str, object]) -> None:
    from training.commands.ending import ending
    from training.commands.train import resolve
    from training.plan.plan import GIB, plan_memory
    from training.recipe.linter import advise
    from training.run.foresight import base_shape, this_device
    from training.run.outcome import Exit, RunResult

    with ending() as end:
        end.is_told = True
        recipe = resolve(flags, own).recipe
        here, free = this_device()
        memory = own["memory"]
        device = _device(own["device"], here if memory is None else "cuda")
        is_here = memory is None and device == here
        plan = plan_memory(
            base_shape(recipe),
            recipe,
            max_tokens=_count(own["rows_tokens"]),
            image_tokens=_count(own["image_tokens"]),
            device=device,
            memory_bytes=free if is_here else int(memory * GIB) if isinstance(memory, float) else None,
        )
        advice = [str(remark) for remark in advise(recipe)]
        if own["as_json"]:
            typer.echo(json.dumps(plan.as_json() | {"advice": advice}))
        else:
            typer.echo("\n".join([plan.text(), *advice]))
        end.result = RunResult(Exit.DONE if plan.does_fit else Exit.REFUSED, None)


def _device(asked: object, default: Device) -> Device:
    from training.run.outcome import Refused

    known: dict[object, Device] = {None: default, "cuda": "cuda", "cpu": "cpu"}
    if asked not in known:
        raise Refused(f"--device {asked}: there are cuda and cpu")
    return known[asked]


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None
