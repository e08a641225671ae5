"""HubSource: packages on the Hugging Face hub, by ``hf://org/name@revision``.

Owns the address, the allow-list of organisations, and the pinning of a branch or tag to the commit that it is now. Four
files are taken and no other; their sizes are known before the first byte. The token is the server's own or none: the
machine's saved login is never used, and a request cannot bring one. Offline, the hub's cache on this machine answers.

Foreign errors are translated here. Place in a request's way: none; it brings what later requests name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import FetchFailed, SourceRejected
from adapters.package import CONFIG_NAME, COPIED_NAMES, open_package_file
from adapters.sources.arrival import CHUNK_BYTES, Deadline, choose_files, receive

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

SCHEME = "hf://"
ANSWER_TIMEOUT_S = 15.0
"""The hub begins to answer, or goes on, within so long."""

_ADDRESS = re.compile(
    r"hf://(?P<organisation>[A-Za-z0-9][A-Za-z0-9._-]{0,95})/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,127}))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubAddress:
    organisation: str
    name: str
    revision: str | None

    @property
    def repo(self) -> str:
        return f"{self.organisation}/{self.name}"

    def at(self, commit: str) -> str:
        """The source as it is recorded: for ever the same bytes."""
        return f"{SCHEME}{self.repo}@{commit}"

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f"@{self.revision}" if self.revision else "")


class HubSource:
    """Thread-safe: it keeps nothing but its configuration."""

    def __init__(
        self,
        organisations: frozenset[str],
        max_bytes: int,
        *,
        token: str | None = None,
        endpoint: str | None = None,
        is_offline: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        """``endpoint`` and ``cache_dir`` None are what huggingface_hub takes by itself."""
        self._organisations = organisations
        self._max_bytes = max_bytes
        self._token = token
        self._endpoint = endpoint
        self._is_offline = is_offline
        self._cache_dir = cache_dir

    def parse(self, source: str) -> HubAddress:
        """Raises SourceRejected for a malformed address and for an organisation that is not allowed."""
        match = _ADDRESS.fullmatch(source)
        if match is None or ".." in source or source.endswith("/"):
            raise SourceRejected("the source is malformed; write hf://organisation/name@revision")
        address = HubAddress(match["organisation"], match["name"], match["revision"])
        self._check_allowed(address.organisation)
        return address

    def _check_allowed(self, organisation: str) -> None:
        if organisation not in self._organisations:
            raise SourceRejected(
                f"packages of the hub organisation {organisation!a} are not allowed here; the operator lists those "
                "that are in hub_organisations"
            )

    def fetch(self, address: HubAddress, folder: Path, deadline: Deadline) -> str:
        """Copy the package's files into ``folder``; the source with its commit.

        Raises SourceRejected (no such repository or revision, none in the cache when offline), FetchFailed,
        AdapterRejected (missing_file, unsafe_format, too_large), InsufficientStorage.
        """
        from huggingface_hub import constants

        if self._is_offline or constants.HF_HUB_OFFLINE:
            return self._copy_cached(address, folder, deadline)
        with _hub_errors(address):
            return self._download(address, folder, deadline)

    # ---- online ------------------------------------------------------------------------------------------------

    def _download(self, address: HubAddress, folder: Path, deadline: Deadline) -> str:
        commit, files = self._list(address, deadline)
        sizes = choose_files({name: file.size or 0 for name, file in files.items()}, self._max_bytes, folder)
        for name, num_bytes in sizes.items():
            sha256 = files[name].lfs.sha256 if files[name].lfs is not None else None  # type: ignore[union-attr]
            with self._open(address, name, commit, deadline) as chunks:
                receive(chunks, folder / name, num_bytes, deadline, sha256)
        return address.at(commit)

    def _list(self, address: HubAddress, deadline: Deadline) -> tuple[str, dict[str, RepoSibling]]:
        """The commit that the revision is now, and the files in its top folder."""
        from huggingface_hub import HfApi

        info = HfApi(endpoint=self._endpoint, token=self._token or False).model_info(
            address.repo,
            revision=address.revision,
            files_metadata=True,
            timeout=min(ANSWER_TIMEOUT_S, deadline.remaining_s + 0.001),
        )
        self._check_allowed(info.id.partition("/")[0])  # the hub follows renames
        if info.sha is None or not _COMMIT.fullmatch(info.sha):
            raise FetchFailed("the hub names no commit for that revision; try again")
        siblings = info.siblings or []
        if any(file.rfilename in COPIED_NAMES and file.size is None for file in siblings):
            raise FetchFailed("the hub gives no size for a file of the package; try again")
        return info.sha, {file.rfilename: file for file in siblings if "/" not in file.rfilename}

    @contextmanager
    def _open(
        self, address: HubAddress, name: str, commit: str, deadline: Deadline
    ) -> Iterator[Iterator[bytes]]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, not in __all__

        deadline.check()
        url = hf_hub_url(address.repo, name, revision=commit, endpoint=self._endpoint)
        # identity: the announced size is that of the file, not of a compressed answer
        headers = {**build_hf_headers(token=self._token or False), "accept-encoding": "identity"}
        timeout_s = min(ANSWER_TIMEOUT_S, deadline.remaining_s + 0.001)
        with get_session().stream(
            "GET", url, headers=headers, timeout=timeout_s, follow_redirects=True
        ) as answer:
            if answer.status_code != 200:
                raise FetchFailed(f"the hub answered {answer.status_code} for {name}; try again")
            yield answer.iter_bytes(CHUNK_BYTES)

    # ---- offline -----------------------------------------------------------------------------------------------

    def _copy_cached(self, address: HubAddress, folder: Path, deadline: Deadline) -> str:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            address.repo, CONFIG_NAME, revision=address.revision, cache_dir=self._cache_dir
        )
        if not isinstance(found, str):
            raise SourceRejected(
                f"this server asks no hub, and {address} is not in this machine's hub cache: fill it with `hf download`"
            )
        snapshot = Path(found).parent  # models--org--name/snapshots/<commit>, whose files link into blobs/
        sizes = {entry.name: entry.stat().st_size for entry in snapshot.iterdir() if entry.is_file()}
        for name, num_bytes in choose_files(sizes, self._max_bytes, folder).items():
            with open_package_file(snapshot, name, within=snapshot.parent.parent) as file:
                receive(iter(lambda: file.read(CHUNK_BYTES), b""), folder / name, num_bytes, deadline)
        return address.at(snapshot.name)


@contextmanager
def _hub_errors(address: HubAddress) -> Iterator[None]:
    """huggingface_hub's errors and its transport's, as ours; without their text, which may hold a signature."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # httpx's or httpx2's HTTPError, whichever the installed huggingface_hub uses
    failures: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OfflineModeIsEnabled, TimeoutError)
    try:
        yield
    except RevisionNotFoundError as error:
        raise SourceRejected(f"the hub's {address.repo} has no revision {address.revision!a}") from error
    except RepositoryNotFoundError as error:
        raise SourceRejected(
            f"the hub has no {address.repo}, or this server's hub_token may not read it"
        ) from error
    except HFValidationError as error:
        raise SourceRejected(
            "the hub's names look otherwise; write hf://organisation/name@revision"
        ) from error
    except failures as error:
        raise FetchFailed(f"the hub cannot be read ({type(error).__name__}); try again") from error
