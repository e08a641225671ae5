"""Whether a package was made for the base that is served.

Owns the rule on names and fingerprints. Shapes are judged elsewhere, and always; a name alone never lets a package in.

The rule, in order:
1. ``lorikeet.json`` gives ``base.fingerprint`` and the served base has another: refused.
2. No name in ``adapter_config.json``, or a path on somebody's disk: nothing to compare; shapes decide.
3. The name equals one of the served base's, or its last part does, case and quantisation suffixes aside
   (``unsloth/Qwen2.5-VL-3B-Instruct-bnb-4bit`` is ``Qwen/Qwen2.5-VL-3B-Instruct``): accepted.
4. A hub name of something else: refused, unless the served base has no hub name to compare with (a local folder) and
   the other name is of the Qwen2.5-VL family; then shapes decide.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from adapters.errors import AdapterRejected, RejectReason

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*/[A-Za-z0-9][A-Za-z0-9_.\-]*")
_QUANTISED = re.compile(
    r"[-_.](unsloth|bnb|nf4|fp4|int4|int8|4bit|8bit|4-bit|8-bit|awq|gptq|bf16|fp16|quantized)$"
)
_FAMILY = "qwen2.5-vl"


def check_base(name: str, fingerprint: str, base_names: Collection[str], base_fingerprint: str) -> None:
    """Raise AdapterRejected (base_mismatch) if a package made for ``name`` cannot be for the served base."""
    if fingerprint and base_fingerprint and fingerprint != base_fingerprint:
        raise _mismatch("another base: lorikeet.json gives a fingerprint that is not the served base's")
    if not base_names or not _HUB_ID.fullmatch(name):
        return
    plain = _plain(name)
    if any(plain == _plain(served) for served in base_names):
        return
    has_hub_name = any(_HUB_ID.fullmatch(served) for served in base_names)
    if has_hub_name or _FAMILY not in plain:
        raise _mismatch(f"base {name[:96]!a}; this server has {', '.join(sorted(base_names))[:200]}")


def _plain(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2].lower()
    while (shorter := _QUANTISED.sub("", last)) != last:
        last = shorter
    return last


def _mismatch(what: str) -> AdapterRejected:
    return AdapterRejected(
        RejectReason.BASE_MISMATCH,
        f"the package is made for {what}: serve its base, or correct base_model_name_or_path in adapter_config.json "
        "if it is the same model",
    )
