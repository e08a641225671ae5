"""A checkpoint before its weights are read: what it says it is.

Owns: every reason to refuse one by its configuration.
Place in a request's way: none; once, at load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import safe_open
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from base.config import BaseConfig
from base.errors import BaseNotFound, UnsupportedBase
from base.location import fetch_weights, locate

MODEL_TYPE: Final = "qwen2_5_vl"
STATIC_ROPE_TYPES: Final = frozenset({"default", "mrope", "linear", "yarn", "llama3"})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose configuration we can serve; no weight has been read."""

    folder: Path
    name: str
    revision: str | None
    config: Qwen2_5_VLConfig
    text: Qwen2_5_VLTextConfig
    vision: Qwen2_5_VLVisionConfig
    eos_token_ids: tuple[int, ...]
    stored_quantization: Mapping[str, object] | None
    """The ``quantization_config`` of a pre-quantised checkpoint."""

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return tuple(sorted(self.folder.glob("*.safetensors")))

    @property
    def patch_size(self) -> int:
        size = self.vision.patch_size
        return size if isinstance(size, int) else size[0]

    @property
    def pad_token_id(self) -> int:
        """The configured one, else an end-of-sequence id: it only fills rows that nobody reads."""
        configured = (getattr(holder, "pad_token_id", None) for holder in (self.config, self.text))
        return next((number for number in configured if isinstance(number, int)), self.eos_token_ids[0])


def open_checkpoint(base: BaseConfig) -> Checkpoint:
    """Find the source, check its configuration, then fetch the weights if they are elsewhere.

    Raises BaseNotFound and UnsupportedBase, the latter before any weight is downloaded.
    """
    folder, name, is_remote = locate(base)
    description = _read_json(folder / "config.json", base.source)
    _check_description(description, base.source)
    if is_remote:
        fetch_weights(base)
    config = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
    text, vision = config.text_config, config.vision_config
    if not isinstance(text, Qwen2_5_VLTextConfig) or not isinstance(vision, Qwen2_5_VLVisionConfig):
        raise UnsupportedBase(base.source, "its config.json has no text and vision parts")
    _check_text(text, base.source)
    if not any(folder.glob("*.safetensors")):
        raise BaseNotFound(base.source, "it has no *.safetensors: convert its weights to safetensors")
    stored = description.get("quantization_config")
    return Checkpoint(
        folder=folder,
        name=name,
        revision=folder.resolve().name if is_remote else None,
        config=config,
        text=text,
        vision=vision,
        eos_token_ids=_eos_token_ids(folder, config, base.source),
        stored_quantization=stored if isinstance(stored, dict) else None,
    )


def tensor_names(path: Path) -> frozenset[str]:
    """Names in a safetensors file, from its header alone. Raises SafetensorError, OSError."""
    with safe_open(path, framework="pt") as file:
        return frozenset(file.keys())


def _read_json(path: Path, source: str) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseNotFound(source, f"it has no {path.name}: give a Hugging Face checkpoint folder") from error
    except (OSError, ValueError) as error:
        raise BaseNotFound(source, f"its {path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise BaseNotFound(source, f"its {path.name} is no JSON object")
    return content


def _check_description(description: Mapping[str, object], source: str) -> None:
    model_type = description.get("model_type")
    if model_type != MODEL_TYPE:
        raise UnsupportedBase(
            source,
            f"its model_type is {model_type!r}; only {MODEL_TYPE!r} (Qwen2.5-VL) is supported: choose one",
        )
    stored = description.get("quantization_config")
    if isinstance(stored, dict):
        method, is_4bit = stored.get("quant_method"), stored.get("load_in_4bit")
        if method != "bitsandbytes" or not is_4bit:
            raise UnsupportedBase(
                source,
                f"it is quantised by {method!r}{'' if is_4bit else ' not in 4 bits'}; "
                "give the 16-bit checkpoint, or one in bitsandbytes 4 bits",
            )


def _check_text(text: Qwen2_5_VLTextConfig, source: str) -> None:
    if "sliding_attention" in (text.layer_types or ()):
        raise UnsupportedBase(source, "it uses sliding-window attention: set use_sliding_window to false")
    rope_type = (text.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES:
        raise UnsupportedBase(
            source,
            f"its rope type is {rope_type!r}, which changes with a prompt's length and so cannot be batched; "
            f"supported: {', '.join(sorted(STATIC_ROPE_TYPES))}",
        )


def _eos_token_ids(folder: Path, config: Qwen2_5_VLConfig, source: str) -> tuple[int, ...]:
    """generation_config.json's, in its order, then the configuration's."""
    found: list[object] = []
    if (path := folder / "generation_config.json").is_file():
        found.append(_read_json(path, source).get("eos_token_id"))
    found += [getattr(holder, "eos_token_id", None) for holder in (config, config.text_config)]
    numbers = [
        n for value in found for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)
    ]
    if not numbers:
        raise UnsupportedBase(source, "it names no eos_token_id in generation_config.json or config.json")
    return tuple(dict.fromkeys(numbers))
