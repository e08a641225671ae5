"""Where the server keeps its state, and where packages may come from: roots on this machine, places on others."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import adapters
from adapters.errors import DriverMissing
from adapters.sources.hub import HubSource
from adapters.sources.landing import Landing
from adapters.sources.object_store import ObjectAddress, ObjectStoreSource
from adapters.sources.remote import RemoteSources
from server.settings import Settings
from server.sources import data_home

logger = logging.getLogger("lorikeet.server")

SAMPLES = Path(adapters.__file__).parent / "samples"


class PlaceError(OSError):
    """A folder that the operator named cannot be used."""


def adapter_roots(settings: Settings) -> tuple[Path, ...]:
    """The roots that were asked for, else the bundled samples where the embedded base is served."""
    for root in settings.adapter_root:
        if not root.is_dir():
            raise PlaceError(f"adapter_root {root} is not a folder")
    if settings.adapter_root:
        return settings.adapter_root
    return (SAMPLES,) if settings.base == "pocket" else ()


def remote_sources(settings: Settings, state_dir: Path) -> RemoteSources:
    """What is allowed of hub and object stores. Raises PlaceError where a driver is missing."""
    max_bytes = int(settings.max_adapter_size)
    prefixes = [ObjectAddress.parse(prefix) for prefix in settings.object_prefixes]
    try:
        stores = ObjectStoreSource(prefixes, max_bytes, options=settings.object_options) if prefixes else None
    except DriverMissing as error:
        raise PlaceError(f"object_prefixes: {error}") from error
    landing = Landing(state_dir / "fetches")
    landing.clear_orphans()
    return RemoteSources(landing, settings.fetch_timeout_s, _hub(settings, max_bytes), stores)


def _hub(settings: Settings, max_bytes: int) -> HubSource | None:
    if not settings.hub_organisations:
        return None
    return HubSource(
        frozenset(settings.hub_organisations),
        max_bytes,
        token=settings.hub_token.get_secret_value() if settings.hub_token else None,
        endpoint=settings.hub_endpoint,
        is_offline=settings.local_files_only,
    )


def open_state_dir(settings: Settings) -> tuple[Path, bool]:
    """The state folder, made if need be, and whether it will last. Raises PlaceError.

    A default that cannot be written (a container's read-only home) falls back to one in the system's temporary folder.
    """
    if settings.state_dir is not None:
        if not _is_usable(settings.state_dir):
            raise PlaceError(
                f"state_dir {settings.state_dir} cannot be written: name another with --state-dir"
            )
        return settings.state_dir, True
    default = data_home() / "lorikeet" / settings.base_slug
    if _is_usable(default):
        return default, True
    fallback = Path(tempfile.gettempdir()) / f"lorikeet-{os.getuid()}" / settings.base_slug
    if not _is_usable(fallback) or fallback.parent.stat().st_uid != os.getuid():
        raise PlaceError(f"neither {default} nor {fallback} can be written: name a folder with --state-dir")
    return fallback, False


def _is_usable(folder: Path) -> bool:
    """Whether the folder exists, or can be made, and takes files."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
