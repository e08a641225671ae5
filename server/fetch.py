"""Fetcher: one guarded GET of an image from a stranger's URL; no request reaches into the private network through it.

Owns: parsing once, resolving once, checking every address, connecting to the checked one, and the caps. Does not
know what an image is. Place in a request's way: step 3, before the decoder. The environment's proxies are never used.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_address
from typing import Literal
from urllib.parse import quote, urljoin, urlsplit

import httpx2

from server.addresses import Address, Allows, is_public
from server.decode import image_too_large
from server.errors import WireError

logger = logging.getLogger("lorikeet.server")

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

MAX_URL_CHARS = 8192
PORTS = {"http": 80, "https": 443}
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")
"""Characters that parsers disagree about."""
_NEVER = ("localhost", "metadata", "instance-data")
_NEVER_BELOW = (".localhost", ".local", ".internal", ".localdomain", ".home.arpa")


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """``public``: any host with public addresses. ``allowlist``: only ``hosts``, which must be public as well."""

    mode: Literal["off", "allowlist", "public"] = "public"
    hosts: tuple[str, ...] = ()
    """Exact names, or ``*.example.com`` for subdomains."""
    timeout_s: float = 5.0
    """For everything: names, connections, redirects, bytes. One attempt."""
    max_redirects: int = 3
    max_concurrent: int = 8


@dataclass(frozen=True, slots=True)
class Target:
    """A URL parsed once; what is connected to is made from these fields and never from the text again."""

    scheme: str
    host: str  # ASCII, lower case
    path: str  # with the query, percent-encoded

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self._bracketed}{self.path}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def url_rejected(why: str) -> WireError:
    return WireError(400, "media_url_rejected", f"this server does not fetch that image URL: {why}")


def fetch_failed(why: str) -> WireError:
    return WireError(424, "media_fetch_failed", f"the image URL could not be fetched: {why}")


def parse_target(url: str) -> Target:
    """Parse strictly. Raises WireError media_url_rejected."""
    if len(url) > MAX_URL_CHARS:
        raise url_rejected(f"it is over {MAX_URL_CHARS} characters long")
    if _FORBIDDEN.search(url):
        raise url_rejected("it holds white space, control characters or a backslash")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise url_rejected("it cannot be parsed") from error
    if parts.scheme not in PORTS:
        raise url_rejected("its scheme is not data, http or https")
    if "@" in parts.netloc:
        raise url_rejected("it carries user information")
    if port is not None and port != PORTS[parts.scheme]:
        raise url_rejected("its port is not 80 for http or 443 for https")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]|") if parts.query else ""
    return Target(parts.scheme, _ascii_host(host), path + query)


def _ascii_host(host: str) -> str:
    """The host in ASCII lower case, without a trailing dot; not one of the names that mean an inner host."""
    if ":" in host:
        name = host
    else:
        try:
            name = host.lower() if host.isascii() else host.encode("idna").decode("ascii").lower()
        except UnicodeError as error:
            raise url_rejected("its host name is not valid") from error
    name = name.rstrip(".")
    if not name or "%" in name or name in _NEVER or name.endswith(_NEVER_BELOW):
        raise url_rejected("its host is not a public name")
    return name


@cache
def _tls() -> ssl.SSLContext:
    """One context for all fetches: making one reads every root certificate."""
    return httpx2.create_ssl_context(trust_env=False)


class SystemResolver:
    """``getaddrinfo`` on a few threads of its own, so that a slow name server cannot take the loop's."""

    def __init__(self, num_threads: int = 8) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lorikeet-resolve")

    async def __call__(self, host: str, port: int) -> Sequence[Address]:
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._pool, lambda: _getaddrinfo(host, port))
        return [ip_address(row) for row in rows]


def _getaddrinfo(host: str, port: int) -> list[str]:
    rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in rows))


@dataclass(slots=True)
class Fetcher:
    """``resolve``, ``allows``, ``ports`` and ``tls`` are replaced by tests alone; no setting reaches them."""

    policy: FetchPolicy
    resolve: Resolve = field(default_factory=SystemResolver)
    allows: Allows = is_public
    ports: dict[str, int] = field(default_factory=lambda: dict(PORTS))
    tls: Callable[[], ssl.SSLContext] = _tls
    _places: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._places = asyncio.Semaphore(self.policy.max_concurrent)

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        """The body. Raises WireError: media_url_rejected, media_fetch_failed, image_too_large."""
        target = self._admit(url)
        async with self._places:
            try:
                async with asyncio.timeout(self.policy.timeout_s):
                    return await self._follow(target, max_bytes)
            except TimeoutError as error:
                raise fetch_failed(f"it took over {self.policy.timeout_s:g} s") from error

    def _admit(self, url: str) -> Target:
        if self.policy.mode == "off":
            raise url_rejected("send the image as a data: URL")
        target = parse_target(url)
        if self.policy.mode == "allowlist" and not self._is_listed(target.host):
            raise url_rejected("its host is not on the server's list; send the image as a data: URL")
        return target

    def _is_listed(self, host: str) -> bool:
        return any(
            host.endswith(entry[1:].lower()) if entry.startswith("*.") else host == entry.lower()
            for entry in self.policy.hosts
        )

    async def _follow(self, target: Target, max_bytes: int) -> bytes:
        for _ in range(self.policy.max_redirects + 1):
            address = await self._address_of(target)
            outcome = await self._get(target, address, max_bytes)
            if isinstance(outcome, bytes):
                return outcome
            target = self._admit(outcome)
        raise fetch_failed(f"it redirects more than {self.policy.max_redirects} times")

    async def _address_of(self, target: Target) -> Address:
        """Resolve once; every address must be allowed, and the first is the one connected to."""
        try:
            addresses = await self.resolve(target.host, PORTS[target.scheme])
        except (OSError, UnicodeError) as error:
            raise fetch_failed("its host name does not resolve") from error
        if not addresses:
            raise fetch_failed("its host name does not resolve")
        if not all(self.allows(address) for address in addresses):
            raise url_rejected("its host is not a public address")
        return addresses[0]

    async def _get(self, target: Target, address: Address, max_bytes: int) -> bytes | str:
        """The body, or the URL that the answer redirects to."""
        where = f"[{address}]" if address.version == 6 else str(address)
        url = f"{target.scheme}://{where}:{self.ports[target.scheme]}{target.path}"
        headers = {
            "host": target.url.split("/")[2],
            "accept": "image/*",
            "accept-encoding": "identity",
            "user-agent": "lorikeet",
        }
        # the URL names the checked address; the host's name goes into Host, and into TLS for SNI and the certificate
        extensions = {"sni_hostname": target.host}
        try:
            async with (
                httpx2.AsyncClient(
                    trust_env=False, verify=self.tls(), timeout=self.policy.timeout_s
                ) as client,
                client.stream("GET", url, headers=headers, extensions=extensions) as response,
            ):
                return await _read(response, target, max_bytes)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            logger.info("media.fetch_failed error=%s", type(error).__name__)
            raise fetch_failed("the connection failed") from error


async def _read(response: httpx2.Response, target: Target, max_bytes: int) -> bytes | str:
    if response.status_code in (301, 302, 303, 307, 308) and "location" in response.headers:
        return urljoin(target.url, response.headers["location"])
    if response.status_code != 200:
        raise fetch_failed(f"the server answered {response.status_code}")
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise fetch_failed("the server compressed its answer although identity was asked for")
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > max_bytes:
            raise image_too_large(f"over {max_bytes:,} bytes", f"{max_bytes:,} bytes")
    return bytes(body)
