"""ForeignAdapter: what somebody else's trainer left in a folder or a file, read and not yet judged.

Owns: which file holds the weights, the refusal of formats that carry code, and the configuration as it stands. Reads
safetensors and JSON alone. Place in a training run: none; ``import`` begins with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adapters.package import CONFIG_NAME, WEIGHTS_NAME
from adapters.strict_json import parse_object
from training.tools.refusals import ImportRefused

_SUFFIX: Final = ".safetensors"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_CONFIG_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class ForeignAdapter:
    """Tensors and configuration, as they were found."""

    file: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, object] | None
    """None when there is no ``adapter_config.json``."""

    @property
    def base_name(self) -> str:
        name = (self.config or {}).get("base_model_name_or_path")
        return name if isinstance(name, str) else ""


def read_foreign(source: Path) -> ForeignAdapter:
    """Read a folder, or one ``.safetensors`` file. Raises ImportRefused."""
    file = _weights_file(source)
    return ForeignAdapter(file, _read_tensors(file), _read_config(file.parent / CONFIG_NAME))


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return _checked(source)
    if not source.is_dir():
        raise ImportRefused(f"{source} is no file or folder on this machine: download it first")
    if (source / WEIGHTS_NAME).is_file():
        return source / WEIGHTS_NAME
    found = sorted(path for path in source.iterdir() if path.is_file() and path.suffix.lower() == _SUFFIX)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found[:5])
        raise ImportRefused(f"{source} has {len(found)} .safetensors files ({names}): name the adapter's own")
    raise _nothing_to_read(source)


def _checked(file: Path) -> Path:
    if file.suffix.lower() == _SUFFIX:
        return file
    if file.suffix.lower() in _PICKLES:
        raise _pickle(file)
    raise ImportRefused(f"{file.name} is no .safetensors file: give the adapter's folder or its weights")


def _nothing_to_read(folder: Path) -> ImportRefused:
    pickles = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICKLES)
    if pickles:
        return _pickle(pickles[0])
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    if inner:
        return ImportRefused(
            f"{folder} holds no adapter, but folders that do: {', '.join(inner[:5])}; name one"
        )
    return ImportRefused(
        f"{folder} holds no {WEIGHTS_NAME}: a PEFT folder has it and {CONFIG_NAME}; is this the right folder?"
    )


def _pickle(file: Path) -> ImportRefused:
    return ImportRefused(
        f"{file.name} is a pickle, which can carry code, and is never read here. If you trust its maker, convert it "
        'where nothing can be harmed: python -c "import torch; from safetensors.torch import save_file; '
        f"save_file({{k: v.contiguous() for k, v in torch.load('{file.name}', map_location='cpu', "
        f"weights_only=True).items()}}, '{WEIGHTS_NAME}')\", or save the adapter again with PEFT "
        "(safe_serialization=True)"
    )


def _read_tensors(file: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ImportRefused(f"{file.name} cannot be read ({error}): download or save it again") from error


def _read_config(path: Path) -> Mapping[str, object] | None:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ImportRefused(f"{path.name} has over {MAX_CONFIG_BYTES} bytes: is it an adapter's?")
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ImportRefused(f"{path.name} cannot be read: {error}") from error
