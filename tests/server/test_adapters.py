"""The admin surface: native, vLLM's, SGLang's and llama.cpp's, over a real registry and a fake engine."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.errors import AdapterBusy, AdapterRejected, RejectReason
from adapters.package import package_digest
from adapters.ref import AdapterRef
from adapters.store_size import package_bytes
from engine.messages import LoadReport, UnloadReport
from engine.status import EngineStatus, SlotStatus
from server import admin, loading
from tests.support.packages import make_package
from tests.support.surface import Surface, client_of, make_surface

FIELDS = {
    "name",
    "version",
    "digest",
    "state",
    "tier",
    "rank",
    "targets",
    "kind",
    "bytes",
    "refs",
    "last_used",
    "created",
    "source",
    "profile",
    "profile_from",
    "pinned",
    "current",
    "versions",
    "aliases",
}


@pytest.fixture
def surface(tmp_path: Path) -> Surface:
    return make_surface(tmp_path)


@pytest.fixture
def client(surface: Surface) -> Iterator[httpx2.Client]:
    with client_of(surface) as client:
        yield client


def add(client: httpx2.Client, name: str, source: str, **more: Any) -> httpx2.Response:
    return client.post("/v1/adapters", json={"name": name, "source": source, **more})


def code_of(reply: httpx2.Response) -> str:
    return str(reply.json()["error"]["code"])


# ---- registering -----------------------------------------------------------------------------------------------


def test_registering_a_folder_copies_checks_and_loads_it(client: httpx2.Client, surface: Surface) -> None:
    folder = surface.package("p", rank=4)
    reply = add(client, "invoices", "p")
    assert reply.status_code == 201
    record = reply.json()
    assert set(record) == FIELDS
    assert (record["name"], record["version"], record["rank"], record["kind"]) == ("invoices", 1, 4, "lora")
    assert record["targets"] == ["q_proj", "v_proj"]
    assert record["digest"] == package_digest(folder)
    assert record["source"] == "local:p"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["created"])
    assert [str(ref) for ref in surface.engine.loaded] == ["invoices@1"]
    assert str(surface.root) not in reply.text


def test_the_same_again_is_200_and_other_content_is_the_next_version(
    client: httpx2.Client, surface: Surface
) -> None:
    surface.package("p", seed=1)
    surface.package("q", seed=2)
    assert add(client, "invoices", "p").status_code == 201
    again = add(client, "invoices", str(surface.root / "p"))
    assert (again.status_code, again.json()["version"]) == (200, 1)
    other = add(client, "invoices", "q")
    assert (other.status_code, other.json()["version"]) == (201, 2)
    assert client.get("/v1/adapters/invoices@1").json()["version"] == 1
    assert client.get("/v1/adapters/invoices").json()["version"] == 2


def test_load_false_registers_only(client: httpx2.Client, surface: Surface) -> None:
    surface.package("p")
    record = add(client, "a", "p", load=False).json()
    assert (record["tier"], record["state"]) == ("disk", "unloaded")
    assert surface.engine.loaded == {}


def test_the_expected_digest_is_checked(client: httpx2.Client, surface: Surface) -> None:
    folder = surface.package("p")
    reply = add(client, "a", "p", sha256="0" * 64)
    assert reply.status_code == 422
    assert reply.json()["error"]["reason"] == "digest_mismatch"
    assert add(client, "a", "p", sha256=package_digest(folder)).status_code == 201


def test_beyond_the_stores_limit_registering_is_507_and_removing_makes_room(tmp_path: Path) -> None:
    num_bytes = package_bytes(make_package(tmp_path / "sized"))
    surface = make_surface(tmp_path, adapter_store_size=2 * num_bytes + 10)
    with client_of(surface) as client:
        for number, name in enumerate("abc"):
            surface.package(name, seed=number)
            reply = client.post("/v1/adapters", json={"name": name, "source": name})
        assert reply.status_code == 507
        error = reply.json()["error"]
        assert error["code"] == "insufficient_storage"
        assert f"adapter_store_size allows {2 * num_bytes + 10}" in error["message"]
        assert [each["name"] for each in client.get("/v1/adapters").json()["data"]] == ["a", "b"]
        client.delete("/v1/adapters/a").raise_for_status()
        client.post("/v1/adapters", json={"name": "c", "source": "c"}).raise_for_status()
        surface.registry.refresh()
        metrics = client.get("/metrics").text
    assert f'lorikeet_adapter_bytes{{tier="disk"}} {float(surface.registry.store_bytes)}' in metrics
    assert 'lorikeet_adapter_evictions_total{reason="unreferenced",tier="disk"} 1.0' in metrics


def test_pinning_at_registration(client: httpx2.Client, surface: Surface) -> None:
    surface.package("p")
    assert add(client, "a", "p").json()["pinned"] is False
    assert add(client, "a", "p", pin=True).json()["pinned"] is True
    assert list(surface.engine.loaded.values()) == [True]


def test_what_the_engine_rejects_is_unregistered_again(client: httpx2.Client, surface: Surface) -> None:
    surface.package("p", seed=1)
    surface.package("q", seed=2)
    add(client, "a", "p")
    surface.engine.load_failure = AdapterRejected(RejectReason.NO_EFFECT, "it changes nothing")
    for name in ("a", "b"):
        reply = add(client, name, "q")
        assert reply.status_code == 422
        assert reply.json()["error"]["reason"] == "no_effect"
    surface.engine.load_failure = None
    assert client.get("/v1/adapters/a").json()["version"] == 1
    assert client.get("/v1/adapters/b").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_request", "name"),
        ({"name": "a"}, 400, "invalid_request", "source"),
        ({"name": 1, "source": "p"}, 400, "invalid_request", "name"),
        ({"name": "a", "source": "p", "pin": "yes"}, 400, "invalid_request", "pin"),
        ({"name": "a", "source": "p", "colour": 1}, 400, "invalid_request", "colour"),
        ({"name": "a", "source": "p", "version": 3}, 400, "unsupported", "version"),
        ({"name": "a", "source": "p", "profile": []}, 400, "invalid_request", "profile"),
        ({"name": "a", "source": "hf://org/repo@main"}, 400, "unsupported", "source"),
        ({"name": "a", "source": "s3://bucket/x"}, 400, "unsupported", "source"),
        ({"name": "a", "source": "/etc"}, 400, "invalid_request", "source"),
        ({"name": "a", "source": "../.."}, 400, "invalid_request", "source"),
        ({"name": "a", "source": "nothing"}, 400, "invalid_request", "source"),
        ({"name": "fake/base-vl", "source": "p"}, 400, "invalid_request", "name"),
        ({"name": "../a", "source": "p"}, 400, "invalid_request", "name"),
        ({"name": "a b", "source": "p"}, 400, "invalid_request", "name"),
    ],
)
def test_what_is_wrong_is_named(
    client: httpx2.Client,
    surface: Surface,
    body: dict[str, object],
    status: int,
    code: str,
    param: str | None,
) -> None:
    surface.package("p")
    reply = client.post("/v1/adapters", json=body)
    assert (reply.status_code, code_of(reply)) == (status, code), reply.text
    assert reply.json()["error"]["param"] == param
    assert str(surface.root) not in reply.text
    assert surface.registry.entries() == []


def test_a_refused_package_says_why(client: httpx2.Client, surface: Surface) -> None:
    surface.package("p", rank=128)
    reply = add(client, "a", "p")
    assert (reply.status_code, code_of(reply)) == (422, "adapter_rejected")
    assert reply.json()["error"]["reason"] == "rank_too_large"
    assert "64" in reply.json()["error"]["message"]


# ---- listing and acts ------------------------------------------------------------------------------------------


def test_listing_and_showing(client: httpx2.Client, surface: Surface) -> None:
    surface.register("b", seed=1)
    surface.register("org/a", seed=2)
    listing = client.get("/v1/adapters").json()
    assert listing["object"] == "list"
    assert [record["name"] for record in listing["data"]] == ["b", "org/a"]
    shown = client.get("/v1/adapters/org%2Fa").json()
    assert shown.pop("effective")
    assert shown == listing["data"][1]
    unknown = client.get("/v1/adapters/org/b")
    assert (unknown.status_code, code_of(unknown)) == (404, "model_not_found")


def test_the_tier_is_the_fastest_that_holds_it(surface: Surface, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, name in enumerate("abcd"):
        surface.register(name, seed=i)
    a, b, c, d = (surface.registry.resolve(name) for name in "abcd")
    picture = surface.engine.status()
    slots = (SlotStatus(0, a, "resident", False, 1, 10), SlotStatus(1, b, "loading", False, 0, 0))
    values = {name: getattr(picture, name) for name in EngineStatus.__slots__}
    status = EngineStatus(**{**values, "slots": slots, "host_refs": frozenset({a, c})})
    monkeypatch.setattr(surface.engine, "status", lambda: status)
    with client_of(surface) as client:
        found = {r["name"]: (r["tier"], r["state"]) for r in client.get("/v1/adapters").json()["data"]}
        loras = client.post("/unload_lora_adapter", json={"lora_name": "d"}).json()["loaded_adapters"]
    assert found == {
        "a": ("device", "loaded"),
        "b": ("disk", "loading"),
        "c": ("host", "unloaded"),
        "d": ("disk", "unloaded"),
    }
    assert loras == {"a": "a@1"}
    assert d.name == "d"


def test_load_unload_pin_unpin(client: httpx2.Client, surface: Surface) -> None:
    surface.register("org/a")
    ref = surface.registry.resolve("org/a")
    assert client.post("/v1/adapters/org/a/load").status_code == 200
    assert surface.engine.loaded == {ref: False}
    assert client.post("/v1/adapters/org%2Fa/pin", json={}).json()["pinned"] is True
    assert surface.engine.loaded == {ref: True}
    assert client.post("/v1/adapters/org/a/unpin").json()["pinned"] is False
    reply = client.post("/v1/adapters/org/a/unload").json()
    assert (reply["freed_bytes"], reply["freed_device_bytes"], reply["freed_host_bytes"]) == (1024, 1024, 0)
    assert surface.engine.loaded == {}
    assert client.get("/v1/adapters/org/a").status_code == 200


def test_pins_are_restored_at_start_and_a_failure_stops_nothing(surface: Surface) -> None:
    for i, name in enumerate("abc"):
        surface.register(name, seed=i)
    surface.registry.set_pinned("b", True)
    asyncio.run(admin.restore_pins(surface.state))
    assert {str(ref): pin for ref, pin in surface.engine.loaded.items()} == {"b@1": True}
    surface.engine.load_failure = AdapterRejected(RejectReason.NON_FINITE, "damaged")
    asyncio.run(admin.restore_pins(surface.state))


def test_acts_take_no_fields_and_unknown_acts_are_404(client: httpx2.Client, surface: Surface) -> None:
    surface.register("a")
    assert client.post("/v1/adapters/a/load", json={"slot": 1}).status_code == 400
    assert client.post("/v1/adapters/a/dance").status_code == 404
    assert code_of(client.patch("/v1/adapters/a", json={"rank": 8})) == "invalid_request"
    for act in ("load", "unload", "pin", "unpin"):
        assert client.post(f"/v1/adapters/nobody/{act}").status_code == 404
        assert client.post(f"/v1/adapters/base/{act}").status_code == 400


def test_an_adapter_in_use_is_409_without_retry(
    client: httpx2.Client, surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy(ref: AdapterRef, *, timeout_s: float = 30.0) -> UnloadReport:
        raise AdapterBusy(ref.name, 3)

    surface.register("a")
    monkeypatch.setattr(surface.engine, "unload_adapter", busy)
    reply = client.post("/v1/adapters/a/unload")
    assert (reply.status_code, code_of(reply)) == (409, "adapter_busy")
    assert reply.headers["x-should-retry"] == "false"


def test_a_load_that_finds_no_slot_ends(
    client: httpx2.Client, surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(ref: AdapterRef, *, pin: bool = False) -> LoadReport:
        await asyncio.Event().wait()
        raise AssertionError

    surface.register("a")
    monkeypatch.setattr(surface.engine, "load_adapter", never)
    monkeypatch.setattr(loading, "LOAD_TIMEOUT_S", 0.05)
    reply = client.post("/v1/adapters/a/load")
    assert (reply.status_code, code_of(reply)) == (409, "adapter_busy")


def test_a_third_load_at_once_is_429(surface: Surface, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    started = threading.Semaphore(0)

    async def slow(ref: AdapterRef, *, pin: bool = False) -> LoadReport:
        started.release()
        while not release.is_set():
            await asyncio.sleep(0.01)
        return LoadReport(ref, 0, 0, 0.0)

    for i, name in enumerate("abc"):
        surface.register(name, seed=i)
    monkeypatch.setattr(surface.engine, "load_adapter", slow)
    with client_of(surface) as client:
        first = [threading.Thread(target=client.post, args=(f"/v1/adapters/{n}/load",)) for n in "ab"]
        for thread in first:
            thread.start()
        for _ in first:
            assert started.acquire(timeout=10)
        reply = client.post("/v1/adapters/c/load")
        assert (reply.status_code, code_of(reply)) == (429, "too_many_loads")
        assert int(reply.headers["retry-after"]) >= 1
        release.set()
        for thread in first:
            thread.join()
        assert client.post("/v1/adapters/c/load").status_code == 200


def test_delete_is_404_at_once_while_its_requests_finish(
    surface: Surface, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()
    freed: list[AdapterRef] = []

    async def drain(ref: AdapterRef, *, timeout_s: float = 30.0) -> UnloadReport:
        while not ended.is_set():
            await asyncio.sleep(0.01)
        freed.append(ref)
        return UnloadReport(ref, 1, 1)

    surface.register("a")
    monkeypatch.setattr(surface.engine, "unload_adapter", drain)
    with caplog.at_level(logging.INFO, "lorikeet.audit"), client_of(surface) as client:
        reply = client.delete("/v1/adapters/a", headers={"x-request-id": "del-1"})
        assert reply.json() == {"name": "a", "version": 1, "deleted": True}
        assert client.get("/v1/adapters/a").status_code == 404
        assert freed == []
        ended.set()
        deadline_s = time.monotonic() + 10
        while not freed and time.monotonic() < deadline_s:
            client.get("/health")
        assert [ref.name for ref in freed] == ["a"]
    assert "admin.removed name=a@1 caller=anonymous request_id=del-1" in caplog.text


def test_every_act_leaves_an_audit_line(
    client: httpx2.Client, surface: Surface, caplog: pytest.LogCaptureFixture
) -> None:
    surface.package("p")
    with caplog.at_level(logging.INFO, "lorikeet.audit"):
        add(client, "a", "p")
        for act in ("load", "pin", "unpin", "unload"):
            client.post(f"/v1/adapters/a/{act}")
        client.delete("/v1/adapters/a")
    acts = re.findall(r"admin\.(\w+) name=a@1", caplog.text)
    assert acts == ["registered", "loaded", "pinned", "unpinned", "unloaded", "removed"]


def test_10000_adapters_are_listed_quickly(surface: Surface, monkeypatch: pytest.MonkeyPatch) -> None:
    surface.register("a")
    entry = surface.registry.entry("a")
    monkeypatch.setattr(surface.registry, "entries", lambda **_: [entry] * 10_000)
    with client_of(surface) as client:
        for path in ("/v1/adapters", "/v1/models"):
            client.get(path)
            begin_s = time.monotonic()
            assert len(client.get(path).json()["data"]) >= 10_000
            assert time.monotonic() - begin_s < 3, (
                "a sign of something quadratic; the promise is 300 ms when idle"
            )


# ---- other servers' dialects -----------------------------------------------------------------------------------


def test_vllm_load_and_unload(client: httpx2.Client, surface: Surface) -> None:
    surface.package("p", seed=1)
    surface.package("q", seed=2)
    path = str(surface.root / "p")
    reply = client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": path})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    assert reply.text == "Success: LoRA adapter 'a' added successfully."
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": path}).status_code == 200
    other = {"lora_name": "a", "lora_path": str(surface.root / "q")}
    taken = client.post("/v1/load_lora_adapter", json=other)
    assert (taken.status_code, code_of(taken)) == (409, "adapter_exists")
    assert "has already been loaded" in taken.text
    assert client.post("/v1/load_lora_adapter", json={**other, "load_inplace": True}).status_code == 200
    assert client.get("/v1/adapters/a").json()["version"] == 2
    gone = client.post(
        "/v1/unload_lora_adapter", json={"lora_name": "a"}, headers={"accept": "application/json"}
    )
    assert gone.json()["status"] == "success"
    again = client.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
    assert (again.status_code, code_of(again)) == (404, "model_not_found")


def test_vllm_faults(client: httpx2.Client) -> None:
    for body in (
        {},
        {"lora_name": "a"},
        {"lora_name": "", "lora_path": "x"},
        {"lora_name": "a", "lora_path": "x", "z": 1},
    ):
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 400
    assert (
        client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/etc"}).status_code == 400
    )


def test_sglang_load_and_unload(client: httpx2.Client, surface: Surface) -> None:
    surface.package("p")
    reply = client.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": "p", "pinned": True})
    assert reply.status_code == 200
    assert reply.json() == {"success": True, "error_message": "", "loaded_adapters": {}}
    assert list(surface.engine.loaded.values()) == [True]
    assert client.post("/unload_lora_adapter", json={"lora_name": "a"}).json()["success"] is True
    failed = client.post("/unload_lora_adapter", json={"lora_name": "a"})
    assert failed.status_code == 404
    assert failed.json()["success"] is False
    assert failed.json()["error_message"] == failed.json()["error"]["message"]
    assert failed.json()["error"]["code"] == "model_not_found"


def test_sglang_names_only_adapters_that_exist(
    client: httpx2.Client, surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("a", "b")):
        surface.register(name, seed=seed)
    slots = tuple(
        SlotStatus(slot, surface.registry.resolve(name), "resident", False, 0, 1)
        for slot, name in enumerate(("a", "b"))
    )
    status = replace(surface.engine.status(), slots=slots)  # what is removed leaves its slot a little later
    monkeypatch.setattr(surface.engine, "status", lambda: status)
    assert client.post("/unload_lora_adapter", json={"lora_name": "a"}).json()["loaded_adapters"] == {
        "b": "b@1"
    }


def test_llama_cpp_list_and_refused_scales(client: httpx2.Client, surface: Surface) -> None:
    surface.register("b", seed=1)
    surface.register("a", seed=2)
    assert client.get("/lora-adapters").json() == [
        {"id": 0, "path": "a", "scale": 0.0},
        {"id": 1, "path": "b", "scale": 0.0},
    ]
    reply = client.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}])
    assert (reply.status_code, code_of(reply)) == (400, "unsupported")
    chat = {"messages": [{"role": "user", "content": "x"}], "lora": [{"id": 1, "scale": 1.0}]}
    assert client.post("/v1/chat/completions", json=chat).headers["x-adapter"] == "b@1"
