"""MergedCheckpoint: the files of a base with an adapter in its weights, written in a stream and read back.

Owns: the shards and their index, the settings files beside them, and the proof that what lies on the disk is what was
meant. Holds one tensor at a time. Does not know whether the merge is wise. Place in a training run: none; under
``export``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from adapters.weights import SiteWeights
from training.tools.base_files import BaseFiles
from training.tools.merge import SiteFigure, figure, merged_weight, rounded
from training.tools.refusals import ExportRefused
from training.tools.shards import Stored, num_bytes_of, plan_shards, write_shard, written_dtype

Progress = Callable[[str, int, int], None]
"""The phase, how many of its pieces are done, and of how many."""

SETTINGS: Final = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
"""What a checkpoint's folder holds beside weights: configuration, tokenizer, chat template, image settings."""
INDEX_NAME: Final = "model.safetensors.index.json"


class MergedCheckpoint:
    """One export under way. ``dtype`` None keeps each tensor's own type."""

    def __init__(
        self,
        files: BaseFiles,
        adapter: Mapping[str, SiteWeights],
        folder: Path,
        dtype: torch.dtype | None,
        on_progress: Progress,
    ) -> None:
        self._files: Final = files
        self._adapter: Final = adapter
        self._folder: Final = folder
        self._dtype: Final = dtype
        self._on_progress: Final = on_progress
        self._site_of: Final = {files.weights[name].name: name for name in adapter}
        self._shards: dict[str, tuple[Stored, ...]] = {}

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes_of(stored, self._dtype) for stored in self._files.tensors)

    @property
    def dtype_name(self) -> str:
        """Of the merged weights."""
        first = self._files.weights[next(iter(self._adapter))]
        return str(written_dtype(first, self._dtype)).removeprefix("torch.")

    def write(self, max_shard_bytes: int) -> tuple[str, ...]:
        """Weights, index and settings; the names of the weight files. Raises ExportRefused."""
        self._check_space()
        shards = plan_shards(self._files.tensors, self._dtype, max_shard_bytes)
        self._shards = dict(zip(_names(len(shards)), shards, strict=True))
        num_done = 0
        for name, shard in self._shards.items():
            write_shard(self._folder / name, shard, self._dtype, self._merged(shard, num_done))
            num_done += len(shard)
        if len(shards) > 1:
            self._write_index()
        self._copy_settings()
        return tuple(self._shards)

    def read_back(self) -> tuple[tuple[SiteFigure, ...], int]:
        """Every tensor from the disk again: the figures of the merged ones, and how many others are the base's.

        Raises ExportRefused when one of the others is not.
        """
        figures: list[SiteFigure] = []
        num_done = num_untouched = 0
        for name, shard in self._shards.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for stored in shard:
                    written: Tensor = file.get_tensor(stored.name)
                    site = self._site_of.get(stored.name)
                    if site is None:
                        self._check_untouched(stored, written)
                        num_untouched += 1
                    else:
                        figures.append(self._figure(site, stored, written))
                    num_done += 1
                    self._on_progress("check weights", num_done, len(self._files.tensors))
        return tuple(figures), num_untouched

    def _merged(self, shard: Sequence[Stored], num_done: int) -> Iterator[Tensor]:
        for number, stored in enumerate(shard, num_done + 1):
            yield self._tensor(stored)
            self._on_progress("merge", number, len(self._files.tensors))

    def _tensor(self, stored: Stored) -> Tensor:
        tensor = self._files.read(stored)
        site = self._site_of.get(stored.name)
        dtype = written_dtype(stored, self._dtype)
        if site is not None:
            return rounded(site, merged_weight(tensor, self._adapter[site]), dtype)
        return tensor if tensor.dtype == dtype else rounded(stored.name, tensor, dtype)

    def _figure(self, site: str, stored: Stored, written: Tensor) -> SiteFigure:
        base = self._files.read(stored)
        return figure(site, base, merged_weight(base, self._adapter[site]), written)

    def _check_untouched(self, stored: Stored, written: Tensor) -> None:
        wanted = self._files.read(stored).to(written.dtype)
        if not torch.equal(written, wanted):
            raise ExportRefused(
                f"{stored.name} is on the disk otherwise than it was written. Nothing was kept; is the disk sound?"
            )

    def _check_space(self) -> None:
        free = shutil.disk_usage(self._folder).free
        if self.num_bytes > free:
            raise ExportRefused(
                f"the merged model takes {self.num_bytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free: "
                "free space, or name another folder"
            )

    def _write_index(self) -> None:
        weight_map = {stored.name: name for name, shard in self._shards.items() for stored in shard}
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", "utf-8")

    def _copy_settings(self) -> None:
        source = self._files.checkpoint.folder
        paths = {path for pattern in SETTINGS for path in source.glob(pattern) if path.is_file()}
        for path in sorted(paths):
            if not path.name.endswith(".index.json"):
                (self._folder / path.name).write_bytes(path.read_bytes())
        if self._dtype is not None:
            _retype(self._folder / "config.json", self.dtype_name)


def _names(num_shards: int) -> list[str]:
    """As transformers names them."""
    if num_shards == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]


def _retype(path: Path, dtype: str) -> None:
    """Name the new type wherever the configuration names one."""
    config = json.loads(path.read_text("utf-8"))
    config.setdefault("dtype" if "torch_dtype" not in config else "torch_dtype", dtype)
    for holder in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(holder, dict):
            for field in ("dtype", "torch_dtype"):
                if field in holder:
                    holder[field] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
