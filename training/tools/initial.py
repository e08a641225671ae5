"""Adapters whose initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA), made plain.

Owns: which of them can be made plain from what, and the arithmetic of it. Such a run took s B0 A0 out of the base's
weights before training, so that against the untouched base the adapter is s (B A - B0 A0): a plain LoRA of twice the
rank, [B, -B0] [A; A0] (PEFT's ``LoraModel.subtract_mutated_init``). A0 and B0 are not in a saved adapter. They come
from the adapter as it was saved before the first step, which always works, or from the base's own 16-bit weights where
the initialisation is a function of them alone: ``pissa`` (singular vectors) and ``olora`` (QR). The products B0 A0 are
free of the signs that such decompositions leave open. A magnitude of DoRA stays as it is: it rescales the same sum.

What stays inexact, here and in PEFT: the run rounded the base's remainder to its type, and that rounding is in no file.
Place in a training run: none; under ``import``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from training.tools.base_files import BaseFiles
from training.tools.low_rank import distance, norm
from training.tools.plain import PlainSite
from training.tools.refusals import ImportRefused

MUTATING: Final[Mapping[str, str]] = {
    "pissa": "",
    "olora": "",
    "pissa_niter": "its singular vectors were found by a randomised method, whose result nobody can repeat",
    "corda": "it was made from the covariance of training data, which is in no file",
    "lora_ga": "it was made from gradients of training data, which are in no file",
}
"""Each with why A0 and B0 cannot be had from the base; empty where they can."""
MAX_DRIFT: Final = 0.5
"""|B A - B0 A0| / |B0 A0| after training. Real runs stay far below; against another base it is above 1."""


def family(init: object) -> str:
    """``pissa``, ``pissa_niter``, ``olora``, ``corda``, ``lora_ga``, ``loftq``, or ``""`` for one that leaves the base
    alone."""
    text = init.lower() if isinstance(init, str) else ""
    if text.startswith("pissa_niter"):
        return "pissa_niter"
    return text if text in MUTATING or text == "loftq" else ""


def check_convertible(init: str, *, has_initial: bool, has_base: bool) -> None:
    """Raise ImportRefused when A0 and B0 can be had from nowhere."""
    kind = family(init)
    if kind == "loftq":
        raise ImportRefused(
            "init_lora_weights is 'loftq': it replaced the base's weights by others in 4 bits, and the difference has "
            "full rank, so that no LoRA can hold it; retrain with init_lora_weights=true"
        )
    if has_initial or not kind:
        return
    saved = (
        "give the adapter as it was before the first step with --initial FOLDER (PEFT: save_pretrained right after "
        "get_peft_model)"
    )
    if MUTATING[kind]:
        raise ImportRefused(f"init_lora_weights is {init!r}: {MUTATING[kind]}; {saved}, or retrain")
    if not has_base:
        raise ImportRefused(
            f"init_lora_weights is {init!r}: it took a part out of the base's weights, which must be known to put it "
            f"back; name the 16-bit base that it was trained on with --base, or {saved}"
        )


def against(sites: Mapping[str, PlainSite], initial: Mapping[str, PlainSite]) -> dict[str, PlainSite]:
    """Plain LoRA from the trained and the initial factors. Raises ImportRefused when they do not belong together."""
    lacking = sorted(sites.keys() - initial.keys())
    if lacking:
        raise ImportRefused(
            f"the initial adapter lacks {len(lacking)} modules, such as {lacking[0]}: is it this run's?"
        )
    for name, site in sites.items():
        first = initial[name]
        if first.a.shape != site.a.shape or first.b.shape != site.b.shape:
            raise ImportRefused(
                f"the initial adapter has rank {first.rank} at {name} and the trained one {site.rank}: "
                "is it this run's?"
            )
        if abs(first.scale - site.scale) > 1e-6 * abs(site.scale):
            raise ImportRefused(
                f"the initial adapter has scale {first.scale:g} at {name} and the trained one {site.scale:g}: "
                "is it this run's?"
            )
    return {name: _subtracted(site, initial[name].a, initial[name].b) for name, site in sites.items()}


def from_base(
    init: str,
    sites: Mapping[str, PlainSite],
    files: BaseFiles,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, PlainSite]:
    """Plain LoRA, with A0 and B0 made again from the base's weights as PEFT made them. Raises ImportRefused."""
    if files.is_quantised:
        raise ImportRefused(
            f"init_lora_weights is {init!r} and the base is stored in 4 bits, while the part that was taken out of it "
            "was of 16 bits: name the 16-bit base with --base"
        )
    begin = {"pissa": _pissa, "olora": _olora}[family(init)]
    plain: dict[str, PlainSite] = {}
    for number, (name, site) in enumerate(sites.items(), 1):
        first_a, first_b = begin(files.read(files.weights[name]).float(), site)
        _check_drift(name, init, site, first_a, first_b)
        plain[name] = _subtracted(site, first_a, first_b)
        on_progress("convert", number, len(sites))
    return plain


def _pissa(weight: Tensor, site: PlainSite) -> tuple[Tensor, Tensor]:
    """The principal part of [out, in]: A0 [R, in], B0 [out, R] (PEFT's ``LoraLayer.pissa_init``)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[: site.rank] / site.scale).sqrt()
    return root[:, None] * right[: site.rank], left[:, : site.rank] * root


def _olora(weight: Tensor, site: PlainSite) -> tuple[Tensor, Tensor]:
    """The leading part of the QR of [out, in] (PEFT's ``LoraLayer.olora_init``)."""
    q, r = torch.linalg.qr(weight)
    return r[: site.rank], q[:, : site.rank]


def _check_drift(name: str, init: str, site: PlainSite, first_a: Tensor, first_b: Tensor) -> None:
    drift = distance(site.a, site.b, first_a, first_b) / norm(first_a, first_b)
    if not drift <= MAX_DRIFT:
        raise ImportRefused(
            f"init_lora_weights is {init!r}, and the initial weights made again from this base are not those that the "
            f"adapter set out from (at {name} they differ by {100 * drift:.0f} %): name the 16-bit base that it was "
            "trained on with --base, or give the adapter as it was before the first step with --initial"
        )


def _subtracted(site: PlainSite, first_a: Tensor, first_b: Tensor) -> PlainSite:
    """s [B, -B0] [A; A0]: twice the rank, and twice the alpha for the same scale."""
    return replace(
        site,
        a=torch.cat([site.a.float(), first_a.float()], dim=0),
        b=torch.cat([site.b.float(), -first_b.float()], dim=1),
        alpha=2 * site.alpha,
    )
