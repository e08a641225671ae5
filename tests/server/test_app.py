"""What is around every route, over a real socket."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from server.settings import Settings
from tests.support.surface import Surface, client_of, make_surface

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    return make_surface(tmp_path_factory.mktemp("surface"), max_body="64KiB")


@pytest.fixture(scope="module")
def client(surface: Surface) -> Iterator[httpx2.Client]:
    with client_of(surface) as client:
        yield client


def error_of(reply: httpx2.Response) -> dict[str, object]:
    """The envelope's content; fails unless the reply is one."""
    assert reply.headers["content-type"] == "application/json"
    assert len(reply.content) <= 4096
    document = reply.json()
    assert set(document) == {"error"}
    assert set(document["error"]) >= {"message", "type", "param", "code"}
    return dict(document["error"])


def test_a_chat_is_answered(client: httpx2.Client) -> None:
    reply = client.post("/v1/chat/completions", json=CHAT)
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == "Hello there."


def test_an_unknown_path_is_404_in_the_envelope(client: httpx2.Client) -> None:
    reply = client.get("/v1/nothing")
    assert reply.status_code == 404
    assert error_of(reply)["code"] == "not_found"


def test_a_trailing_slash_is_no_redirect(client: httpx2.Client) -> None:
    assert client.post("/v1/chat/completions/", json=CHAT).status_code == 404


def test_a_wrong_method_is_405_and_names_the_right_ones(client: httpx2.Client) -> None:
    reply = client.get("/v1/chat/completions")
    assert reply.status_code == 405
    assert error_of(reply)["code"] == "method_not_allowed"
    assert reply.headers["allow"] == "POST"
    reply = client.request("PUT", "/v1/adapters", json={})
    assert reply.headers["allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/version", "/v1/models", "/docs"])
def test_head_is_answered_as_get_without_a_body(client: httpx2.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_a_body_that_says_it_is_too_large_is_413(client: httpx2.Client) -> None:
    reply = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 70_000}]}
    )
    assert reply.status_code == 413
    error = error_of(reply)
    assert error["code"] == "body_too_large"
    assert "65,536" in str(error["message"])


def test_a_chunked_body_is_counted_while_it_comes(client: httpx2.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(80):
            yield b" " * 1024

    reply = client.post(
        "/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    assert reply.status_code == 413
    assert error_of(reply)["code"] == "body_too_large"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_a_body_that_is_not_json_by_its_label_is_415(client: httpx2.Client, kind: str) -> None:
    reply = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": kind})
    assert reply.status_code == 415
    assert error_of(reply)["code"] == "unsupported_media_type"


def test_validation_is_never_422(client: httpx2.Client) -> None:
    for body in ("{", "[]", '{"messages": 1}', '{"messages": [], "a": NaN}'):
        reply = client.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 400, body
        error_of(reply)


def test_an_unforeseen_failure_is_a_500_without_its_message(
    client: httpx2.Client, surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down() -> list[object]:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(surface.registry, "entries", break_down)
    reply = client.get("/v1/models")
    assert reply.status_code == 500
    assert error_of(reply)["code"] == "internal"
    assert "secret" not in reply.text


def test_request_ids_are_kept_if_sane_and_made_otherwise(client: httpx2.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 129, 'a"b'):
        made = client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch(r"req-[0-9a-f]{24}", made)


def test_errors_carry_the_request_id_and_security_headers(client: httpx2.Client) -> None:
    reply = client.get("/v1/nothing", headers={"origin": "https://evil.example"})
    assert reply.headers["x-request-id"].startswith("req-")
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in reply.headers


def test_a_rebound_host_name_is_refused_on_loopback(client: httpx2.Client) -> None:
    reply = client.get("/v1/models", headers={"host": "evil.example:8000"})
    assert reply.status_code == 400
    assert "Host" in str(error_of(reply)["message"])
    for name in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert client.get("/v1/models", headers={"host": name}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 404),
        ({"sec-fetch-site": "same-origin", "origin": "http://x"}, 404),
        ({"sec-fetch-site": "none"}, 404),
        ({"sec-fetch-site": "cross-site"}, 415),
        ({"sec-fetch-site": "same-site"}, 415),
        ({"origin": "https://evil.example"}, 415),
        ({"origin": "null"}, 415),
    ],
)
def test_a_page_of_another_site_cannot_act_by_posting_nothing(
    client: httpx2.Client, headers: dict[str, str], expected: int
) -> None:
    assert client.post("/v1/adapters/nobody/rollback", headers=headers).status_code == expected
    own = f"http://{client.base_url.netloc.decode()}"
    assert client.post("/v1/adapters/nobody/rollback", headers={"origin": own}).status_code == 404


def test_the_access_log_has_no_content(client: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    client.get("/health")  # lines of requests before it are written by now
    with caplog.at_level(logging.INFO, "lorikeet.access"):
        client.post(
            "/v1/chat/completions?q=sesame", json={"messages": [{"role": "user", "content": "sesame"}]}
        )
        client.get("/health")  # the line is written behind the last byte: here it is
    lines = [record.getMessage() for record in caplog.records if record.name == "lorikeet.access"]
    lines = [line for line in lines if "/health" not in line]
    assert len(lines) == 1
    assert "route=/v1/chat/completions status=200" in lines[0]
    assert "sesame" not in lines[0]


def test_metrics_are_labelled_by_route_templates_only(client: httpx2.Client) -> None:
    client.get("/v1/models/no-such-thing")
    client.get("/wp-login.php")
    client.request("BREW", "/health")
    text = client.get("/metrics").text
    assert 'http_requests_total{method="GET",route="/v1/models/{model:path}",status="404"}' in text
    assert 'route="unmatched",status="404"' in text
    assert 'method="OTHER",route="/health",status="405"' in text
    assert "no-such-thing" not in text
    assert "wp-login" not in text
    assert "BREW" not in text


def test_the_docs_load_nothing_from_other_hosts(client: httpx2.Client) -> None:
    page = client.get("/docs")
    assert "://" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        assert client.get(path).status_code == 200, path
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]
    assert client.get("/static/..%2fdocs.html").status_code == 404
    assert client.get("/", follow_redirects=True).text == page.text


def test_new_requests_are_refused_while_draining(tmp_path: Path) -> None:
    surface = make_surface(tmp_path)
    surface.state.drain.begin()
    with client_of(surface) as client:
        reply = client.post("/v1/chat/completions", json=CHAT)
        assert reply.status_code == 503
        assert error_of(reply)["code"] == "draining"
        assert reply.headers["retry-after"] == "1"
        assert client.get("/ready").json() == {"ready": False, "reasons": ["draining"]}
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200


def test_a_refused_body_does_not_break_the_connection(client: httpx2.Client) -> None:
    for _ in range(3):
        assert client.post("/v1/chat/completions", json={"x": "y" * 200_000}).status_code == 413
        assert client.get("/health").status_code == 200


def test_half_a_request_holds_nobody_up(client: httpx2.Client) -> None:
    url = client.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=5) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n")
        assert client.get("/health").status_code == 200


def test_allowed_hosts_extend_the_list(tmp_path: Path) -> None:
    surface = make_surface(tmp_path, allowed_hosts="box.lan")
    with client_of(surface) as client:
        assert client.get("/v1/models", headers={"host": "box.lan:8000"}).status_code == 200
    assert Settings(allowed_hosts="a,b").allowed_hosts == ("a", "b")  # type: ignore[arg-type]
