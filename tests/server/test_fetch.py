"""The guarded fetch: what it reaches, what it refuses, and that it connects to the address that it checked.

A small server on loopback plays the outside world; only these tests give the Fetcher another resolver, table and port.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from server.addresses import Address, is_public
from server.errors import WireError
from server.fetch import Fetcher, FetchPolicy, Target, parse_target

PUBLIC = ip_address("93.184.215.14")
LOOPBACK = ip_address("127.0.0.1")
TLS = Path(__file__).resolve().parent.parent / "support" / "tls"
MAX_BYTES = 10_000

Handler = Callable[[dict[str, str], str, asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class World:
    """A one-page internet: names, and a server whose requests are recorded."""

    handler: Handler
    names: dict[str, list[Address]] = field(default_factory=lambda: {"img.example": [LOOPBACK]})
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    lookups: list[str] = field(default_factory=list)
    denied: set[Address] = field(default_factory=set)

    async def resolve(self, host: str, port: int) -> Sequence[Address]:
        self.lookups.append(host)
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    def allows(self, address: Address) -> bool:
        return address not in self.denied

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:] if line)}
        path = lines[0].split(" ")[1]
        self.requests.append((path, headers))
        try:
            await self.handler(headers, path, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    def fetch(self, url: str, **policy: object) -> bytes:
        async def run() -> bytes:
            tls = _server_tls() if url.startswith("https:") else None
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=tls)
            port = server.sockets[0].getsockname()[1]
            fetcher = Fetcher(
                FetchPolicy(**policy),  # type: ignore[arg-type]
                resolve=self.resolve,
                allows=self.allows,
                ports={"http": port, "https": port},
                tls=lambda: ssl.create_default_context(cafile=str(TLS / "certificate.pem")),
            )
            try:
                return await fetcher.fetch(url, MAX_BYTES)
            finally:
                server.close()

        return asyncio.run(run())


def _server_tls() -> ssl.SSLContext:
    """For img.example, by a certificate that nobody but these tests trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
    return context


