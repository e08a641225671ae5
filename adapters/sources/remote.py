"""RemoteSources: packages from other machines, each fetched once into a folder of its own, then deleted again.

Owns which schemes are on, the deadline, and the fetches under way: who asks for what is being fetched shares it. The
transfer runs on a thread of its own, so that a driver which hangs costs its caller the deadline and no more; what it
leaves is deleted when it comes back. Does not read packages: the registry copies and checks them like local ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import AdapterError, FetchFailed, SourceOff
from adapters.sources.arrival import Deadline
from adapters.sources.hub import SCHEME as HUB_SCHEME
from adapters.sources.hub import HubSource
from adapters.sources.landing import Berth, Landing
from adapters.sources.object_store import ObjectStoreSource

logger = logging.getLogger("lorikeet.adapters.sources")

GRACE_S = 5.0
"""What a fetch may take beyond its deadline to notice it; then its caller goes without it."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A package on this machine, for as long as the ``with`` lasts."""

    folder: Path
    source: str
    """Where it came from, pinned as far as the place can be."""


@dataclass(slots=True, eq=False)
class _Flight:
    """One fetch, and how many wait for it or use it."""

    berth: Berth
    num_users: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)
    source: str = ""
    error: Exception | None = None


class RemoteSources:
    """Thread-safe. ``fetched`` blocks: never call it on the event loop."""

    def __init__(
        self,
        landing: Landing,
        timeout_s: float,
        hub: HubSource | None = None,
        stores: ObjectStoreSource | None = None,
    ) -> None:
        self._landing = landing
        self._timeout_s = timeout_s
        self._hub = hub
        self._stores = stores
        self._lock = threading.Lock()  # guards the flights and their users
        self._flights: dict[str, _Flight] = {}

    @classmethod
    def off(cls) -> RemoteSources:
        """One that refuses everything."""
        return cls(Landing(Path()), 1.0)

    @staticmethod
    def takes(source: str) -> bool:
        """Whether it names another machine: such sources are ours to fetch, or to refuse."""
        return "://" in source and not source.startswith("file://")

    def check(self, source: str) -> None:
        """Raises SourceOff, SourceRejected for what ``fetched`` would not even try."""
        self._route(source)

    @contextmanager
    def fetched(self, source: str) -> Iterator[Fetched]:
        """The package's files in a private folder.

        Raises AdapterRejected, SourceRejected, FetchFailed, InsufficientStorage.
        """
        key, fetch = self._route(source)
        flight = self._board(key, fetch)
        try:
            if not flight.is_over.wait(self._timeout_s + GRACE_S):
                raise FetchFailed(f"the source gave nothing for {self._timeout_s:g} s; try again")
            if flight.error is not None:
                raise flight.error
            yield Fetched(flight.berth.folder, flight.source)
        finally:
            self._leave(key, flight)

    def _route(self, source: str) -> tuple[str, Callable[[Path, Deadline], str]]:
        """The source in one form, and what fetches it."""
        if source.startswith(HUB_SCHEME):
            if (hub := self._hub) is None:
                raise SourceOff(
                    "the hub is off as a source here; the operator allows organisations with hub_organisations"
                )
            repo = hub.parse(source)
            return str(repo), lambda folder, deadline: hub.fetch(repo, folder, deadline)
        scheme = source.partition("://")[0].lower()
        if (stores := self._stores) is None or scheme not in stores.schemes:
            raise SourceOff(
                f"{scheme[:16]!a} is off as a source here: give a folder under an adapter root, an upload, or what the "
                "operator allows with hub_organisations and object_prefixes"
            )
        address = stores.parse(source)
        return str(address), lambda folder, deadline: stores.fetch(address, folder, deadline)

    # ---- flights -----------------------------------------------------------------------------------------------

    def _board(self, key: str, fetch: Callable[[Path, Deadline], str]) -> _Flight:
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = _Flight(self._landing.open(), num_users=1)
                threading.Thread(
                    target=self._fly, args=(key, flight, fetch), name="lorikeet-fetch", daemon=True
                ).start()
            flight.num_users += 1
        return flight

    def _fly(self, key: str, flight: _Flight, fetch: Callable[[Path, Deadline], str]) -> None:
        begin_s = time.monotonic()
        try:
            flight.source = fetch(flight.berth.folder, Deadline(self._timeout_s))
            logger.info(
                "source.fetched source=%s took_ms=%.0f", flight.source, 1000 * (time.monotonic() - begin_s)
            )
        except AdapterError as error:
            flight.error = error
            logger.warning("source.fetch_failed source=%s error=%s", key, type(error).__name__)
        except Exception as error:
            flight.error = error
            logger.exception("source.fetch_broke source=%s", key)
        finally:
            flight.is_over.set()
            self._leave(key, flight)

    def _leave(self, key: str, flight: _Flight) -> None:
        """The last of those who fetch and use it deletes it. Nobody joins a fetch that is over."""
        with self._lock:
            flight.num_users -= 1
            is_last = flight.num_users == 0
            if flight.is_over.is_set() and self._flights.get(key) is flight:
                del self._flights[key]
        if is_last:
            flight.berth.clear()
