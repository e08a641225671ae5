"""PackageProfile: what ``lorikeet.json`` says of the adapter beside it, each field with its type and its bound.

Owns the format, both ways: ``parse_profile`` reads what a stranger wrote, ``profile_json`` writes it. Says nothing of
whether it is true: the registry compares the fingerprint and the weights' digest, the engine replays the probes.
Unknown keys are passed over and never acted on. Page: docs/packages.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from adapters.errors import AdapterRejected, RejectReason
from adapters.json_fields import Fields, is_finite
from adapters.package import PROFILE_NAME, open_package_file
from adapters.strict_json import parse_object

FORMAT: Final = 1
MAX_PROFILE_BYTES: Final = 1 << 20
"""Ours take some 20 KB, most of it the recipe and the probes."""
MAX_PROBES: Final = 8
TOP: Final = 64
"""Logits that are kept of each probe: those that can become a token; all of them would be 150,000 numbers."""
MAX_LOGIT: Final = 1e6
MAX_RULES: Final = 64

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base that the adapter was proven on."""

    name: str = ""
    revision: str | None = None
    fingerprint: str = ""
    quantization: str = ""
    dtype: str = ""
    skip: tuple[str, ...] = ()
    """Modules that were left in 16 bits."""


@dataclass(frozen=True, slots=True)
class ProcessorFacts:
    """How its prompts were made."""

    tokenizer_sha256: str = ""
    template_sha256: str = ""
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class GateFacts:
    passed: bool
    rules: tuple[str, ...] = ()
    """Each rule with what it found, as a person reads it."""


@dataclass(frozen=True, slots=True)
class RecordedProbe:
    """One probe prompt, and what the serving engine answered it."""

    text: str
    picture_side: int | None
    """Pixels; None without a picture."""
    ids_sha256: str
    top: tuple[tuple[int, float], ...]
    """Ids and logits of the adapter's largest, largest first."""
    base_top: tuple[tuple[int, float], ...]
    """The same of the base alone."""
    logits_sha256: str = ""
    """Of all the adapter's logits, float32 little-endian: equal only where not a bit differs."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The part that a server proves anew when the adapter comes to the device; small, whatever the file's size."""

    processor: ProcessorFacts
    probes: tuple[RecordedProbe, ...]


@dataclass(frozen=True, slots=True)
class PackageProfile:
    """Everything in ``lorikeet.json``. ``recipe``, ``data``, ``environment`` and ``profile`` are for people."""

    name: str = ""
    weights_sha256: str = ""
    base: BaseFacts = BaseFacts()
    processor: ProcessorFacts = ProcessorFacts()
    recipe: Json = field(default_factory=dict)
    data: Json = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    base_scores: Mapping[str, float] = field(default_factory=dict)
    """The base's on the same rows."""
    gate: GateFacts | None = None
    """None where nothing was judged."""
    environment: Json = field(default_factory=dict)
    profile: Json = field(default_factory=dict)
    """What serving it takes: rank, parts, targets, sizes."""
    probes: tuple[RecordedProbe, ...] = ()

    @property
    def proof(self) -> Proof:
        return Proof(self.processor, self.probes)


def read_profile(
    folder: Path, within: Path | None = None, max_bytes: int = MAX_PROFILE_BYTES
) -> PackageProfile | None:
    """The profile of a package; None where it has none. Links may not lead out of ``within`` (default: the folder).

    Raises AdapterRejected (bad_config, too_large), SourceRejected, OSError.
    """
    if not os.path.lexists(folder / PROFILE_NAME):
        return None
    with open_package_file(folder, PROFILE_NAME, within) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise AdapterRejected(
            RejectReason.TOO_LARGE, f"{PROFILE_NAME} has over {max_bytes} bytes; this server allows no more"
        )
    return parse_profile(data)


def parse_profile(data: bytes) -> PackageProfile:
    """Raises AdapterRejected (bad_config) for anything but a sound document of a format that is known."""
    try:
        return _profile(Fields(parse_object(data)))
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(
            RejectReason.BAD_CONFIG, f"{PROFILE_NAME}: it cannot be read: {error}"
        ) from None


