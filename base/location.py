"""Where a base lies: the embedded one, a local folder, or a hub's repository brought to a local folder.

Owns: the hub's errors, each translated to what the operator should do. Place in a request's way: none; once, at load.
"""

from __future__ import annotations

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

from base.config import POCKET, BaseConfig
from base.errors import BaseNotFound
from base.pocket import CHECKPOINT

POCKET_NAME: Final = "lorikeet-pocket"
_SETTINGS_FILES: Final = ("*.json", "*.jinja", "*.txt")
_WEIGHT_FILES: Final = ("*.safetensors",)


def locate(base: BaseConfig) -> tuple[Path, str, bool]:
    """The folder (of a hub's: settings only so far), the name it is served under, and whether it is a hub's.

    Raises BaseNotFound.
    """
    if base.source == POCKET:
        return CHECKPOINT, POCKET_NAME, False
    path = Path(base.source).expanduser()
    if path.is_dir():
        return path, _folder_name(path), False
    if path.exists():
        raise BaseNotFound(base.source, "it is a file: give the folder that holds config.json")
    if base.source.startswith(("/", ".", "~")) or base.source.count("/") != 1:
        raise BaseNotFound(
            base.source, "there is no such folder, and it is no hub id (owner/name): check the path"
        )
    return _download(base, _SETTINGS_FILES), base.source, True


def fetch_weights(base: BaseConfig) -> Path:
    """Fetch a hub id's weights next to its settings. Raises BaseNotFound."""
    return _download(base, _WEIGHT_FILES)


def _folder_name(path: Path) -> str:
    """The folder's name; of a snapshot in the hub's cache (models--owner--name/snapshots/commit) the hub id."""
    *_, repository, snapshots, name = ("", "", *path.absolute().parts)
    if snapshots == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return name


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
