"""The files of a package: which count, how they are opened, and what their content is called.

Owns file names, the digest, and the rule that a package's files may not lead out of it. Knows nothing of what the
files say.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection
from io import BufferedReader
from pathlib import Path

from adapters.errors import AdapterRejected, RejectReason, SourceRejected

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PROFILE_NAME = "lorikeet.json"
README_NAME = "README.md"
IDENTITY_NAMES = (CONFIG_NAME, WEIGHTS_NAME, PROFILE_NAME)
"""The files whose bytes are what the digest names. The README may change without making another adapter."""
COPIED_NAMES = (*IDENTITY_NAMES, README_NAME)
REQUIRED_NAMES = (CONFIG_NAME, WEIGHTS_NAME)

_DIGEST_DOMAIN = b"lorikeet-package-1\n"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def open_package_file(folder: Path, name: str, within: Path | None = None) -> BufferedReader:
    """The file opened for reading. Symbolic links may not lead out of ``within`` (the folder, if not given).

    Raises FileNotFoundError if there is none, and SourceRejected if it leads elsewhere or is no plain file.
    """
    path = folder / name
    try:
        # non-blocking, so that a pipe left in a package cannot hang the server
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceRejected(f"{name} of the package cannot be read: {error.strerror}") from None
    file = os.fdopen(descriptor, "rb")
    try:
        _check_opened(file, path, name, within or folder)
    except BaseException:
        file.close()
        raise
    return file


def _check_opened(file: BufferedReader, path: Path, name: str, within: Path) -> None:
    """Judged after opening, on the very file that was opened, so that swapping a link in between gains nothing."""
    opened = os.fstat(file.fileno())
    if not stat.S_ISREG(opened.st_mode):
        raise SourceRejected(f"{name} of the package is not a plain file")
    real = Path(os.path.realpath(path))
    is_same = os.path.samestat(opened, os.lstat(real))
    if not is_same or not real.is_relative_to(os.path.realpath(within)):
        raise SourceRejected(
            f"{name} of the package is a link that leads out of the allowed folder; copy the file in"
        )


def missing_file(folder: Path, name: str) -> AdapterRejected:
    """The refusal of a folder that lacks ``name``, which says what is there instead."""
    return missing_among([entry.name for entry in os.scandir(folder)], name)


def missing_among(found: Collection[str], name: str) -> AdapterRejected:
    """As ``missing_file``, where the names are known and the folder may be anywhere."""
    names = sorted(found)
    pickles = [found for found in names if found.lower().endswith(_PICKLE_SUFFIXES)]
    if name == WEIGHTS_NAME and pickles:
        return AdapterRejected(
            RejectReason.UNSAFE_FORMAT,
            f"the package has its weights as {pickles[0][:64]!a}, a format that can carry code; only {WEIGHTS_NAME} is "
            "read: save the adapter again with safe_serialization=True",
            tuple(f"{found[:96]!a}" for found in pickles[:10]),
        )
    return AdapterRejected(
        RejectReason.MISSING_FILE,
        f"the package has no {name}; a PEFT adapter folder has {' and '.join(REQUIRED_NAMES)}",
        tuple(f"{found[:96]!a}" for found in names[:10]),
    )


def file_sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def package_digest(folder: Path, within: Path | None = None) -> str:
    """Hex SHA-256 over the names, sizes and SHA-256 of the files that make an adapter what it is."""
    digest = hashlib.sha256(_DIGEST_DOMAIN)
    for name in IDENTITY_NAMES:
        try:
            with open_package_file(folder, name, within) as file:
                content = file_sha256(file)
                digest.update(f"{name} {file.tell()} {content}\n".encode())
        except FileNotFoundError:
            continue
    return digest.hexdigest()