def profile_json(profile: PackageProfile) -> bytes:
    """The document that ``parse_profile`` reads back as an equal profile."""
    document = {
        "format": FORMAT,
        "name": profile.name,
        "weights_sha256": profile.weights_sha256,
        "base": asdict(profile.base),
        "processor": asdict(profile.processor),
        "recipe": profile.recipe,
        "data": profile.data,
        "scores": {"adapter": dict(profile.scores), "base": dict(profile.base_scores)},
        "gate": profile.gate and asdict(profile.gate),
        "environment": profile.environment,
        "profile": profile.profile,
        "probes": [asdict(probe) for probe in profile.probes],
    }
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _profile(fields: Fields) -> PackageProfile:
    version = fields.count("format")
    if version not in (None, FORMAT):
        raise ValueError(
            f"its format is {version}; this release reads {FORMAT}: update it, or remove {PROFILE_NAME}"
        )
    scores = fields.section("scores")
    return PackageProfile(
        name=fields.text("name"),
        weights_sha256=fields.sha256("weights_sha256"),
        base=_base(fields.section("base")),
        processor=_processor(fields.section("processor")),
        recipe=fields.section("recipe").values,
        data=_data(fields.section("data")),
        scores=scores.section("adapter").numbers(),
        base_scores=scores.section("base").numbers(),
        gate=None if fields.values.get("gate") is None else _gate(fields.section("gate")),
        environment=fields.section("environment").values,
        profile=fields.section("profile").values,
        probes=_probes(fields),
    )


def _base(fields: Fields) -> BaseFacts:
    return BaseFacts(
        name=fields.text("name"),
        revision=fields.text("revision") or None,
        fingerprint=fields.text("fingerprint"),
        quantization=fields.text("quantization"),
        dtype=fields.text("dtype"),
        skip=fields.texts("skip", max_items=1024),
    )


def _processor(fields: Fields) -> ProcessorFacts:
    return ProcessorFacts(
        tokenizer_sha256=fields.sha256("tokenizer_sha256"),
        template_sha256=fields.sha256("template_sha256"),
        min_pixels=fields.count("min_pixels"),
        max_pixels=fields.count("max_pixels"),
    )


def _data(fields: Fields) -> Json:
    fields.text("digest")
    for key in ("rows", "labels"):
        fields.count(key)
    return fields.values


def _gate(fields: Fields) -> GateFacts:
    return GateFacts(passed=fields.flag("passed"), rules=fields.texts("rules", MAX_RULES))


def _probes(fields: Fields) -> tuple[RecordedProbe, ...]:
    probes = []
    for i, item in enumerate(fields.items("probes", MAX_PROBES)):
        where = f"probes[{i}]"
        if not isinstance(item, dict):
            raise ValueError(f"{where} must be a JSON object")
        probes.append(_probe(Fields(item, where)))
    return tuple(probes)


def _probe(fields: Fields) -> RecordedProbe:
    return RecordedProbe(
        text=fields.text("text"),
        picture_side=fields.count("picture_side"),
        ids_sha256=fields.sha256("ids_sha256"),
        top=_top(fields, "top"),
        base_top=_top(fields, "base_top"),
        logits_sha256=fields.sha256("logits_sha256"),
    )


def _top(fields: Fields, key: str) -> tuple[tuple[int, float], ...]:
    name = fields.name_of(key)
    top = tuple(_pair(item, name) for item in fields.items(key, TOP))
    if not top or len({number for number, _ in top}) != len(top):
        raise ValueError(f"{name} must name 1 to {TOP} tokens, each once")
    return top


def _pair(item: object, name: str) -> tuple[int, float]:
    number, logit = item if isinstance(item, list) and len(item) == 2 else (None, None)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 31:
        raise ValueError(f"{name} holds {ascii(item)[:64]}; it must hold pairs that begin with a token's id")
    if not is_finite(logit) or abs(logit) > MAX_LOGIT:
        raise ValueError(f"{name} holds {ascii(item)[:64]}; it must hold pairs that end with a finite logit")
    return number, float(logit)
