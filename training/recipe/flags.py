"""One flag for each key of a recipe, generated from its fields, so none can be missing or stale.

Owns: spelling and help of the flags: ``--max-length``, ``--merger.lr``, ``--rslora/--no-rslora``; names of other
trainers are taken too (``--lora-r``), unlisted. Does not know: what a value may be; the flags' texts go to
``resolve_recipe`` as they are. Place in a training run: the command line, before it; no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, get_origin

import typer

from training.recipe.names import FIXED, RENAMED
from training.recipe.recipe import PartRecipe, doc_of
from training.recipe.sources import KEYS
from training.recipe.values import hints_of

Action = Callable[[Mapping[str, object], Mapping[str, object]], None]
"""Called with the recipe's flags that were given (dotted key -> text or Boolean), and the command's own values."""

_SWITCHES = frozenset(
    {"use_rslora", "use_dora", "gradient_checkpointing", "use_gradient_checkpointing", "fp16", "bf16"}
    | {
        "load_in_4bit",
        "load_in_8bit",
        "do_train",
        "group_by_length",
        "freeze_vision_tower",
        "train_on_inputs",
    }
)
"""Other trainers' names that take no value."""


def _dashed(name: str) -> str:
    return name.replace("_", "-")


CONTEXT: dict[str, object] = {"max_content_width": 110, "token_normalize_func": _dashed}
"""Of the parser that holds the command: ``--max_length`` is ``--max-length``."""


def flags_command(action: Action, others: Sequence[inspect.Parameter] = ()) -> Callable[..., None]:
    """A function whose signature has one option for each key of a recipe behind ``others``, the command's own
    parameters (which win where a name is taken twice); it calls ``action``.

    Register it with typer under ``CONTEXT``.
    """
    own = {parameter.name for parameter in others}
    mine = {parameter.name: parameter for parameter in recipe_parameters() if parameter.name not in own}
    keys = {_name(key): key for key in (*KEYS, *RENAMED, *FIXED, "bf16")}

    def command(**values: object) -> None:
        given = {
            keys[name]: _flatten(values[name]) for name in mine if values.get(name) not in (None, [], ())
        }
        action(given, {name: values[name] for name in own if name in values})

    parameters = [*others, *mine.values()]
    command.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def recipe_parameters() -> list[inspect.Parameter]:
    """One for each key, in the recipe's order, then the unlisted ones of other trainers."""
    listed = [_parameter(key) for key in KEYS]
    unlisted = [_unlisted(key) for key in (*RENAMED, *FIXED, "bf16") if key not in KEYS]
    return [*listed, *unlisted]


def flag_of(key: str) -> str:
    """``--merger.lr`` of ``merger.lr``."""
    return f"--{_dashed(key)}"


def default_of(key: str) -> str:
    """A key's default as help and documentation show it."""
    owner, name = KEYS[key]
    value = {known.name: known for known in fields(owner)}[name].default
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int | str | tuple) and value not in ("", ()):
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "none"


def _parameter(key: str) -> inspect.Parameter:
    owner, name = KEYS[key]
    doc, hint = doc_of(owner, name), hints_of(owner)[name]
    reason = (
        doc.reason.replace("This part's", f"The {key.partition('.')[0]}'s")
        if owner is PartRecipe
        else doc.reason
    )
    text = f"{reason}  [{doc.unit}; default: {default_of(key)}]"
    if hint is bool:
        return _option(key, bool | None, f"{flag_of(key)}/--no-{_dashed(key)}", text)
    is_list = get_origin(hint) is tuple and key != "stages"
    return _option(key, list[str] | None if is_list else str | None, flag_of(key), text)


def _unlisted(key: str) -> inspect.Parameter:
    if key in _SWITCHES:
        return _option(key, bool | None, f"{flag_of(key)}/--no-{_dashed(key)}", None)
    return _option(key, str | None, flag_of(key), None)


def _option(key: str, kind: object, spelling: str, text: str | None) -> inspect.Parameter:
    """``text`` None leaves it out of the help."""
    metavar = None if "/--no-" in spelling else "VALUE"
    option = typer.Option(spelling, help=text, hidden=text is None, show_default=False, metavar=metavar)
    annotation = Annotated[kind, option]  # type: ignore[valid-type]
    return inspect.Parameter(_name(key), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _name(key: str) -> str:
    return key.replace(".", "__")


def _flatten(value: object) -> object:
    """A repeated flag may hold commas too: ``--data a,b --data c`` is three files."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
