"""Data sets of the hub: ``hf://datasets/org/name[@revision][/file]`` to files on this machine.

Owns: the form of the address, which of a repository's files are fetched, and which of them is the data. Does not know:
what is in them. Place in a training run: before its first phase. Files are fetched whole into one folder (not linked
into a cache), so that the pictures which rows name lie beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SCHEME: Final = "hf://"
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}(?=\.)")
DATA: Final = (".jsonl", ".json", ".csv", ".parquet")
PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif")
NO_ROWS: Final = (
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "metadata.json",
)
"""JSON files that say something about a data set and hold none of it."""


class DataSourceError(Exception):
    """A data file that is not there, or an address that cannot be had."""


@dataclass(frozen=True, slots=True)
class HubData:
    """One address, in parts."""

    repo: str
    revision: str | None
    file: str | None


Download = Callable[[HubData, Sequence[str], Path], None]
"""Fetch a repository's files that match any of the patterns into a folder. Raises DataSourceError."""


def find_files(sources: Sequence[str], folder: Path, download: Download | None = None) -> tuple[Path, ...]:
    """The files of all sources, those of the hub fetched below ``folder``. Raises DataSourceError."""
    return tuple(path for source in sources for path in _find(source, folder, download or fetch))


def parse(address: str) -> HubData:
    """Raises DataSourceError for what is no address of a data set."""
    found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", address)
    if found is None:
        raise DataSourceError(f"{address} is not of the form hf://datasets/org/name[@revision][/file]")
    return HubData(found[1], found[2], found[3])


def _find(source: str, folder: Path, download: Download) -> Sequence[Path]:
    if source.startswith(SCHEME):
        return _of_hub(parse(source), folder, download)
    path = Path(source).expanduser()
    if not path.is_file():
        what = "is a folder: name the file in it" if path.is_dir() else "does not exist"
        raise DataSourceError(f"the data file {path} {what}")
    return [path]


def _of_hub(data: HubData, folder: Path, download: Download) -> Sequence[Path]:
    place = folder / f"{data.repo.replace('/', '--')}@{data.revision or 'main'}"
    wanted = [data.file] if data.file else [f"*{end}" for end in DATA]
    download(data, [*wanted, *(f"*{end}" for end in PICTURES)], place)
    if data.file is None:
        return _rows_in(data, place)
    if not (place / data.file).is_file():
        raise DataSourceError(
            f"the data set {data.repo} has no file {data.file} at {data.revision or 'main'}"
        )
    return [place / data.file]


def _rows_in(data: HubData, place: Path) -> Sequence[Path]:
    """The one file of rows; of several, that of the split train, or all its shards."""
    found = sorted(
        path.relative_to(place)
        for path in place.rglob("*")
        if path.suffix in DATA and path.name not in NO_ROWS and ".cache" not in path.relative_to(place).parts
    )
    chosen = [path for path in found if "train" in str(path).lower()] if len(found) > 1 else found
    if len({_SHARD.sub("", str(path)) for path in chosen}) == 1:
        return [place / path for path in chosen]
    names = ", ".join(map(str, (chosen or found)[:8])) or "none"
    raise DataSourceError(
        f"the data set {data.repo} does not have one data file (found: {names}): name it, as in"
        f" hf://datasets/{data.repo}/{found[0] if found else 'train.jsonl'}"
    )


def fetch(data: HubData, patterns: Sequence[str], folder: Path) -> None:
    """By huggingface_hub, with the token of its own log-in. Raises DataSourceError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(
            data.repo,
            repo_type="dataset",
            revision=data.revision,
            local_dir=folder,
            allow_patterns=list(patterns),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataSourceError(f"the data set {data.repo} cannot be fetched from the hub: {reason}") from error
