"""provenance: where a package that was not trained here comes from, in its ``lorikeet.json``.

Owns that file for packages of ``import`` and ``shrink``: the common fields, and one record of what was done. It claims
no base's fingerprint, no score and no probe: nothing here was measured on the serving base.
Place in a training run: none; ``training/package/package.py`` writes the file of what was trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from adapters.package import PROFILE_NAME, WEIGHTS_NAME
from adapters.profile import FORMAT


def write_provenance(
    folder: Path, name: str, base_name: str, origin: Literal["import", "shrink"], facts: Mapping[str, object]
) -> None:
    """Write ``lorikeet.json`` beside weights that are written already."""
    profile = {
        "format": FORMAT,
        "name": name,
        "weights_sha256": sha256_of(folder / WEIGHTS_NAME),
        "base": {"name": base_name},
        origin: dict(facts),
    }
    (folder / PROFILE_NAME).write_text(json.dumps(profile, indent=1) + "\n", "utf-8")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
