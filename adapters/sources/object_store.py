"""ObjectStoreSource: packages in buckets, by ``s3://``, ``gs://`` or ``az://``, through fsspec's drivers.

Owns the address and the allowed prefixes, which are compared part by part after both were brought to one form. The
drivers take their credentials from the server's own configuration (its options, the environment, an instance role, the
cloud's files); an address cannot bring any. A bucket is what Azure calls a container; its account is an option. Four
files are taken, by name: nothing that lies beside them is read.

Foreign errors are translated here. Place in a request's way: none; it brings what later requests name.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from adapters.errors import AdapterError, DriverMissing, FetchFailed, SourceRejected
from adapters.package import COPIED_NAMES, REQUIRED_NAMES
from adapters.sources.arrival import CHUNK_BYTES, Deadline, choose_files, receive

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

DRIVERS: Mapping[str, str] = MappingProxyType({"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"})
"""By scheme, the package that reads it; the extra of ours that installs it is named like the scheme."""
DriverOptions = Mapping[str, str | int | bool]
"""What a driver is opened with, by its own names: ``account_name`` of adlfs, ``token`` of gcsfs, ``endpoint_url``."""
NO_OPTIONS: Mapping[str, DriverOptions] = MappingProxyType({})
READ_AHEAD_BYTES = 8 << 20
MAX_ADDRESS_CHARS = 1024

_PART = re.compile(r"[A-Za-z0-9!_.()'=+,@$&;: -]+")
"""Neither ``*``, ``?`` and brackets, which drivers expand, nor ``%`` and ``\\``, which some read as something else."""


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """A folder in a bucket, or a prefix of such."""

    scheme: str
    parts: tuple[str, ...]
    """The bucket first."""

    @classmethod
    def parse(cls, text: str) -> ObjectAddress:
        """Raises SourceRejected unless it is ``scheme://bucket/key...`` in plain parts, without ``.`` and ``..``."""
        scheme, _, rest = text.partition("://")
        parts = tuple(rest.removesuffix("/").split("/"))
        is_plain = all(_PART.fullmatch(part) and part not in (".", "..") for part in parts)
        if (
            len(text) > MAX_ADDRESS_CHARS
            or not is_plain
            or "@" in parts[0]
            or ":" in parts[0]
            or "::" in rest
        ):
            raise SourceRejected(
                "the source is malformed; write scheme://bucket/folder, without user, query, wildcards or '..'"
            )
        return cls(scheme.lower(), parts)

    def is_within(self, prefix: ObjectAddress) -> bool:
        return self.scheme == prefix.scheme and self.parts[: len(prefix.parts)] == prefix.parts

    @property
    def path(self) -> str:
        return "/".join(self.parts)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"


OpenFileSystem = Callable[[str], "AbstractFileSystem"]


class ObjectStoreSource:
    """Thread-safe: each fetch opens the driver's file system, which caches nothing."""

    def __init__(
        self,
        prefixes: Sequence[ObjectAddress],
        max_bytes: int,
        open_file_system: OpenFileSystem | None = None,
        options: Mapping[str, DriverOptions] = NO_OPTIONS,
    ) -> None:
        """``options`` are the operator's, by scheme. Raises DriverMissing if a prefix's scheme has no driver here."""
        self._prefixes = tuple(prefixes)
        self._max_bytes = max_bytes
        self._open_file_system = open_file_system or (
            lambda scheme: open_driver(scheme, options.get(scheme, {}))
        )
        if open_file_system is None:
            for prefix in prefixes:
                check_driver(prefix.scheme)

    @property
    def schemes(self) -> frozenset[str]:
        return frozenset(prefix.scheme for prefix in self._prefixes)

    def parse(self, source: str) -> ObjectAddress:
        """Raises SourceRejected for a malformed address, and for one under no allowed prefix."""
        address = ObjectAddress.parse(source)
        if not any(address.is_within(prefix) for prefix in self._prefixes):
            raise SourceRejected(
                "the source is under none of this server's allowed prefixes; the operator lists them in object_prefixes"
            )
        return address

    def fetch(self, address: ObjectAddress, folder: Path, deadline: Deadline) -> str:
        """Copy the package's files into ``folder``; the source as it is recorded.

        Raises SourceRejected (nothing there), FetchFailed, AdapterRejected (missing_file, unsafe_format, too_large),
        InsufficientStorage.
        """
        with _store_errors(address):
            system = self._open_file_system(address.scheme)
            sizes = choose_files(_sizes(system, address, deadline), self._max_bytes, folder)
            for name, num_bytes in sizes.items():
                path = f"{address.path}/{name}"
                with system.open(path, "rb", block_size=READ_AHEAD_BYTES, cache_type="readahead") as file:
                    chunks: Iterator[bytes] = iter(lambda file=file: file.read(CHUNK_BYTES), b"")  # type: ignore[misc]
                    receive(chunks, folder / name, num_bytes, deadline)
        return str(address)


def _sizes(system: AbstractFileSystem, address: ObjectAddress, deadline: Deadline) -> dict[str, int]:
    """Bytes of the package's files; where a needed one is not there, the names of what is, so that it can be said."""
    sizes: dict[str, int] = {}
    for name in COPIED_NAMES:
        deadline.check()
        with suppress(FileNotFoundError):
            info = system.info(f"{address.path}/{name}")
            if info["type"] == "file" and info["size"] is not None:
                sizes[name] = int(info["size"])
    if any(name not in sizes for name in REQUIRED_NAMES):
        sizes |= {name: 0 for name in _names(system, address) if name not in COPIED_NAMES}
        if not sizes:
            raise SourceRejected(
                "there is nothing at that source, or this server's credentials cannot see it"
            )
    return sizes


def _names(system: AbstractFileSystem, address: ObjectAddress) -> list[str]:
    try:
        found = system.ls(address.path, detail=False)
    except FileNotFoundError:
        return []
    return [str(path).rstrip("/").rpartition("/")[2] for path in found]


def check_driver(scheme: str) -> None:
    """Raises DriverMissing, SourceRejected for a scheme that is none of ours."""
    if scheme not in DRIVERS:
        raise SourceRejected(f"object stores have the schemes {', '.join(f'{each}://' for each in DRIVERS)}")
    if importlib.util.find_spec(DRIVERS[scheme]) is None:
        raise DriverMissing(
            f"{scheme}:// needs {DRIVERS[scheme]}, which is not installed: pip install 'lorikeet[{scheme}]'"
        )


def open_driver(scheme: str, options: DriverOptions) -> AbstractFileSystem:
    """The scheme's file system, by the operator's options or else its own configuration; nothing is remembered."""
    import fsspec

    return fsspec.filesystem(scheme, **{**options, "skip_instance_cache": True, "use_listings_cache": False})


@contextmanager
def _store_errors(address: ObjectAddress) -> Iterator[None]:
    """The drivers' errors, as ours and without their text, which may hold a key's name or an account's."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise SourceRejected(
            "there is nothing at that source, or this server's credentials cannot see it"
        ) from error
    except AdapterError:
        raise
    except Exception as error:  # botocore's, aiohttp's, Google's, Azure's: each driver has a tree of its own
        what = f"{address.scheme}:// cannot be read ({type(error).__name__})"
        raise FetchFailed(f"{what}; try again, or see that this server's credentials are right") from error
