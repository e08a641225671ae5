"""Liveness, readiness, version."""

from __future__ import annotations

from pathlib import Path

from tests.fakes import BASE_NAME
from tests.support.surface import client_of, make_surface


def test_a_living_server_is_healthy_and_ready(tmp_path: Path) -> None:
    with client_of(make_surface(tmp_path)) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"ready": True, "reasons": []}


def test_a_dead_engine_fails_both_with_reasons(tmp_path: Path) -> None:
    surface = make_surface(tmp_path)
    surface.engine.is_alive = False
    with client_of(surface) as client:
        assert client.get("/health").status_code == 503
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert ready.json() == {"ready": False, "reasons": ["the engine is not running"]}
        assert "lorikeet_ready 0.0" in client.get("/metrics").text


def test_an_engine_that_hangs_in_a_step_gets_no_new_requests(tmp_path: Path) -> None:
    surface = make_surface(tmp_path)
    surface.engine.heartbeat_age_s = 300.0
    with client_of(surface) as client:
        assert client.get("/ready").json()["reasons"] == ["the engine's step has taken 300 s"]
        surface.engine.heartbeat_age_s = 1.0
        assert client.get("/ready").status_code == 200


def test_a_draining_server_lives_but_is_not_ready(tmp_path: Path) -> None:
    surface = make_surface(tmp_path)
    surface.state.drain.begin()
    with client_of(surface) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").json()["reasons"] == ["draining"]


def test_version_says_what_serves(tmp_path: Path) -> None:
    with client_of(make_surface(tmp_path)) as client:
        reply = client.get("/version").json()
    assert reply["version"]
    assert reply["base"]["id"] == BASE_NAME
    assert reply["base"]["fingerprint"] == "f" * 64
