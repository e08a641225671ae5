"""Placement: which tensors of a package make up which site, and with what scale.

Owns the match of names and shapes between a package and the base's site table; both validation and loading go through
it, so what is loaded is what was checked. Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters.errors import AdapterRejected, RejectReason
from adapters.keys import Role, TensorKey, parse_key
from adapters.manifest import AdapterManifest
from adapters.safetensors_header import TensorInfo
from adapters.sites import Site, SiteTable


@dataclass(frozen=True, slots=True)
class Placement:
    """One site of one package: its tensors and what multiplies B @ A."""

    site: Site
    rank: int
    scale: float
    a: TensorInfo  # [R, in]
    b: TensorInfo  # [out, R]
    magnitude: TensorInfo | None  # [out]; DoRA only

    @property
    def tensors(self) -> tuple[tuple[Role, TensorInfo], ...]:
        pairs = ((Role.A, self.a), (Role.B, self.b))
        return pairs if self.magnitude is None else (*pairs, (Role.MAGNITUDE, self.magnitude))


_SHARED_MODULES = ("embed_tokens", "lm_head", "patch_embed", "norm", "ln_q", "layernorm")
"""Modules of the base that people do adapt, and that no adapter may change here."""


def place(
    manifest: AdapterManifest, tensors: Mapping[str, TensorInfo], sites: SiteTable, max_rank: int
) -> tuple[Placement, ...]:
    """Every tensor given its place, in the site table's order.

    Raises AdapterRejected: unsupported_option for tensors on modules that no adapter may change, unknown_keys,
    missing_keys, bad_shape, rank_too_large.
    """
    found = _sort_by_site(manifest, tensors, sites)
    _check_complete(manifest, found)
    return tuple(_place_one(manifest, *found[name], sites[name], max_rank) for name in sites if name in found)


_Found = dict[str, tuple[TensorKey, dict[Role, TensorInfo]]]


def _sort_by_site(manifest: AdapterManifest, tensors: Mapping[str, TensorInfo], sites: SiteTable) -> _Found:
    found: _Found = {}
    unknown: list[str] = []
    twice: list[str] = []
    for name, tensor in tensors.items():
        key = parse_key(name)
        if key is None or key.site not in sites or (key.role is Role.MAGNITUDE and not manifest.use_dora):
            unknown.append(name)
            continue
        roles = found.setdefault(key.site, (key, {}))[1]
        if key.role in roles:
            twice.append(name)
        roles[key.role] = tensor
    _refuse_unknown(unknown)
    _refuse_keys(twice, "name a site that another tensor names in another layout; keep one of them")
    untargeted = [key.module for key, _ in found.values() if not manifest.is_target(key)]
    _refuse_keys(
        untargeted, "are not among adapter_config.json's target modules, so PEFT would drop them; list them"
    )
    return found


def _refuse_unknown(names: Sequence[str]) -> None:
    shared = [name for name in names if any(module in name for module in _SHARED_MODULES)]
    if shared:
        raise AdapterRejected(
            RejectReason.UNSUPPORTED_OPTION,
            f"{len(shared)} tensors change embeddings, the head, norms or the patch convolution, which all adapters "
            "share; only the linears of language layers, vision blocks and the merger may be adapted: retrain with "
            "those as target_modules",
            _listed(shared),
        )
    _refuse_keys(
        names, "match no module that an adapter of this base may change; is it made for another model?"
    )


def _refuse_keys(names: Sequence[str], what: str) -> None:
    if names:
        raise AdapterRejected(RejectReason.UNKNOWN_KEYS, f"{len(names)} tensors {what}", _listed(names))


def _listed(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name[:200]!a}" for name in sorted(names)[:10])


def _check_complete(manifest: AdapterManifest, found: _Found) -> None:
    needed = set(Role) if manifest.use_dora else {Role.A, Role.B}
    missing = [
        f"{site}.{role}" for site, (_, roles) in found.items() for role in sorted(needed - roles.keys())
    ]
    if missing or not found:
        what = f"{len(missing)} tensors are missing" if found else "the file holds no LoRA tensors"
        raise AdapterRejected(
            RejectReason.MISSING_KEYS,
            f"{what}: every adapted module needs {', '.join(sorted(needed))}; export the adapter again",
            _listed(missing),
        )


def _place_one(
    manifest: AdapterManifest, key: TensorKey, roles: Mapping[Role, TensorInfo], site: Site, max_rank: int
) -> Placement:
    a, b, magnitude = roles[Role.A], roles[Role.B], roles.get(Role.MAGNITUDE)
    rank = manifest.rank_of(key)
    _check_rank(site, a, max_rank)
    _check_shape(site, Role.A, a, (rank, site.in_features))
    _check_shape(site, Role.B, b, (site.out_features, rank))
    if magnitude is not None:
        _check_shape(site, Role.MAGNITUDE, magnitude, (site.out_features,))
    return Placement(site, rank, manifest.scale_of(key, rank), a, b, magnitude)


def _check_rank(site: Site, a: TensorInfo, max_rank: int) -> None:
    if len(a.shape) == 2 and a.shape[1] == site.in_features and a.shape[0] > max_rank:
        raise AdapterRejected(
            RejectReason.RANK_TOO_LARGE,
            f"{site.name} has rank {a.shape[0]}; this server allows {max_rank} (set max_rank or retrain)",
            (f"{site.name}: rank {a.shape[0]}",),
        )


def _check_shape(site: Site, role: Role, tensor: TensorInfo, wanted: tuple[int, ...]) -> None:
    if tensor.shape != wanted:
        raise AdapterRejected(
            RejectReason.BAD_SHAPE,
            f"{site.name}.{role} has shape {list(tensor.shape)}; this base and the configuration's rank make it "
            f"{list(wanted)}: is the adapter made for another base, or its rank_pattern incomplete?",
            (f"{site.name}.{role}: {list(tensor.shape)} for {list(wanted)}",),
        )
