"""save_adapter: PEFT's own folder, `adapter_config.json` and `adapter_model.safetensors`, each file whole or absent.

Does not know: models, recipes, what else a package holds (`package.py`). Place in a training run: checkpoints, and
the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Final

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from training.durable import sync

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"


def save_adapter(folder: Path, config: LoraConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write both files; ``folder`` is made, other files in it are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as made:
        stored = deepcopy(config)
        stored.inference_mode = True
        stored.save_pretrained(made)
        weights = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
        save_file(weights, Path(made) / WEIGHTS_NAME, metadata={"format": "pt"})
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            _move_synced(Path(made) / name, folder / name)


def _move_synced(source: Path, target: Path) -> None:
    """On the disk before it has its name."""
    sync(source)
    source.replace(target)
