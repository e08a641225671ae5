"""Packages by the thousand for the bench: variants of one PEFT folder, each of other content and so of another digest.

Owns the making alone: alpha is scaled by a factor of its own, which keeps the adapter's direction and effect. Imports
none of ours: a package is two files that anybody can write.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

SAMPLE = Path(__file__).resolve().parent.parent / "adapters" / "samples" / "french"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


class Variants:
    """Of one package; ``small`` keeps its first site alone: a few KiB, for registries rather than for answers."""

    def __init__(self, package: Path, *, small: bool = False) -> None:
        self._config = json.loads((package / CONFIG).read_text("utf-8"))
        self._weights = (package / WEIGHTS).read_bytes()
        if small:
            self._weights, site = _first_site(self._weights)
            self._config["target_modules"] = [site.removeprefix(PREFIX)]

    @property
    def num_bytes(self) -> int:
        return len(self._weights)

    def write(self, folder: Path, number: int) -> Path:
        """Variant ``number`` as a package at ``folder``, in place of what is there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = {**self._config, "lora_alpha": self._config["lora_alpha"] * (1 + 1e-5 * number)}
        (folder / CONFIG).write_text(json.dumps(config), "utf-8")
        (folder / WEIGHTS).write_bytes(self._weights)
        return folder


def _first_site(data: bytes) -> tuple[bytes, str]:
    """A safetensors file with the tensors of one site alone, and that site."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    site = min(name for name in header if ".lora_A." in name).partition(".lora_A.")[0]
    kept: dict[str, object] = {}
    chosen = b""
    for name, info in header.items():
        if name.startswith(f"{site}.lora_"):
            begin, end = info["data_offsets"]
            kept[name] = {**info, "data_offsets": [len(chosen), len(chosen) + end - begin]}
            chosen += body[begin:end]
    text = json.dumps(kept).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + chosen, site
