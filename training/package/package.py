"""write_package: what a run ends in, one folder that stock PEFT loads and that proves itself to the server.

Owns: the order and the atomicity of writing, and the facts that are told. The format of ``lorikeet.json`` is
``adapters.profile``'s, the README's text is ``card.py``'s, the probes are ``proof.py``'s. Does not know: trainers,
metrics, engines. Place in a training run: after the gate, before deploy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from adapters.errors import AdapterRejected
from adapters.keys import parse_key
from adapters.manifest import parse_manifest
from adapters.package import (
    CONFIG_NAME,
    PROFILE_NAME,
    README_NAME,
    WEIGHTS_NAME,
    file_sha256,
    open_package_file,
)
from adapters.profile import (
    BaseFacts,
    GateFacts,
    Json,
    PackageProfile,
    ProcessorFacts,
    RecordedProbe,
    parse_profile,
    profile_json,
)
from adapters.safetensors_header import TensorInfo, read_header
from adapters.strict_json import parse_object
from base.model import BaseModel
from base.processor import Processor
from base.quantization import SKIPPED_MODULES
from training.package.card import card
from training.package.exchange import exchange
from training.package.proof import Agreement, agreement, prove, record_probes, trainer_logits
from training.package.whole_folder import check_free, whole_folder

__all__ = [
    "Agreement",
    "PackageFacts",
    "agreement",
    "base_facts",
    "processor_facts",
    "prove",
    "record_probes",
    "trainer_logits",
    "write_package",
]

_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_RESERVED: Final = frozenset({CONFIG_NAME, WEIGHTS_NAME, PROFILE_NAME, README_NAME})
_MAX_HEADER_BYTES: Final = 1 << 26


@dataclass(frozen=True, slots=True)
class PackageFacts:
    """What ``lorikeet.json`` and the card tell beside the weights. Paths of this machine have no place in it."""

    name: str
    base: BaseFacts
    """The SERVING base: what the adapter was judged and probed on."""
    processor: ProcessorFacts
    recipe: Json = field(default_factory=dict)
    """``recipe_as_dict``'s."""
    data: Json = field(default_factory=dict)
    """``digest``, ``rows``, ``labels`` and what else is worth telling."""
    scores: Mapping[str, float] = field(default_factory=dict)
    base_scores: Mapping[str, float] = field(default_factory=dict)
    gate: GateFacts | None = None
    environment: Json = field(default_factory=dict)
    """Versions, device."""
    probes: tuple[RecordedProbe, ...] = ()


def base_facts(base: BaseModel) -> BaseFacts:
    """Of the base that will serve: take it from the very one that the probes were recorded on."""
    spec = base.spec
    skip = () if spec.quantization == "none" else SKIPPED_MODULES
    return BaseFacts(spec.name, spec.revision, spec.fingerprint, spec.quantization, spec.dtype, skip)


def processor_facts(processor: Processor) -> ProcessorFacts:
    images = processor.images
    return ProcessorFacts(
        processor.tokenizer_sha256, processor.template_sha256, images.min_pixels, images.max_pixels
    )


# ---- writing -----------------------------------------------------------------------------------------------------


def write_package(
    folder: Path, adapter: Path, facts: PackageFacts, *, beside: Sequence[Path] = (), replace: bool = False
) -> Path:
    """Write the package ``folder`` from the plain PEFT folder ``adapter``; it appears whole, or not at all.

    ``beside`` are files to lay next to it, such as a loss plot and samples. An existing folder is refused, or with
    ``replace`` exchanged in one step. Returns ``folder``. Raises FolderRefused, AdapterRejected (the adapter is not
    sound), ValueError (facts that no ``lorikeet.json`` may hold, or a file beside with a package's own name).
    """
    _check_beside(beside)
    if not (replace and folder.is_dir() and not folder.is_symlink()):
        check_free(folder)
        with whole_folder(folder) as partial:
            _fill(partial, adapter, facts, beside)
        return folder
    successor = folder.with_name(f".{folder.name}.next-{os.getpid()}")
    shutil.rmtree(successor, ignore_errors=True)
    with whole_folder(successor) as partial:
        _fill(partial, adapter, facts, beside)
    try:
        exchange(successor, folder)
    finally:
        shutil.rmtree(successor, ignore_errors=True)
    return folder


def _check_beside(beside: Sequence[Path]) -> None:
    names = [path.name for path in beside]
    wrong = sorted({name for name in names if name in _RESERVED or names.count(name) > 1})
    if wrong:
        raise ValueError(f"{wrong[0]} cannot lie beside a package: its name is taken; rename the file")


def _fill(partial: Path, adapter: Path, facts: PackageFacts, beside: Sequence[Path]) -> None:
    with (
        open_package_file(adapter, WEIGHTS_NAME, Path("/")) as source,
        open(partial / WEIGHTS_NAME, "xb") as target,
    ):
        shutil.copyfileobj(source, target)
    config = _config(adapter, facts.base)
    (partial / CONFIG_NAME).write_bytes(config)
    profile = _profile(partial / WEIGHTS_NAME, config, facts)
    (partial / PROFILE_NAME).write_bytes(_checked(profile))
    for path in beside:
        shutil.copyfile(path, partial / path.name)
    (partial / README_NAME).write_text(card(profile, [path.name for path in beside]), "utf-8")


def _config(adapter: Path, base: BaseFacts) -> bytes:
    """PEFT's configuration, with the base's public name in place of whatever path it had on this machine."""
    with open_package_file(adapter, CONFIG_NAME, Path("/")) as file:
        config = parse_object(file.read())
    config |= {"base_model_name_or_path": base.name, "revision": base.revision, "inference_mode": True}
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _profile(weights: Path, config: bytes, facts: PackageFacts) -> PackageProfile:
    return PackageProfile(
        name=facts.name,
        weights_sha256=_sha256(weights),
        base=facts.base,
        processor=facts.processor,
        recipe=facts.recipe,
        data=facts.data,
        scores=facts.scores,
        base_scores=facts.base_scores,
        gate=facts.gate,
        environment=facts.environment,
        profile=_serving_profile(weights, config),
        probes=facts.probes,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_sha256(file)


def _checked(profile: PackageProfile) -> bytes:
    """The document, once it is known that a server reads it back."""
    try:
        data = profile_json(profile)
        parse_profile(data)
    except (TypeError, ValueError, AdapterRejected) as error:
        raise ValueError(f"the package's facts cannot be written to {PROFILE_NAME}: {error}") from error
    return data


def _serving_profile(weights: Path, config: bytes) -> dict[str, object]:
    """What serving it takes, read from the files themselves."""
    manifest = parse_manifest(config)
    with weights.open("rb") as file:
        header = read_header(file, weights.stat().st_size, _MAX_HEADER_BYTES)
    sites = sorted({key.site for name in header if (key := parse_key(name)) is not None})
    return {
        "kind": manifest.kind,
        "rank": max([manifest.rank, *(rank for _, rank in manifest.rank_pattern)]),
        "parts": {part: count for part in _PARTS if (count := sum(_part(site) == part for site in sites))},
        "num_modules": len(sites),
        "num_parameters": sum(_numel(info) for info in header.values()),
        "weights_dtype": "+".join(sorted({_DTYPES.get(info.dtype, info.dtype) for info in header.values()})),
        "num_bytes": weights.stat().st_size,
    }


_PARTS: Final = ("language", "merger", "vision")


def _part(site: str) -> str:
    if site.startswith("model.visual.merger."):
        return "merger"
    return "vision" if site.startswith("model.visual.") else "language"


def _numel(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count
