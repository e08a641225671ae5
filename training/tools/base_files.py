"""BaseFiles: a checkpoint on disk, read one tensor at a time; and which checkpoint an adapter means.

Owns: which tensor of which file is a site's weight, in either key layout, and what of a base is on this machine. Does
not know what is done to a weight. Place in a training run: none; export, inspect, import and shrink read bases by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from adapters.sites import Site, discover_sites
from base.checkpoint import MODEL_TYPE, Checkpoint, open_checkpoint
from base.config import POCKET, BaseConfig
from base.errors import BaseError
from base.location import POCKET_NAME
from base.quantization import today_name
from training.tools.refusals import BaseNotAtHand
from training.tools.shards import Stored


class BaseFiles:
    """A checkpoint's tensors by name, each read when it is asked for. Use as a context: it holds its files open."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint: Final = checkpoint
        self._stack: Final = ExitStack()
        self._files: Final = {
            path: self._stack.enter_context(safe_open(path, framework="pt"))
            for path in checkpoint.weight_files
        }

    def __enter__(self) -> BaseFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @cached_property
    def tensors(self) -> tuple[Stored, ...]:
        """In the files' order."""
        found: list[Stored] = []
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                found.append(Stored(name, path, part.get_dtype(), tuple(part.get_shape())))
        return tuple(found)

    @cached_property
    def weights(self) -> Mapping[str, Stored]:
        """Each site's weight, by today's module name."""
        by_name = {
            today_name(each.name.removesuffix(".weight")): each
            for each in self.tensors
            if each.name.endswith(".weight")
        }
        return {name: by_name[name] for name in self.sites if name in by_name}

    @cached_property
    def sites(self) -> dict[str, Site]:
        return sites_of_config(self.checkpoint.config)

    @property
    def is_quantised(self) -> bool:
        return self.checkpoint.stored_quantization is not None

    def read(self, stored: Stored) -> Tensor:
        """As it is stored; a copy of its own."""
        tensor: Tensor = self._files[stored.file].get_tensor(stored.name)
        return tensor


@dataclass(frozen=True, slots=True)
class BaseAtHand:
    """What is here of an adapter's base: its files, or its shapes alone, or nothing. Use as a context."""

    source: str
    files: BaseFiles | None
    sites: dict[str, Site] | None

    @property
    def name(self) -> str:
        return self.source if self.files is None else self.files.checkpoint.name

    def __enter__(self) -> BaseAtHand:
        return self

    def __exit__(self, *error: object) -> None:
        if self.files is not None:
            self.files.close()


def open_base(source: str, revision: str | None = None, *, may_download: bool = True) -> BaseFiles:
    """The checkpoint that a person names: ``pocket``, a folder or a hub id. Raises BaseNotAtHand."""
    config = BaseConfig(source=source, revision=revision, local_files_only=not may_download)
    try:
        return BaseFiles(open_checkpoint(config))
    except BaseError as error:
        raise BaseNotAtHand(f"{error}; name the base with --base (pocket, a folder or a hub id)") from error
    except (OSError, SafetensorError) as error:
        raise BaseNotAtHand(f"the base {source!r} cannot be read ({error}); fetch it again") from error


def find_base(named: str, flag: str | None, revision: str | None = None) -> BaseAtHand:
    """The base of an adapter whose configuration says ``named``, as far as it is on this machine.

    One that ``flag`` names is fetched if need be. Raises BaseNotAtHand when that one cannot be.
    """
    source = base_meant(named, flag)
    if not source:
        return BaseAtHand("", None, None)
    try:
        files = open_base(source, revision, may_download=flag is not None)
    except BaseNotAtHand:
        if flag is not None:
            raise
        return BaseAtHand(source, None, _sites_by_config(source))
    return BaseAtHand(source, files, files.sites)


def _sites_by_config(source: str) -> dict[str, Site] | None:
    """Shapes from ``config.json`` alone, which the hub gives without its weights; None when it is away."""
    try:
        config = Qwen2_5_VLConfig.from_pretrained(source)
    except (OSError, ValueError):
        return None
    return sites_of_config(config) if config.model_type == MODEL_TYPE else None


def sites_of_config(config: Qwen2_5_VLConfig) -> dict[str, Site]:
    with torch.device("meta"):
        return discover_sites(Qwen2_5_VLForConditionalGeneration(config))


def base_meant(named: str, flag: str | None) -> str:
    """The base that ``--base`` names, else the one in the adapter's configuration; ``""`` when there is neither.

    The embedded base goes by its own name and by its folder's, wherever that lay.
    """
    source = flag or named
    is_pocket = source == POCKET_NAME or source.rstrip("/").endswith("base/pocket/checkpoint")
    return POCKET if is_pocket else source
