"""Who gets in: keys, scopes, adapter globs, and what a loopback address allows."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi.routing import iter_route_contexts

from server.auth import PUBLIC_PATHS, need_of
from server.keys import Caller, Key, KeyFileError, KeyRing, hash_key, read_keys
from tests.support.surface import Surface, client_of, make_surface

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
INFER, ADMIN, METRICS = "infer-key-0001", "admin-key-0001", "metrics-key-01"


def ring() -> KeyRing:
    return KeyRing(
        [
            Key(hash_key(INFER), Caller("app", frozenset({"infer"}), ("team-*",))),
            Key(hash_key(ADMIN), Caller("ops", frozenset({"admin"}))),
            Key(hash_key(METRICS), Caller("prometheus", frozenset({"metrics"}))),
        ]
    )


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    surface = make_surface(tmp_path_factory.mktemp("surface"), ring())
    surface.register("team-invoice", seed=1)
    surface.register("other-invoice", seed=2)
    return surface


@pytest.fixture(scope="module")
def client(surface: Surface) -> Iterator[httpx2.Client]:
    with client_of(surface) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def all_routes(surface: Surface) -> list[tuple[str, str]]:
    """(method, a concrete path) of every route the app has, however deep it was included."""
    found = []
    for context in iter_route_contexts(surface.app.routes):
        for method in context.methods or ():
            path = (context.path_format or "").replace("{model}", "x").replace("{name}", "x")
            found.append((method, path.replace("{model:path}", "x").replace("{name:path}", "x")))
    return found


def test_every_route_but_health_and_ready_asks_for_a_key(surface: Surface, client: httpx2.Client) -> None:
    routes = all_routes(surface)
    assert ("POST", "/v1/chat/completions") in routes
    assert ("DELETE", "/v1/models/x") in routes
    assert len(routes) > 20
    for method, path in routes:
        status = client.request(method, path).status_code
        if path in PUBLIC_PATHS:
            assert status == 200, (method, path)
        else:
            assert status == 401, (method, path)
            assert client.request(method, path, headers=bearer("wrong-key-0001")).status_code == 401


def test_a_path_that_does_not_exist_asks_for_a_key_too(client: httpx2.Client) -> None:
    assert client.get("/v1/nothing").status_code == 401
    assert client.get("/v1/nothing", headers=bearer(INFER)).status_code == 404


def test_a_missing_or_wrong_key_is_401(client: httpx2.Client) -> None:
    for headers in (
        {},
        bearer("wrong-key-0001"),
        {"authorization": "Basic abc"},
        {"authorization": "Bearer"},
    ):
        reply = client.post("/v1/chat/completions", content=b"not json", headers=headers)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "wrong-key" not in reply.text


def test_a_missing_key_is_answered_before_the_body_has_come(client: httpx2.Client) -> None:
    url = client.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=10) as wire:
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n")
        assert wire.recv(64).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    ("key", "method", "path", "expected"),
    [
        (INFER, "POST", "/v1/chat/completions", 200),
        (INFER, "GET", "/v1/models", 200),
        (INFER, "GET", "/v1/adapters", 200),
        (INFER, "GET", "/metrics", 403),
        (INFER, "POST", "/v1/adapters", 403),
        (INFER, "DELETE", "/v1/models/team-invoice", 403),
        (INFER, "DELETE", "/v1/adapters/team-invoice", 403),
        (INFER, "POST", "/v1/adapters/team-invoice/unload", 403),
        (INFER, "POST", "/v1/load_lora_adapter", 403),
        (INFER, "POST", "/unload_lora_adapter", 403),
        (ADMIN, "POST", "/v1/chat/completions", 403),
        (ADMIN, "POST", "/tokenize", 403),
        (ADMIN, "GET", "/metrics", 403),
        (ADMIN, "POST", "/v1/adapters/team-invoice/unload", 200),
        (METRICS, "GET", "/metrics", 200),
        (METRICS, "HEAD", "/metrics", 200),
        (METRICS, "POST", "/v1/completions", 403),
        (METRICS, "GET", "/docs", 200),
        (INFER, "GET", "/metrics%0A", 404),
        (INFER, "POST", "/v1/load_lora_adapter%0A", 404),
        (METRICS, "POST", "/v1/chat/completions%0A", 404),
    ],
)
def test_scopes(client: httpx2.Client, key: str, method: str, path: str, expected: int) -> None:
    body = CHAT if path == "/v1/chat/completions" else {} if method == "POST" else None
    reply = client.request(method, path, headers=bearer(key), json=body)
    assert reply.status_code == expected, reply.text
    if expected == 403:
        assert reply.json()["error"]["code"] == "insufficient_scope"


def test_a_foreign_adapter_does_not_exist(client: httpx2.Client) -> None:
    headers = bearer(INFER)
    assert [m["id"] for m in client.get("/v1/models", headers=headers).json()["data"]][1:] == ["team-invoice"]
    assert [a["name"] for a in client.get("/v1/adapters", headers=headers).json()["data"]] == ["team-invoice"]
    assert [a["path"] for a in client.get("/lora-adapters", headers=headers).json()] == ["team-invoice"]
    unknown = client.get("/v1/models/no-invoice", headers=headers)
    for path in ("/v1/models/other-invoice", "/v1/adapters/other-invoice"):
        reply = client.get(path, headers=headers)
        assert reply.status_code == unknown.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"
    assert "other-invoice" not in unknown.text.replace("no-invoice", "")
    reply = client.post("/v1/chat/completions", json={**CHAT, "model": "other-invoice"}, headers=headers)
    assert reply.status_code == 404


def test_a_key_may_not_register_outside_its_globs(tmp_path: Path) -> None:
    keys = KeyRing([Key(hash_key(ADMIN), Caller("team", frozenset({"admin"}), ("team-*",)))])
    surface = make_surface(tmp_path, keys)
    surface.package("p")
    with client_of(surface, **bearer(ADMIN)) as client:
        assert client.post("/v1/adapters", json={"name": "x", "source": "p"}).status_code == 403
        assert client.post("/v1/adapters", json={"name": "team-x", "source": "p"}).status_code == 201


def test_without_keys_a_loopback_server_lets_everybody_administrate(tmp_path: Path) -> None:
    with client_of(make_surface(tmp_path)) as client:
        assert client.post("/v1/adapters", json={}).status_code == 400


def test_without_keys_a_reachable_server_has_no_admin_routes(tmp_path: Path) -> None:
    surface = make_surface(tmp_path, is_loopback=False)
    with client_of(surface) as client:
        reply = client.post("/v1/adapters", json={"name": "x", "source": "x"})
        assert reply.status_code == 403
        assert "api_key" in reply.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


# ---- the ring and its file -------------------------------------------------------------------------------------


def test_secrets_are_kept_as_hashes_only(tmp_path: Path) -> None:
    ring = read_keys(hash_key("one-good-secret"), None)
    assert "one-good-secret" not in repr(vars(ring))
    found = ring.find("one-good-secret")
    assert found is not None
    assert found.scopes == {"infer", "admin", "metrics"}
    assert ring.find("one-good-secret ") is None
    assert ring.find("") is None


def test_what_is_hashed_already_is_taken_as_it_is() -> None:
    hashed = hash_key("one-good-secret")
    assert hash_key(hashed) == hashed
    with pytest.raises(ValueError, match="at least 8"):
        hash_key("short")


def test_every_key_is_compared_so_that_the_time_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = hmac.compare_digest

    def counted(a: str, b: str) -> bool:
        calls.append(a)
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    ring().find(INFER)
    assert len(calls) == 3


def test_a_key_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[[key]]\nname = "a"\nkey = "{hash_key("first-secret")}"\nadapters = ["team-*", "x"]\n'
        '[[key]]\nname = "b"\nkey = "second-secret"\nscopes = ["admin", "metrics"]\n'
    )
    ring = read_keys(None, path)
    first, second = ring.find("first-secret"), ring.find("second-secret")
    assert first is not None
    assert second is not None
    assert first.name == "a"
    assert first.scopes == {"infer"}
    assert first.may_use("team-1")
    assert first.may_use("x")
    assert not first.may_use("y")
    assert second.scopes == {"admin", "metrics"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "nobody could use"),
        ("x = 1", "tables only"),
        ('[[key]]\nname = "a"', "must be texts"),
        ('[[key]]\nname = "a"\nkey = "long-enough"\nscope = ["infer"]', "unknown field 'scope'"),
        ('[[key]]\nname = "a"\nkey = "long-enough"\nscopes = ["root"]', "scopes are among"),
        ('[[key]]\nname = "a"\nkey = "short"', "at least 8"),
        ("[[key", "cannot read"),
    ],
)
def test_a_key_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=why) as caught:
        read_keys(None, path)
    assert "long-enough" not in str(caught.value)


def test_a_planted_route_without_a_key_would_be_found() -> None:
    """Positive control: the table that the walk relies on does tell public paths from others."""
    assert need_of("GET", "/health") == "public"
    assert need_of("GET", "/healthz") == "any"
    assert need_of("POST", "/v1/models/x") == "admin"