def reply(body: bytes, status: str = "200 OK", **headers: str) -> Handler:
    async def handle(request: dict[str, str], path: str, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()

    return handle


@contextmanager
def refused(status: int, code: str, *without: str) -> Iterator[None]:
    with pytest.raises(WireError) as caught:
        yield
    assert (caught.value.status, caught.value.code) == (status, code)
    for text in without:
        assert text not in caught.value.message


# ---- the way that works ----------------------------------------------------------------------------------------


def test_a_picture_is_fetched() -> None:
    world = World(reply(b"picture"))
    assert world.fetch("http://img.example/a%20b.png?x=1&y=a/b#part") == b"picture"
    path, headers = world.requests[0]
    assert path == "/a%20b.png?x=1&y=a/b"
    assert headers["host"] == "img.example"
    assert headers["accept-encoding"] == "identity"
    assert not {"cookie", "authorization", "referer", "x-forwarded-for"} & set(headers)


def test_a_name_is_resolved_once_and_the_checked_address_is_used() -> None:
    """A name server that answers otherwise the second time is never asked a second time."""
    world = World(reply(b"picture"))
    world.fetch("http://img.example/")
    assert world.lookups == ["img.example"]


def test_tls_is_checked_against_the_name_not_the_address() -> None:
    names = {"img.example": [LOOPBACK], "other.example": [LOOPBACK]}
    world = World(reply(b"picture"), names=names)
    assert world.fetch("https://img.example/a.png") == b"picture"
    assert world.requests[0][1]["host"] == "img.example"
    with refused(424, "media_fetch_failed"):
        World(reply(b"picture"), names=names).fetch("https://other.example/a.png")


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert World(reply(b"picture")).fetch("http://img.example/") == b"picture"


# ---- policies and URLs -----------------------------------------------------------------------------------------


def test_off_fetches_nothing() -> None:
    world = World(reply(b""))
    with refused(400, "media_url_rejected"):
        world.fetch("http://img.example/", mode="off")
    assert world.lookups == []


@pytest.mark.parametrize(
    ("host", "is_listed"),
    [
        ("img.example", True),
        ("IMG.example.", True),
        ("cdn.pics.example", True),
        ("pics.example", False),
        ("evilpics.example", False),
        ("img.example.evil.example", False),
    ],
)
def test_the_allowlist_is_exact(host: str, is_listed: bool) -> None:
    world = World(reply(b"picture"), names={host: [LOOPBACK] for host in ("img.example", "cdn.pics.example")})
    options = {"mode": "allowlist", "hosts": ("img.example", "*.pics.example")}
    if is_listed:
        assert world.fetch(f"http://{host}/", **options) == b"picture"
    else:
        with refused(400, "media_url_rejected"):
            world.fetch(f"http://{host}/", **options)
        assert world.lookups == []


@pytest.mark.parametrize(
    "url",
    [
        "http://img.example:8080/",
        "https://img.example:80/",
        "http://img.example:99999/",
        "http://user@img.example/",
        "http://user:pass@img.example/",
        "http://img.example@evil.example/",
        "http://img.example\\@evil.example/",
        "http://img.example/a b",
        "http://img.example/\r\nhost: evil",
        "\thttp://img.example/",
        "http://localhost/",
        "http://a.localhost/",
        "http://metadata.google.internal/",
        "http://metadata/",
        "http://printer.local/",
        "http:///path",
        "http://",
        "http://[fe80::1%25eth0]/",
        "http://img.example/" + "a" * 9000,
        "gopher://img.example/",
        "file:///etc/passwd",
        "http:img.example",
    ],
)
def test_urls_that_parsers_disagree_about_are_rejected(url: str) -> None:
    world = World(reply(b""))
    with refused(400, "media_url_rejected"):
        world.fetch(url)
    assert world.lookups == []


def test_a_url_is_parsed_into_fields_once() -> None:
    assert parse_target("HTTPS://Bücher.Example:443/ä?q=ü") == Target(
        "https", "xn--bcher-kva.example", "/%C3%A4?q=%C3%BC"
    )


# ---- addresses -------------------------------------------------------------------------------------------------

DENIED_TEXT = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254
169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1
203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254
64:ff9b::127.0.0.1 64:ff9b::a00:1 64:ff9b:1::1 100::1 2001::1 2001:0:7f00:1:: 2001:2::1 2001:db8::1
2002:7f00:1:: 2002:a00:1:: 2002:c0a8:101:: 2002:a9fe:a9fe:: 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fd12::1
fe80::1 fec0::1 ff02::1 4000::1
"""
ALLOWED_TEXT = """
1.1.1.1 8.8.8.8 93.184.215.14 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.0.1.1 223.255.255.255
2606:4700::1111 2a00:1450:4001::1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2002:808:808::
"""


@pytest.mark.parametrize("text", DENIED_TEXT.split())
def test_private_and_special_addresses_are_denied(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", ALLOWED_TEXT.split())
def test_public_addresses_are_allowed(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "0x7f.1", "017700000001", "127.1", "[::1]", "[::ffff:7f00:1]"]
)
def test_literal_addresses_in_every_spelling_are_checked(host: str) -> None:
    """With the system's resolver and the real table: nothing is connected to."""
    fetcher = Fetcher(FetchPolicy())
    with pytest.raises(WireError) as caught:
        asyncio.run(fetcher.fetch(f"http://{host}/", MAX_BYTES))
    assert caught.value.code in ("media_url_rejected", "media_fetch_failed")
    if host in ("127.0.0.1", "[::1]", "[::ffff:7f00:1]", "2130706433"):
        assert caught.value.code == "media_url_rejected"


def test_one_denied_address_among_many_refuses_the_name() -> None:
    world = World(reply(b"picture"), names={"img.example": [LOOPBACK, PUBLIC]}, denied={PUBLIC})
    with refused(400, "media_url_rejected", str(PUBLIC)):
        world.fetch("http://img.example/")
    assert world.requests == []


# ---- redirects -------------------------------------------------------------------------------------------------


def redirecting(*targets: str) -> Handler:
    async def handle(request: dict[str, str], path: str, writer: asyncio.StreamWriter) -> None:
        step = int(path.strip("/") or 0)
        if step < len(targets):
            await reply(b"", "302 Found", location=targets[step])(request, path, writer)
        else:
            await reply(b"picture")(request, path, writer)

    return handle


def test_three_redirects_are_followed_and_a_fourth_is_not() -> None:
    three = World(redirecting("/1", "http://img.example/2", "//img.example/3"))
    assert three.fetch("http://img.example/0") == b"picture"
    with refused(424, "media_fetch_failed"):
        World(redirecting("/1", "/2", "/3", "/4")).fetch("http://img.example/0")


@pytest.mark.parametrize(
    "target", ["http://inside.example/", "http://user@img.example/", "http://img.example:81/", "file:///x"]
)
def test_each_redirect_is_checked_again(target: str) -> None:
    inside = ip_address("10.1.2.3")
    world = World(
        redirecting(target), names={"img.example": [LOOPBACK], "inside.example": [inside]}, denied={inside}
    )
    with refused(400, "media_url_rejected", "10.1.2.3", "inside"):
        world.fetch("http://img.example/0")
    assert len(world.requests) == 1


def test_a_redirect_off_the_allowlist_is_refused() -> None:
    world = World(
        redirecting("http://other.example/"), names={"img.example": [LOOPBACK], "other.example": [LOOPBACK]}
    )
    with refused(400, "media_url_rejected"):
        world.fetch("http://img.example/0", mode="allowlist", hosts=("img.example",))
    assert world.lookups == ["img.example"]


# ---- caps ------------------------------------------------------------------------------------------------------


def test_bytes_are_capped_while_they_stream() -> None:
    sent = 0

    async def endless(request: dict[str, str], path: str, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(10_000):
            writer.write(b"x" * 1000)
            sent += 1000
            await writer.drain()

    with refused(400, "image_too_large"):
        World(endless).fetch("http://img.example/")
    assert sent < 10_000_000


def test_one_deadline_covers_everything() -> None:
    async def drip(request: dict[str, str], path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    begin_s = time.monotonic()
    with refused(424, "media_fetch_failed"):
        World(drip).fetch("http://img.example/", timeout_s=0.3)
    assert time.monotonic() - begin_s < 3


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "304 Not Modified", "206 Partial Content"])
def test_other_answers_are_424(status: str) -> None:
    with refused(424, "media_fetch_failed", "img.example"):
        World(reply(b"", status)).fetch("http://img.example/")


def test_a_compressed_answer_is_refused_not_inflated() -> None:
    with refused(424, "media_fetch_failed"):
        World(reply(b"x" * 100, content_encoding="gzip")).fetch("http://img.example/")


def test_failures_of_names_and_connections_are_424() -> None:
    with refused(424, "media_fetch_failed", "nowhere.example"):
        World(reply(b"")).fetch("http://nowhere.example/")

    async def hang_up(request: dict[str, str], path: str, writer: asyncio.StreamWriter) -> None:
        writer.close()

    world = World(hang_up)
    with refused(424, "media_fetch_failed", "127.0.0.1"):
        world.fetch("http://img.example/")
    assert len(world.requests) == 1, "one attempt only"


def test_at_most_so_many_fetches_at_once() -> None:
    running = most = 0

    async def slow(request: dict[str, str], path: str, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        await reply(b"picture")(request, path, writer)

    async def run() -> None:
        world = World(slow)
        server = await asyncio.start_server(world.serve, "127.0.0.1", 0)
        ports = dict.fromkeys(("http", "https"), server.sockets[0].getsockname()[1])
        fetcher = Fetcher(FetchPolicy(max_concurrent=3), world.resolve, world.allows, ports)
        await asyncio.gather(*(fetcher.fetch("http://img.example/", MAX_BYTES) for _ in range(9)))
        server.close()

    asyncio.run(run())
    assert most == 3
