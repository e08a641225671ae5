"""From a foreign adapter's tensors to plain sites: names, shapes and scales resolved, and every reason against it.

Owns the judgement of one foreign adapter by itself: what in it would change the shared base, which tensors make up
which module, which way round they lie, and what multiplies them. Patterns are resolved as PEFT resolves them.
Place in a training run: none; the middle of ``import``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from adapters.errors import AdapterRejected
from adapters.keys import Role, TensorKey
from adapters.manifest import AdapterManifest, parse_manifest
from adapters.options import check_options
from adapters.sites import Site
from training.tools.foreign import ForeignAdapter
from training.tools.foreign_keys import ForeignKey, ForeignRole, flattened, parse_foreign
from training.tools.foreign_scale import Scales
from training.tools.plain import PlainSite
from training.tools.refusals import ImportRefused

_HANDLED: Final = frozenset({"fan_in_fan_out", "init_lora_weights", "peft_type"})
_SHARED: Final = re.compile(
    r"modules_to_save|embed_tokens|lm_head|token_adapter|trainable_tokens|lora_embedding|patch_embed|norm|ln_q|\.bias$"
)
_SITE: Final = re.compile(
    r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"|model\.visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)|merger\.mlp\.[02])"
)
"""What may carry an adapter, where no base is at hand to ask."""


@dataclass(slots=True)
class _Found:
    """The tensors of one module."""

    key: ForeignKey
    tensors: dict[ForeignRole, Tensor] = field(default_factory=dict)


def plain_sites(
    foreign: ForeignAdapter,
    sites: Mapping[str, Site] | None,
    *,
    alpha: float | None = None,
    adapter_name: str | None = None,
) -> dict[str, PlainSite]:
    """Every module of the adapter, in the base's order. ``sites`` None: no base is at hand, names and shapes decide.

    ``alpha`` stands in where no file says it. Raises ImportRefused with all reasons at once.
    """
    config = foreign.config or {}
    reasons = _config_reasons(config)
    found, tensor_reasons = _sort(foreign, sites, adapter_name)
    reasons += tensor_reasons
    if reasons:
        raise ImportRefused(*reasons)
    if not found:
        raise ImportRefused(f"{foreign.file.name} holds no LoRA tensors: is it an adapter?")
    scales = Scales(config, alpha)
    names = [name for name in sites if name in found] if sites is not None else sorted(found)
    plain = {name: _plain(found[name], None if sites is None else sites[name], scales) for name in names}
    _check_targets(config, found)
    return plain


def _config_reasons(config: Mapping[str, object]) -> list[str]:
    """One line for each field that no plain adapter can have."""
    reasons: list[str] = []
    if config.get("peft_type", "LORA") != "LORA":
        reasons.append(f"peft_type is {config['peft_type']!r}: only LORA can be served; retrain as LoRA")
    for name, value in config.items():
        if name in _HANDLED:
            continue
        try:
            check_options({name: value})
        except AdapterRejected as error:
            reasons.append(str(error))
    return reasons


def _sort(
    foreign: ForeignAdapter, sites: Mapping[str, Site] | None, adapter_name: str | None
) -> tuple[dict[str, _Found], list[str]]:
    flat = flattened(sites or ())
    found: dict[str, _Found] = {}
    shared: list[str] = []
    unknown: list[str] = []
    twice: list[str] = []
    adapters: set[str] = set()
    for name, tensor in foreign.tensors.items():
        key = parse_foreign(name, flat)
        if key is None or not _is_site(key.site, sites) or ".modules_to_save." in name:
            (shared if _SHARED.search(name) else unknown).append(name)
            continue
        if adapter_name is not None and key.adapter not in ("", adapter_name):
            continue
        adapters |= {key.adapter} - {""}
        roles = found.setdefault(key.site, _Found(key)).tensors
        if key.role in roles:
            twice.append(name)
        roles[key.role] = tensor
    return found, [*_shared_reasons(shared), *_name_reasons(unknown, twice, adapters, sites)]


def _is_site(name: str, sites: Mapping[str, Site] | None) -> bool:
    return _SITE.fullmatch(name) is not None if sites is None else name in sites


def _shared_reasons(names: list[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{len(names)} tensors change what all adapters share (embeddings, head, norms, biases, whole modules): "
        f"{_listed(names)}; retrain with LoRA on the linears of language layers, vision blocks and the merger only "
        "(bias='none', no modules_to_save, no trainable_token_indices)"
    ]


def _name_reasons(
    unknown: list[str], twice: list[str], adapters: set[str], sites: Mapping[str, Site] | None
) -> list[str]:
    reasons: list[str] = []
    if unknown:
        known = "this base" if sites is not None else "a Qwen2.5-VL (no base is at hand: --base)"
        reasons.append(
            f"{len(unknown)} tensors are no LoRA weights of {known}: {_listed(unknown)}; is the adapter made for "
            "another model, or of another kind (LoHa, LoKr, IA3)?"
        )
    if len(adapters) > 1:
        reasons.append(
            f"the file holds several adapters ({', '.join(sorted(adapters))}): name one with --adapter-name"
        )
    elif twice:
        reasons.append(
            f"{len(twice)} tensors name a module that another tensor names in another layout: {_listed(twice)}; "
            "keep one of them"
        )
    return reasons


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"{name[:120]!a}" for name in sorted(names)[:4])
    return f"{shown}, …" if len(names) > 4 else shown


def _plain(found: _Found, site: Site | None, scales: Scales) -> PlainSite:
    tensors, module = found.tensors, found.key.module
    lacking = [role for role in (ForeignRole.A, ForeignRole.B) if role not in tensors]
    has_magnitude = ForeignRole.MAGNITUDE in tensors
    if lacking or (bool(scales.config.get("use_dora")) != has_magnitude and scales.config):
        what = lacking[0] if lacking else "DoRA magnitude, which adapter_config.json and tensors disagree on"
        raise ImportRefused(f"{module} lacks its {what}: save the adapter again")
    a, b = _oriented(module, tensors[ForeignRole.A], tensors[ForeignRole.B], site)
    magnitude = tensors[ForeignRole.MAGNITUDE].flatten() if has_magnitude else None
    scales.check_rank(found.key, a.shape[0])
    alpha = scales.alpha_of(found.key, tensors.get(ForeignRole.ALPHA), a.shape[0])
    return PlainSite(_served(a), _served(b), alpha, None if magnitude is None else _served(magnitude))


def _oriented(module: str, a: Tensor, b: Tensor, site: Site | None) -> tuple[Tensor, Tensor]:
    """A [R, in] and B [out, R], also from trainers that store both the other way round."""
    if a.dim() != 2 or b.dim() != 2:
        raise ImportRefused(
            f"{module}: its tensors have shapes {list(a.shape)}, {list(b.shape)}, no matrices"
        )
    ways = [
        (x, y)
        for x, y in ((a, b), (a.T, b.T))
        if x.shape[0] == y.shape[1]
        and (site is None or (x.shape[1], y.shape[0]) == (site.in_features, site.out_features))
    ]
    if not ways:
        widths = "" if site is None else f"; this base has {site.in_features} in and {site.out_features} out"
        raise ImportRefused(
            f"{module}: A {list(a.shape)} and B {list(b.shape)} do not fit{widths}: is it made for another base?"
        )
    return min(
        ways, key=lambda way: way[0].shape[0]
    )  # a square one fits both ways: the rank is the short side


def _served(tensor: Tensor) -> Tensor:
    """In a type that is served: others (fp64, fp8) become fp32."""
    served = (torch.float32, torch.float16, torch.bfloat16)
    return (tensor if tensor.dtype in served else tensor.float()).contiguous()


def _check_targets(config: Mapping[str, object], found: Mapping[str, _Found]) -> None:
    """PEFT drops tensors of modules that the configuration does not target; what it would drop is not imported."""
    manifest = _targets(config)
    dropped = [
        each.key.module
        for each in found.values()
        if not manifest.is_target(TensorKey(each.key.module, each.key.site, Role.A))
    ]
    if dropped:
        raise ImportRefused(
            f"{len(dropped)} modules are not among adapter_config.json's target_modules, so that PEFT would drop their "
            f"tensors: {_listed(dropped)}; correct the configuration, or remove it and give --alpha"
        )


def _targets(config: Mapping[str, object]) -> AdapterManifest:
    fields = ("target_modules", "exclude_modules", "layers_to_transform")
    kept = {name: config[name] for name in fields if name in config}
    return parse_manifest(json.dumps({"peft_type": "LORA", **kept}).encode())
