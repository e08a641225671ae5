"""Versions and pointers over the wire: what is proven becomes current, nothing else does, and every step back works."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.errors import AdapterRejected, RejectReason
from adapters.ref import AdapterRef
from engine.messages import LoadReport
from engine.status import SlotStatus
from server import promotions
from server.keys import Caller, Key, KeyRing, hash_key
from tests.support.surface import Surface, client_of, make_surface

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def surface(tmp_path: Path) -> Surface:
    surface = make_surface(tmp_path)
    for seed in range(4):
        surface.package(f"p{seed}", seed=seed)
    return surface


@pytest.fixture
def client(surface: Surface) -> Iterator[httpx2.Client]:
    with client_of(surface) as client:
        yield client


def add(client: httpx2.Client, name: str, source: str, **more: Any) -> httpx2.Response:
    return client.post("/v1/adapters", json={"name": name, "source": source, **more})


def code_of(reply: httpx2.Response) -> tuple[int, str]:
    return reply.status_code, str(reply.json()["error"]["code"])


def served_by(client: httpx2.Client, name: str) -> str:
    """Who answers a request for a name; its status if nobody does."""
    reply = client.post("/v1/chat/completions", json={**CHAT, "model": name})
    return reply.headers.get("x-adapter", str(reply.status_code))


def test_requests_get_the_old_version_until_the_new_one_is_loaded(
    surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, release = threading.Event(), threading.Event()

    async def slow(ref: AdapterRef, *, pin: bool = False) -> LoadReport:
        started.set()
        while not release.is_set():
            await asyncio.sleep(0.005)
        return LoadReport(ref, 0, 0, 0.0)

    with client_of(surface) as client:
        add(client, "a", "p0")
        monkeypatch.setattr(surface.engine, "load_adapter", slow)
        replies: list[httpx2.Response] = []
        thread = threading.Thread(target=lambda: replies.append(add(client, "a", "p1")))
        thread.start()
        assert started.wait(timeout=10)
        assert (served_by(client, "a"), served_by(client, "a@2")) == ("a@1", "a@2")
        shown = client.get("/v1/adapters/a").json()
        assert (shown["version"], shown["versions"]) == (1, [1, 2])
        release.set()
        thread.join()
        assert replies[0].json()["current"] is True
        assert served_by(client, "a") == "a@2"


def test_a_version_that_the_engine_refuses_is_never_current(client: httpx2.Client, surface: Surface) -> None:
    add(client, "a", "p0")
    surface.engine.load_failure = AdapterRejected(RejectReason.PROBE_FAILED, "no")
    assert code_of(add(client, "a", "p1")) == (422, "adapter_rejected")
    assert code_of(add(client, "new", "p1")) == (422, "adapter_rejected")
    surface.engine.load_failure = None
    assert client.get("/v1/adapters/a").json()["versions"] == [1]
    assert (served_by(client, "a"), served_by(client, "new")) == ("a@1", "404")


def test_a_refused_load_does_not_take_a_version_that_was_there_before(
    client: httpx2.Client, surface: Surface
) -> None:
    add(client, "a", "p0")
    add(client, "a", "p1")
    surface.engine.load_failure = AdapterRejected(RejectReason.PROBE_FAILED, "no")
    assert add(client, "a", "p0").status_code == 422
    surface.engine.load_failure = None
    shown = client.get("/v1/adapters/a").json()
    assert (shown["version"], shown["versions"]) == (2, [1, 2])


def test_promote_false_registers_a_candidate(client: httpx2.Client, surface: Surface) -> None:
    add(client, "a", "p0")
    record = add(client, "a", "p1", promote=False).json()
    assert (record["version"], record["current"]) == (2, False)
    assert [str(ref) for ref in surface.engine.loaded] == ["a@1", "a@2"]
    assert served_by(client, "a") == "a@1"
    assert add(client, "a", "p1", promote=False).status_code == 200
    promoted = client.post("/v1/adapters/a/promote", json={"version": 2})
    assert (promoted.status_code, promoted.json()["current"]) == (200, True)
    assert served_by(client, "a") == "a@2"
    pinned = add(client, "a", "p2", promote=False, pin=True)
    assert (code_of(pinned), pinned.json()["error"]["param"]) == ((400, "invalid_request"), "pin")


def test_a_name_without_a_promoted_version_is_listed_and_can_be_deleted(
    client: httpx2.Client, surface: Surface
) -> None:
    add(client, "a", "p0", promote=False)
    missing = client.get("/v1/adapters/a")
    assert code_of(missing) == (404, "model_not_found")
    assert "a@1" in missing.json()["error"]["message"]
    listed = client.get("/v1/adapters").json()["data"]
    assert [(r["name"], r["version"], r["current"]) for r in listed] == [("a", 1, False)]
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["fake/base-vl"]
    assert client.delete("/v1/adapters/a").json() == {"name": "a", "version": 1, "deleted": True}
    assert client.get("/v1/adapters").json()["data"] == []


@pytest.mark.parametrize("version", [1, "1", "digest"])
def test_promote_takes_a_number_or_a_digest(client: httpx2.Client, surface: Surface, version: object) -> None:
    add(client, "a", "p0")
    add(client, "a", "p1")
    if version == "digest":
        version = "sha256:" + client.get("/v1/adapters/a@1").json()["digest"]
    assert client.post("/v1/adapters/a/promote", json={"version": version}).json()["version"] == 1
    assert served_by(client, "a") == "a@1"
    assert client.post("/v1/adapters/a@2/promote").json()["current"] is True


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("a", {}, (400, "invalid_request")),
        ("a@1", {"version": 1}, (400, "invalid_request")),
        ("a", {"version": 0}, (400, "invalid_request")),
        ("a", {"version": True}, (400, "invalid_request")),
        ("a", {"version": 1.5}, (400, "invalid_request")),
        ("a", {"version": "latest"}, (400, "invalid_request")),
        ("a", {"version": "sha256:abc"}, (400, "invalid_request")),
        ("a", {"version": 1, "wait": True}, (400, "invalid_request")),
        ("a", {"version": 9}, (404, "model_not_found")),
        ("nobody", {"version": 1}, (404, "model_not_found")),
        ("base", {"version": 1}, (404, "model_not_found")),
    ],
)
def test_what_is_wrong_with_a_promotion_is_named(
    client: httpx2.Client, path: str, body: dict[str, object], expected: tuple[int, str]
) -> None:
    add(client, "a", "p0")
    assert code_of(client.post(f"/v1/adapters/{path}/promote", json=body)) == expected
    assert client.get("/v1/adapters/a").json()["version"] == 1


def test_what_cannot_be_loaded_is_not_promoted_unless_told_so(
    client: httpx2.Client, surface: Surface
) -> None:
    add(client, "a", "p0")
    add(client, "a", "p1", promote=False, load=False)
    surface.engine.load_failure = AdapterRejected(RejectReason.NON_FINITE, "no")
    assert code_of(client.post("/v1/adapters/a/promote", json={"version": 2})) == (422, "adapter_rejected")
    assert client.get("/v1/adapters/a").json()["version"] == 1
    body = {"version": 2, "load": False}
    assert client.post("/v1/adapters/a/promote", json=body).json()["version"] == 2
    assert code_of(client.post("/v1/adapters/a/rollback")) == (422, "adapter_rejected")
    assert client.post("/v1/adapters/a/rollback", json={"load": False}).json()["version"] == 1


def test_rollback_is_one_call_and_twice_goes_back_twice(client: httpx2.Client) -> None:
    for seed in range(3):
        add(client, "a", f"p{seed}")
    assert client.post("/v1/adapters/a/rollback").json()["version"] == 2
    assert client.post("/v1/adapters/a/rollback", json={}).json()["version"] == 1
    refused = client.post("/v1/adapters/a/rollback")
    assert code_of(refused) == (400, "invalid_request")
    assert "promote" in refused.json()["error"]["message"]
    assert served_by(client, "a") == "a@1"
    assert client.post("/v1/adapters/nobody/rollback").status_code == 404


def test_deleting_the_current_version_goes_back_to_the_one_before(client: httpx2.Client) -> None:
    for seed in range(2):
        add(client, "a", f"p{seed}")
    add(client, "a", "p2", promote=False)
    assert client.delete("/v1/adapters/a@2").json()["deleted"] is True
    assert served_by(client, "a") == "a@1"
    client.delete("/v1/adapters/a@1")
    assert (served_by(client, "a"), served_by(client, "a@3")) == ("404", "a@3")


def test_a_pin_moves_with_the_pointer(
    client: httpx2.Client, surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(client, "a", "p0", pin=True)
    status = surface.engine.status
    monkeypatch.setattr(surface.engine, "status", lambda: _with_slots(status(), surface.engine.loaded))
    add(client, "a", "p1")
    pins = {str(ref): pin for ref, pin in surface.engine.loaded.items()}
    assert pins == {"a@1": False, "a@2": True}
    client.post("/v1/adapters/a/rollback")
    pins = {str(ref): pin for ref, pin in surface.engine.loaded.items()}
    assert pins == {"a@1": True, "a@2": False}


def test_a_version_that_the_name_does_not_mean_cannot_be_pinned(client: httpx2.Client) -> None:
    for seed in range(2):
        add(client, "a", f"p{seed}")
    assert code_of(client.post("/v1/adapters/a@1/pin")) == (400, "invalid_request")
    assert client.post("/v1/adapters/a@2/pin").json()["pinned"] is True


def _with_slots(status: Any, loaded: dict[AdapterRef, bool]) -> Any:
    slots = tuple(SlotStatus(i, ref, "resident", pin, 0, 1) for i, (ref, pin) in enumerate(loaded.items()))
    values = {name: getattr(status, name) for name in type(status).__slots__}
    return type(status)(**{**values, "slots": slots})


def test_load_inplace_moves_the_pointer_only_to_what_was_proven(
    client: httpx2.Client, surface: Surface
) -> None:
    add(client, "a", "p0")
    body = {"lora_name": "a", "lora_path": "p1", "load_inplace": True}
    surface.engine.load_failure = AdapterRejected(RejectReason.PROBE_FAILED, "no")
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 422
    assert served_by(client, "a") == "a@1"
    surface.engine.load_failure = None
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert served_by(client, "a") == "a@2"


# ---- aliases ---------------------------------------------------------------------------------------------------


def point(client: httpx2.Client, alias: str, target: str, **more: Any) -> httpx2.Response:
    return client.put(f"/v1/aliases/{alias}", json={"target": target, **more})


def test_an_alias_is_made_moved_served_listed_and_forgotten(client: httpx2.Client, surface: Surface) -> None:
    for seed in range(2):
        add(client, "org/a", f"p{seed}")
    made = point(client, "ft:prod", "org/a@1")
    assert made.status_code == 201
    assert made.json() == {
        "alias": "ft:prod",
        "object": "alias",
        "target": "org/a@1",
        "name": "org/a",
        "version": 1,
        "before": [],
    }
    assert served_by(client, "ft:prod") == "org/a@1"
    chat = client.post("/v1/chat/completions", json={**CHAT, "model": "ft:prod"}).json()
    assert chat["model"] == "ft:prod"
    moved = point(client, "ft%3Aprod", "org/a")
    assert (moved.status_code, moved.json()["target"], moved.json()["before"]) == (
        200,
        "org/a@2",
        ["org/a@1"],
    )
    assert served_by(client, "ft:prod") == "org/a@2"
    assert client.get("/v1/aliases").json()["data"] == [client.get("/v1/aliases/ft:prod").json()]
    assert client.get("/v1/adapters/ft:prod").json()["aliases"] == ["ft:prod"]
    models = {m["id"]: m for m in client.get("/v1/models").json()["data"]}
    assert models["ft:prod"]["root"] == "org/a@2"
    assert client.get("/v1/models/ft:prod").json()["id"] == "ft:prod"
    assert client.post("/v1/adapters/ft:prod/rollback").json()["version"] == 1
    assert served_by(client, "ft:prod") == "org/a@1"
    assert client.delete("/v1/aliases/ft:prod").json() == {"alias": "ft:prod", "deleted": True}
    assert served_by(client, "ft:prod") == "404"
    assert served_by(client, "org/a") == "org/a@2"


def test_deleting_an_alias_as_a_model_or_adapter_leaves_the_adapter(client: httpx2.Client) -> None:
    add(client, "a", "p0")
    for path in ("/v1/adapters/prod", "/v1/models/prod"):
        point(client, "prod", "a")
        assert client.delete(path).json()["deleted"] is True
        assert (served_by(client, "prod"), served_by(client, "a")) == ("404", "a@1")


def test_an_alias_moves_only_to_what_was_proven(client: httpx2.Client, surface: Surface) -> None:
    add(client, "a", "p0")
    add(client, "a", "p1", promote=False, load=False)
    point(client, "prod", "a")
    surface.engine.load_failure = AdapterRejected(RejectReason.PROBE_FAILED, "no")
    assert code_of(point(client, "prod", "a@2")) == (422, "adapter_rejected")
    assert served_by(client, "prod") == "a@1"
    assert point(client, "prod", "a@2", load=False).json()["version"] == 2


@pytest.mark.parametrize(
    ("alias", "body", "expected"),
    [
        ("prod", {}, (400, "invalid_request")),
        ("prod", {"target": "a", "weight": 1}, (400, "invalid_request")),
        ("prod", {"target": "nobody"}, (404, "model_not_found")),
        ("prod", {"target": "base"}, (400, "invalid_request")),
        ("a", {"target": "a"}, (409, "adapter_exists")),
        ("base", {"target": "a"}, (400, "invalid_request")),
        ("x%20y", {"target": "a"}, (400, "invalid_request")),
    ],
)
def test_what_is_wrong_with_an_alias_is_named(
    client: httpx2.Client, alias: str, body: dict[str, object], expected: tuple[int, str]
) -> None:
    add(client, "a", "p0")
    assert code_of(client.put(f"/v1/aliases/{alias}", json=body)) == expected
    assert client.get("/v1/aliases").json()["data"] == []


def test_an_adapter_may_not_take_an_alias_s_name(client: httpx2.Client) -> None:
    add(client, "a", "p0")
    point(client, "prod", "a")
    assert code_of(add(client, "prod", "p1")) == (409, "adapter_exists")
    assert served_by(client, "prod") == "a@1"


def test_an_alias_shows_a_key_nothing_that_it_may_not_use(tmp_path: Path) -> None:
    everything = Key(hash_key("all-admin-key"), Caller("ops", frozenset({"admin", "infer"})))
    team = Caller("team", frozenset({"admin", "infer"}), ("team-*",))
    surface = make_surface(tmp_path, KeyRing([everything, Key(hash_key("team-admin-key"), team)]))
    surface.register("secret", seed=1)
    surface.register("team-a", seed=2)
    with client_of(surface) as client:
        ops, own = ({"authorization": f"Bearer {key}"} for key in ("all-admin-key", "team-admin-key"))
        client.put("/v1/aliases/team-prod", json={"target": "secret"}, headers=ops)
        client.put("/v1/aliases/prod", json={"target": "team-a"}, headers=ops)
        assert [a["alias"] for a in client.get("/v1/aliases", headers=own).json()["data"]] == ["prod"]
        listed = [m["id"] for m in client.get("/v1/models", headers=own).json()["data"]]
        assert listed[1:] == ["team-a", "prod"]
        for method, path, body in (
            ("GET", "/v1/aliases/team-prod", None),
            ("DELETE", "/v1/aliases/team-prod", None),
            ("DELETE", "/v1/adapters/team-prod", None),
            ("PUT", "/v1/aliases/team-prod", {"target": "team-a"}),
            ("GET", "/v1/adapters/team-prod", None),
            ("POST", "/v1/adapters/team-prod/rollback", None),
            ("POST", "/v1/adapters/secret/rollback", None),
            ("POST", "/v1/adapters/secret/promote", {"version": 1}),
            ("POST", "/v1/chat/completions", {**CHAT, "model": "team-prod"}),
        ):
            reply = client.request(method, path, json=body, headers=own)
            assert code_of(reply) == (404, "model_not_found"), (method, path, reply.text)
            assert "secret" in path or "secret" not in reply.text
        assert client.put("/v1/aliases/other", json={"target": "team-a"}, headers=own).status_code == 403
        assert served_by_with(client, "prod", own) == "team-a@1"
        assert served_by_with(client, "team-prod", ops) == "secret@1"


def served_by_with(client: httpx2.Client, name: str, headers: dict[str, str]) -> str:
    reply = client.post("/v1/chat/completions", json={**CHAT, "model": name}, headers=headers)
    return reply.headers.get("x-adapter", str(reply.status_code))


def test_every_act_on_pointers_leaves_an_audit_line(
    client: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lorikeet"):
        for seed in range(2):
            add(client, "a", f"p{seed}")
        client.post("/v1/adapters/a/promote", json={"version": 1})
        client.post("/v1/adapters/a/rollback")
        point(client, "prod", "a")
        client.delete("/v1/aliases/prod")
    lines = [r.getMessage() for r in caplog.records if r.name == "lorikeet.audit"]
    assert [line.split()[0] for line in lines] == [
        "admin.registered",
        "admin.registered",
        "admin.promoted",
        "admin.rolled_back",
        "admin.alias_pointed",
        "admin.alias_removed",
    ]
    assert any("adapter.promoted ref=a@2 from=a@1 took_ms=" in r.getMessage() for r in caplog.records)


def test_the_current_version_of_nothing_is_none(surface: Surface) -> None:
    assert promotions.current_of(surface.state, "nobody") is None
