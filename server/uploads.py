"""Uploads: packages on their way in from other machines, file by file, until one is registered or abandoned.

Owns ``uploads/`` in the state folder: a folder for each upload under a secret id, four allowed file names, byte caps,
and removal after ``IDLE_S`` or at the next start. An upload belongs to the process that opened it (a lock on its folder
says that it lives) and to the caller who did: for others it does not exist. Knows nothing of what the files say; the
registry copies and checks them like any other package's. The event loop's thread only, but for the disk.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from adapters.copying import storage_errors
from adapters.folder_lock import lock_folder
from adapters.package import COPIED_NAMES
from server.errors import WireError, retry_after, shorten

UPLOADS_PATH = "/v1/adapter-uploads"
SCHEME = "upload:"
"""How a registration names an upload as its source."""

MAX_OPEN = 8
"""Uploads at once: they bound the disk that strangers to the registry can take, with ``max_adapter_size``."""
IDLE_S = 900.0
"""An upload that nobody touches for so long is abandoned: its client has died, or forgot it."""

_ID = re.compile(r"up-[0-9a-f]{32}")


def is_raw_body(method: str, path: str) -> bool:
    """Whether a request brings a package's file: its body is bytes, and its limit a package's."""
    return method == "PUT" and path.startswith(f"{UPLOADS_PATH}/")


@dataclass(slots=True)
class Upload:
    """One package that is being put together."""

    id: str
    owner: str
    folder: Path
    created_s: float
    """Unix time."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of each file that is complete."""
    num_coming_bytes: int = 0
    """Of files that are being written now."""
    num_users: int = 0
    """Writers, and a registration that reads it: it does not expire under them."""
    touched_s: float = 0.0
    lock: int = -1

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values()) + self.num_coming_bytes


class Uploads:
    """``clock`` gives monotonic seconds."""

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        *,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self.max_bytes = max_bytes
        self.idle_s = idle_s
        self._clock = clock
        self._open: dict[str, Upload] = {}

    def clear_orphans(self) -> int:
        """Delete what servers that are gone have left; how many. At start, and it spares other servers' uploads."""
        num_cleared = 0
        for folder in list(self._root.iterdir()) if self._root.is_dir() else []:
            lock = lock_folder(folder, "alone")
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
                num_cleared += 1
        return num_cleared

    def open(self, owner: str) -> Upload:
        """Raises WireError 429 too_many_loads, InsufficientStorage."""
        self.expire()
        if len(self._open) >= MAX_OPEN:
            oldest = min(upload.touched_s for upload in self._open.values())
            raise WireError(
                429,
                "too_many_loads",
                f"{MAX_OPEN} uploads are open, the most at once: register or DELETE one, or come back",
                headers=retry_after(oldest + self.idle_s - self._clock()),
            )
        upload_id = f"up-{secrets.token_hex(16)}"
        folder = self._root / upload_id
        with storage_errors():
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(mode=0o700)
        upload = Upload(upload_id, owner, folder, time.time(), touched_s=self._clock())
        upload.lock = lock_folder(folder, "shared") or -1
        self._open[upload_id] = upload
        self._watch(upload)
        return upload

    def find(self, upload_id: str, owner: str) -> Upload:
        """Raises WireError 404 not_found, also for another caller's upload and for one that has expired."""
        self.expire()
        upload = self._open.get(upload_id) if _ID.fullmatch(upload_id) else None
        if upload is None or upload.owner != owner:
            raise WireError(
                404,
                "not_found",
                f"there is no upload {shorten(upload_id, 48)!a}: it was registered, deleted, or left alone for "
                f"{self.idle_s:g} s; open one with POST {UPLOADS_PATH}",
            )
        upload.touched_s = self._clock()
        return upload

    @contextmanager
    def using(self, upload: Upload) -> Iterator[Upload]:
        """Inside, the upload does not expire; its idle time begins anew at the end."""
        upload.num_users += 1
        try:
            yield upload
        finally:
            upload.num_users -= 1
            upload.touched_s = self._clock()

    def discard(self, upload: Upload) -> None:
        """Delete it. Who still writes into it fails on its own; idempotent."""
        if self._open.pop(upload.id, None) is not None:
            _delete(upload)

    async def end(self, upload: Upload) -> None:
        """As ``discard``, off the loop: deleting gigabytes takes a while."""
        if self._open.pop(upload.id, None) is not None:
            await asyncio.to_thread(_delete, upload)

    def expire(self) -> None:
        """Delete what was abandoned."""
        now_s = self._clock()
        for upload in list(self._open.values()):
            if not upload.num_users and now_s - upload.touched_s >= self.idle_s:
                self.discard(upload)

    def close(self) -> None:
        """Delete all of them; the server leaves."""
        for upload in list(self._open.values()):
            self.discard(upload)

    def __len__(self) -> int:
        return len(self._open)

    def _watch(self, upload: Upload) -> None:
        """Expiry needs no visitor: the loop looks again when the upload's time may be up."""
        with suppress(RuntimeError):  # no loop: a test, or a tool, that calls ``expire`` itself
            asyncio.get_running_loop().call_later(self.idle_s, self._look_again, upload)

    def _look_again(self, upload: Upload) -> None:
        self.expire()
        if upload.id in self._open:
            self._watch(upload)


def require_file_name(name: str) -> str:
    """Raises WireError 400: the four files of a package are all that is taken, so that nothing else ever lies here."""
    if name not in COPIED_NAMES:
        raise WireError(
            400,
            "invalid_request",
            f"a package has the files {', '.join(COPIED_NAMES)}; {shorten(name, 64)!a} is none of them",
            param="file",
        )
    return name


def _delete(upload: Upload) -> None:
    shutil.rmtree(upload.folder, ignore_errors=True)
    if upload.lock >= 0:
        os.close(upload.lock)
