"""A checkpoint before its weights are read: where it lies, what it says it is, and what names its content.

Owns: the way from a source to a folder, every reason to refuse one by its configuration, and the fingerprint.
Place in a request's way: none; once, at load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from base.config import POCKET, BaseConfig
from base.errors import BaseNotFound, UnsupportedBase
from base.pocket import CHECKPOINT

MODEL_TYPE: Final = "qwen2_5_vl"
POCKET_NAME: Final = "lorikeet-pocket"
STATIC_ROPE_TYPES: Final = frozenset({"default", "mrope", "linear", "yarn", "llama3"})
_SETTINGS_FILES: Final = ("*.json", "*.jinja", "*.txt")
_WEIGHT_FILES: Final = ("*.safetensors",)
_WHOLE_DIGEST_BYTES: Final = 256 << 20
_SAMPLE_BYTES: Final = 1 << 20
_NUM_SAMPLES: Final = 64
logger = logging.getLogger("lorikeet.base")


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
    folder, name, is_remote = _locate(base)
    description = _read_json(folder / "config.json", base.source)
    _check_description(description, base.source)
    if is_remote:
        _download(base, _WEIGHT_FILES)
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


def fingerprint(checkpoint: Checkpoint, base: BaseConfig) -> str:
    """Hex SHA-256 over the configuration, how it is loaded, and the identity of each weight file.

    A file's identity is its name, size, safetensors header and content; of files over 256 MiB, 64 samples of 1 MiB.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config.to_dict(), sort_keys=True, default=str).encode())
    digest.update(f"{base.quantization} {base.dtype}".encode())
    for path in checkpoint.weight_files:
        digest.update(path.name.encode())
        for piece in _identity(path):
            digest.update(piece)
    return digest.hexdigest()


def tensor_names(path: Path) -> frozenset[str]:
    """Names in a safetensors file, from its header alone. Raises SafetensorError, OSError."""
    with safe_open(path, framework="pt") as file:
        return frozenset(file.keys())


# ---- where -----------------------------------------------------------------------------------------------------


def _locate(base: BaseConfig) -> tuple[Path, str, bool]:
    """The folder, the name it is served under, and whether it is a hub's."""
    if base.source == POCKET:
        return CHECKPOINT, POCKET_NAME, False
    path = Path(base.source).expanduser()
    if path.is_dir():
        return path, path.resolve().name, False
    if path.exists():
        raise BaseNotFound(base.source, "it is a file: give the folder that holds config.json")
    if base.source.startswith(("/", ".", "~")) or base.source.count("/") != 1:
        raise BaseNotFound(
            base.source, "there is no such folder, and it is no hub id (owner/name): check the path"
        )
    return _download(base, _SETTINGS_FILES), base.source, True


def _download(base: BaseConfig, patterns: tuple[str, ...]) -> Path:
    """Fetch files of a hub id, or find them in the cache. Raises BaseNotFound with what to do."""
    try:
        folder = snapshot_download(
            base.source,
            revision=base.revision,
            allow_patterns=list(patterns),
            local_files_only=base.local_files_only,
        )
    except GatedRepoError as error:
        reason = "the hub wants you to accept its terms: do so on its page, and log in with `hf auth login`"
        raise BaseNotFound(base.source, reason) from error
    except RevisionNotFoundError as error:
        raise BaseNotFound(
            base.source, f"the hub has no revision {base.revision!r} of it: check it"
        ) from error
    except RepositoryNotFoundError as error:
        reason = (
            "the hub has no such repository, or it is private: check the id, or log in with `hf auth login`"
        )
        raise BaseNotFound(base.source, reason) from error
    except HFValidationError as error:
        raise BaseNotFound(
            base.source, "it is neither a folder nor a hub id (owner/name): check it"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = "it is not in the hub's cache, and the hub was not or could not be asked: download it or go online"
        raise BaseNotFound(base.source, reason) from error
    except (HfHubHTTPError, OSError) as error:
        raise BaseNotFound(
            base.source, f"the hub cannot be reached ({error}): try again, or give a folder"
        ) from error
    return Path(folder)


# ---- what ------------------------------------------------------------------------------------------------------


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


# ---- its content -----------------------------------------------------------------------------------------------


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length)


def _identity(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield f"{size} ".encode()
    yield _header(path)
    is_whole = size <= _WHOLE_DIGEST_BYTES
    stride = _SAMPLE_BYTES if is_whole else size // _NUM_SAMPLES
    with path.open("rb") as file:
        for offset in range(0, size, stride):
            file.seek(offset)
            yield file.read(_SAMPLE_BYTES)
