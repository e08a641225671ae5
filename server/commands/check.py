"""`lorikeet adapters check`: the verdict on a package, without a server and without the base's weights.

The base is built on the meta device, from its configuration alone: the check of a 7B adapter takes no memory and no
download but `config.json`. What only a loaded base can tell (do the logits change, and stay finite?) is left to the
server's probe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from adapters.errors import AdapterError
    from adapters.validation import PackageReport

POCKET_NAMES = ("pocket", "lorikeet-pocket")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the check found. `text` is one line, and a line for each detail."""

    is_accepted: bool
    text: str
    facts: Mapping[str, object]

    def as_dict(self) -> dict[str, object]:
        return {"accepted": self.is_accepted, **self.facts}


def check_folder(folder: Path, base: str, max_rank: int) -> Verdict:
    """Judge a package as a server with this base would. Never raises for a bad package or an unreadable base."""
    from adapters.errors import AdapterError
    from adapters.sites import discover_sites
    from adapters.validation import Limits, check_package

    try:
        sites = discover_sites(skeleton(base))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Verdict(
            False, f"not checked: the base {base!r} cannot be read: {reason}", {"reason": "base_not_found"}
        )
    names = POCKET_NAMES if base == "pocket" else (base,)
    try:
        report = check_package(folder, sites, Limits(max_rank=max_rank), names)
    except AdapterError as error:
        return _refused(error)
    return _accepted(report)


def skeleton(base: str) -> Qwen2_5_VLForConditionalGeneration:
    """The base's modules on the meta device: shapes and no numbers. Raises OSError or ValueError."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from base.pocket import CHECKPOINT

    source = CHECKPOINT if base == "pocket" else base
    config = Qwen2_5_VLConfig.from_pretrained(source)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"it is a {config.model_type}, not a Qwen2.5-VL")
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def _accepted(report: PackageReport) -> Verdict:
    size = f"{report.num_bytes / 1e6:.1f} MB"
    where = "+".join(report.parts)
    text = (
        f"accepted: {report.kind}, rank {report.rank}, {size}, {report.num_sites} linears ({where}), "
        f"digest {report.digest[:12]}\n  targets: {', '.join(report.targets)}"
    )
    return Verdict(True, text, asdict(report))


def _refused(error: AdapterError) -> Verdict:
    from adapters.errors import AdapterRejected

    reason = error.reason.value if isinstance(error, AdapterRejected) else "source_rejected"
    details = error.details if isinstance(error, AdapterRejected) else ()
    text = "\n  - ".join([f"refused ({reason}): {error}", *details])
    return Verdict(False, text, {"reason": reason, "message": str(error), "details": list(details)})
