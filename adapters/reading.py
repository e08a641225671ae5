"""PackageReader: reads stored packages by digest, for a process that has the store and not the registry.

Owns nothing but the knowledge of which packages were found sound. While it reads, the package is held, so that nobody
who shares the store deletes it. Whether a version still has a name is the registry's business, in another process.

Place in a request's way: step 5, under the mover.
"""

from __future__ import annotations

from pathlib import Path

from adapters.errors import AdapterNotFound
from adapters.ref import AdapterRef
from adapters.sites import SiteTable
from adapters.store import PackageStore, check_stored
from adapters.weights import AdapterWeights, load_weights


class PackageReader:
    """Any thread."""

    def __init__(self, packages: Path, sites: SiteTable) -> None:
        self._store = PackageStore(packages)
        self._sites = sites
        self._sound: set[str] = set()

    def load(self, ref: AdapterRef) -> AdapterWeights:
        """Raises AdapterNotFound, AdapterRejected, SourceRejected."""
        try:
            hold = self._store.hold(ref.digest)
        except FileNotFoundError:
            raise AdapterNotFound(str(ref)) from None
        try:
            folder = self._store.path(ref.digest)
            if ref.digest not in self._sound:  # once: the disk may have rotted since it was checked
                check_stored(folder, ref.digest, str(ref))
                self._sound.add(ref.digest)
            return load_weights(folder, self._sites, digest=ref.digest)
        finally:
            hold.release()
