"""AdapterManifest: what ``adapter_config.json`` says, checked field by field.

Owns the meaning of the configuration: kind, rank and scale of every module, and which modules it names. Patterns and
targets are read as literal names, never run as regular expressions. Knows no tensors and no base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from adapters.errors import AdapterRejected, RejectReason
from adapters.keys import TensorKey, is_named_by
from adapters.options import check_options
from adapters.strict_json import parse_object

Kind = Literal["lora", "rslora", "dora"]

MAX_ALPHA = 1e6
"""No recipe comes near; beyond it the scale alone would overflow half precision."""

_LITERAL = re.compile(r"\^?[A-Za-z0-9_.\-]+")


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """The parts of a LoRA configuration that matter when it is served."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    """Literal module names to ranks, in the file's order: the first that names a module wins, as in PEFT."""
    alpha_pattern: tuple[tuple[str, float], ...]
    base_name: str
    """The base it was trained on, as the file says; empty when it does not."""
    targets: tuple[str, ...] | None
    """Literal names of targeted modules; None when the file has none or one regular expression."""
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None

    @property
    def kind(self) -> Kind:
        if self.use_dora:
            return "dora"
        return "rslora" if self.use_rslora else "lora"

    def rank_of(self, key: TensorKey) -> int:
        return next((rank for name, rank in self.rank_pattern if is_named_by(key, name)), self.rank)

    def scale_of(self, key: TensorKey, rank: int) -> float:
        """What multiplies B @ A: alpha / r, or alpha / sqrt(r) with rsLoRA (PEFT's ``LoraLayer.update_layer``)."""
        alpha = next((alpha for name, alpha in self.alpha_pattern if is_named_by(key, name)), self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_target(self, key: TensorKey) -> bool:
        """Whether PEFT would load tensors of this module: it drops those that the configuration does not target."""
        if any(is_named_by(key, name) for name in self.excluded):
            return False
        if self.targets is not None and not any(is_named_by(key, name) for name in self.targets):
            return False
        return self.layers is None or _layer_index(key.site) in self.layers


def parse_manifest(data: bytes) -> AdapterManifest:
    """The manifest in ``adapter_config.json``.

    Raises AdapterRejected: bad_config when a value is malformed, unsupported_kind when it is not LoRA, and
    unsupported_option when an option would change the result in a way that is not served.
    """
    try:
        config = parse_object(data)
    except (ValueError, RecursionError) as error:
        raise _bad(f"it cannot be read: {error}") from None
    _check_kind(config)
    check_options(config)
    return AdapterManifest(
        rank=_rank(config.get("r", 8), "r"),
        alpha=_alpha(config.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_flag(config, "use_rslora"),
        use_dora=_flag(config, "use_dora"),
        rank_pattern=tuple(
            (key, _rank(value, "rank_pattern")) for key, value in _pattern(config, "rank_pattern")
        ),
        alpha_pattern=tuple(
            (key, _alpha(value, "alpha_pattern")) for key, value in _pattern(config, "alpha_pattern")
        ),
        base_name=_text(config, "base_model_name_or_path"),
        targets=_names(config, "target_modules"),
        excluded=_names(config, "exclude_modules") or (),
        layers=_layers(config),
    )


def _bad(message: str) -> AdapterRejected:
    return AdapterRejected(RejectReason.BAD_CONFIG, f"adapter_config.json: {message}")


def _check_kind(config: Mapping[str, object]) -> None:
    kind = config.get("peft_type")
    if kind is None:
        raise _bad("it has no peft_type; save the adapter with PEFT's save_pretrained")
    if kind != "LORA":
        raise AdapterRejected(
            RejectReason.UNSUPPORTED_KIND,
            f"adapter_config.json says peft_type {ascii(kind)[:64]}; this server serves LORA "
            "(plain, rsLoRA, DoRA, rank and alpha patterns): convert or retrain the adapter",
            (ascii(kind)[:64],),
        )


def _rank(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(f"{field} holds {ascii(value)[:64]}; a rank is a whole number from 1")
    return value


def _alpha(value: object, field: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_ALPHA:  # type: ignore[arg-type]
        raise _bad(f"{field} holds {ascii(value)[:64]}; an alpha is a finite number up to {MAX_ALPHA:g}")
    return float(value)  # type: ignore[arg-type]


def _flag(config: Mapping[str, object], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise _bad(f"{field} holds {ascii(value)[:64]}; it is true or false")
    return bool(value)


def _text(config: Mapping[str, object], field: str) -> str:
    value = config.get(field)
    if value is not None and not isinstance(value, str):
        raise _bad(f"{field} holds {ascii(value)[:64]}; it is text")
    return value or ""


def _pattern(config: Mapping[str, object], field: str) -> list[tuple[str, object]]:
    value = config.get(field)
    if value is None:
        return []
    if not isinstance(value, dict):
        raise _bad(f"{field} holds {ascii(value)[:64]}; it maps module names to numbers")
    return [(_literal(key, field), number) for key, number in value.items()]


def _literal(key: str, field: str) -> str:
    name = key.replace("\\.", ".").removesuffix("$")
    if not _LITERAL.fullmatch(name):
        raise AdapterRejected(
            RejectReason.UNSUPPORTED_OPTION,
            f"adapter_config.json: {field} has the key {ascii(key)[:96]}, a regular expression; patterns are read as "
            "literal module names here: write out each module that it means",
            (ascii(key)[:96],),
        )
    return name


def _names(config: Mapping[str, object], field: str) -> tuple[str, ...] | None:
    value = config.get(field)
    if value is None or isinstance(value, str):
        return None  # one regular expression (or all-linear): the tensors themselves say what it matched
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _bad(f"{field} holds {ascii(value)[:64]}; it is a list of module names, or text")
    return tuple(value) or None


def _layers(config: Mapping[str, object]) -> tuple[int, ...] | None:
    value = config.get("layers_to_transform")
    indices = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise _bad(f"layers_to_transform holds {ascii(value)[:64]}; it is a list of layer numbers")
    return tuple(indices) or None


def _layer_index(site: str) -> int | None:
    """The first numbered segment that is not the last, as PEFT's ``check_target_module_exists`` finds it."""
    return next((int(token) for token in site.split(".")[2:-1] if token.isdigit()), None)
