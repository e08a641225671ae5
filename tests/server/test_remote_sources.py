"""Registering from the hub and from object stores, over the wire: the same checks and places as for folders."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx2
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from adapters.errors import SourceRejected
from adapters.package import package_digest
from adapters.sources.hub import HubSource
from adapters.sources.landing import Landing
from adapters.sources.object_store import DriverOptions, ObjectAddress, ObjectStoreSource
from adapters.sources.remote import RemoteSources
from server import places
from server.places import PlaceError, remote_sources
from server.settings import Settings
from server.sources import SettingsError, resolve
from tests.support.hub import COMMIT, Hub, serving_hub
from tests.support.surface import Surface, client_of, make_surface

HUB = "hf://acme/invoices"
BUCKET = "s3://bucket/adapters/invoices"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving_hub() as hub:
        yield hub


@pytest.fixture
def surface(tmp_path: Path, hub: Hub) -> Surface:
    """A package at a hub and in a bucket; the server may take both."""
    surface = make_surface(tmp_path)
    files = {path.name: path.read_bytes() for path in surface.package("p", rank=4).iterdir()}
    hub.repos["acme/invoices"] = files
    system = MemoryFileSystem(skip_instance_cache=True)
    system.store, system.pseudo_dirs = {}, [""]
    for name, data in files.items():
        system.pipe_file(f"bucket/adapters/invoices/{name}", data)
    surface.state.remotes = RemoteSources(
        Landing(tmp_path / "fetches"),
        20.0,
        HubSource(frozenset({"acme"}), 1 << 30, endpoint=hub.url),
        ObjectStoreSource([ObjectAddress.parse("s3://bucket/adapters")], 1 << 30, lambda scheme: system),
    )
    return surface


@pytest.fixture
def client(surface: Surface) -> Iterator[httpx2.Client]:
    with client_of(surface) as client:
        yield client


def add(client: httpx2.Client, source: str, **more: Any) -> httpx2.Response:
    return client.post("/v1/adapters", json={"name": "invoices", "source": source, **more})


@pytest.mark.parametrize(("source", "recorded"), [(HUB, f"{HUB}@{COMMIT}"), (BUCKET, BUCKET)])
def test_a_remote_package_is_the_same_adapter_as_its_folder(
    client: httpx2.Client, surface: Surface, tmp_path: Path, source: str, recorded: str
) -> None:
    reply = add(client, source)
    assert reply.status_code == 201, reply.text
    record = reply.json()
    assert (record["source"], record["digest"]) == (recorded, package_digest(surface.root / "p"))
    assert [str(ref) for ref in surface.engine.loaded] == ["invoices@1"]
    assert add(client, "p").json()["version"] == 1, "the same content by another way is the same version"
    assert list((tmp_path / "fetches").iterdir()) == []


def test_the_expected_digest_holds_for_remote_packages(client: httpx2.Client) -> None:
    reply = add(client, HUB, sha256="0" * 64)
    assert (reply.status_code, reply.json()["error"]["reason"]) == (422, "digest_mismatch")


def test_the_other_dialects_take_them_too(client: httpx2.Client, hub: Hub, surface: Surface) -> None:
    body = {"lora_name": "invoices", "lora_path": HUB}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200, "the same content again"
    hub.repos["acme/invoices"] = {
        path.name: path.read_bytes() for path in surface.package("q", rank=8).iterdir()
    }
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 409


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("hf://evil/invoices", 400, "invalid_request"),
        ("hf://acme/nothing", 400, "invalid_request"),
        ("s3://bucket/secret", 400, "invalid_request"),
        ("s3://bucket/adapters/../secret", 400, "invalid_request"),
        ("gs://bucket/adapters/x", 400, "unsupported"),
        ("https://example.com/x", 400, "unsupported"),
    ],
)
def test_what_is_not_allowed_is_refused(
    client: httpx2.Client, surface: Surface, source: str, status: int, code: str
) -> None:
    reply = add(client, source)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, "source"), reply.text
    assert surface.registry.entries() == []


def test_a_fetch_that_fails_is_424_and_leaves_nothing(
    client: httpx2.Client, hub: Hub, surface: Surface, tmp_path: Path
) -> None:
    hub.digests = {"adapter_model.safetensors": "0" * 64}
    reply = add(client, HUB)
    assert (reply.status_code, reply.json()["error"]["code"]) == (424, "source_fetch_failed")
    assert surface.registry.entries() == []
    assert list((tmp_path / "fetches").iterdir()) == []


def test_fetches_take_the_two_load_places_and_others_are_served_meanwhile(
    client: httpx2.Client, hub: Hub, surface: Surface
) -> None:
    hub.gate = threading.Event()
    replies: list[httpx2.Response] = []
    ways = [threading.Thread(target=lambda: replies.append(add(client, HUB))) for _ in range(2)]
    for way in ways:
        way.start()
    while not surface.state.load_places.locked() and all(way.is_alive() for way in ways):
        threading.Event().wait(0.002)
    assert add(client, BUCKET).status_code == 429
    assert client.get("/health").status_code == 200
    hub.gate.set()
    for way in ways:
        way.join(20)
    # who comes second may come before the first has promoted it; there is one version either way
    assert {reply.status_code for reply in replies} <= {200, 201}
    assert {reply.json()["version"] for reply in replies} == {1}
    assert len(hub.downloads()) in (len(hub.repos["acme/invoices"]), 2 * len(hub.repos["acme/invoices"]))


# ---- settings --------------------------------------------------------------------------------------------------


def test_both_are_off_by_default(tmp_path: Path) -> None:
    remotes = remote_sources(Settings(), tmp_path)
    for source in (HUB, BUCKET):
        with pytest.raises(Exception, match="off as a source"):
            remotes.check(source)


def test_settings_switch_them_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.sources.object_store.importlib.util.find_spec", lambda name: object())
    settings = Settings(hub_organisations="acme, other", object_prefixes="S3://bucket/adapters/,gs://models")  # type: ignore[arg-type]
    assert settings.object_prefixes == ("s3://bucket/adapters", "gs://models")
    remotes = remote_sources(settings, tmp_path)
    for source in (HUB, "hf://other/x", BUCKET, "gs://models/x"):
        remotes.check(source)


def test_a_missing_driver_is_told_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.sources.object_store.importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlaceError, match=r"object_prefixes.*lorikeet\[gs\]"):
        places.remote_sources(Settings(object_prefixes=("gs://models",)), tmp_path)


@pytest.mark.parametrize(
    "prefix", ["bucket/x", "/x", "file:///x", "https://x", "s3://", "s3://b/../c", "s3://k:s@b"]
)
def test_a_prefix_that_could_allow_nothing_or_anything_is_an_error(prefix: str) -> None:
    with pytest.raises(ValueError, match="a prefix is a"):
        Settings(object_prefixes=(prefix,))


def test_the_token_is_never_shown() -> None:
    settings = Settings(hub_token="hf_secret")  # type: ignore[arg-type]
    assert "hf_secret" not in repr(settings) + str(settings.rows())
    assert ("hub_token", "set", "default") in settings.rows()


def test_drivers_options_come_from_settings_and_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def open_driver(scheme: str, options: DriverOptions) -> object:
        given.append((scheme, dict(options)))
        return fsspec.filesystem("memory")

    monkeypatch.setattr("adapters.sources.object_store.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("adapters.sources.object_store.open_driver", open_driver)
    environ = {
        "LORIKEET_OBJECT_PREFIXES": "az://models",
        "LORIKEET_OBJECT_OPTIONS": '{"az": {"account_name": "ours", "account_key": "SECRET"}}',
    }
    settings = resolve({}, environ=environ)
    assert "SECRET" not in str(settings.rows())
    assert (
        "object_options",
        "az: account_name account_key",
        "environment LORIKEET_OBJECT_OPTIONS",
    ) in settings.rows()
    with pytest.raises(SourceRejected), remote_sources(settings, tmp_path).fetched("az://models/nobody"):
        pass
    assert given == [("az", {"account_name": "ours", "account_key": "SECRET"})]


@pytest.mark.parametrize("options", ['{"ftp": {}}', "az", '{"az": {"account_name": [1]}}', "[]"])
def test_options_that_no_driver_takes_are_an_error(options: str) -> None:
    with pytest.raises(SettingsError, match="object_options"):
        resolve({"object_options": options}, environ={})
