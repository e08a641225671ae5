"""/v1/models as clients read it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from tests.fakes import BASE_NAME
from tests.support.surface import Surface, client_of, make_surface, serving


@pytest.fixture
def surface(tmp_path: Path) -> Surface:
    surface = make_surface(tmp_path)
    for i, name in enumerate(("invoices", "org/receipts")):
        surface.register(name, seed=i)
    return surface


@pytest.fixture
def client(surface: Surface) -> Iterator[httpx2.Client]:
    with client_of(surface) as client:
        yield client


def test_the_base_comes_first_and_adapters_name_it_as_parent(client: httpx2.Client) -> None:
    listing = client.get("/v1/models").json()
    assert listing["object"] == "list"
    base, *adapters = listing["data"]
    assert (base["id"], base["parent"], base["root"], base["object"]) == (BASE_NAME, None, BASE_NAME, "model")
    assert [a["id"] for a in adapters] == ["invoices", "org/receipts"]
    for entry in listing["data"]:
        assert isinstance(entry["created"], int)
        assert entry["owned_by"] == "lorikeet"
        assert entry["max_model_len"] == 4096
    assert all(a["parent"] == BASE_NAME for a in adapters)
    assert adapters[0]["root"] == "local:invoices"
    assert abs(adapters[0]["created"] - time.time()) < 600


def test_the_base_publishes_the_limits(client: httpx2.Client) -> None:
    limits = client.get("/v1/models/fake%2Fbase-vl").json()["limits"]
    assert limits["max_body_bytes"] == 64 * 2**20
    assert limits["max_image_pixels"] == 16_777_216
    assert limits["max_images"] == 16
    assert limits["max_model_len"] == 4096
    assert limits["image_urls"] == "public"
    assert client.get("/v1/models/base").json()["id"] == BASE_NAME


@pytest.mark.parametrize(
    "path",
    [
        "invoices",
        "invoices@1",
        "invoices%401",
        "org/receipts",
        "org%2Freceipts",
        "fake%2Fbase-vl%3Ainvoices",
        "fake/base-vl:org%2Freceipts",
        "base:invoices",
    ],
)
def test_ids_may_be_percent_encoded_and_hold_slashes_colons_and_versions(
    client: httpx2.Client, path: str
) -> None:
    reply = client.get(f"/v1/models/{path}")
    assert reply.status_code == 200
    assert reply.json()["parent"] == BASE_NAME


@pytest.mark.parametrize(
    "path", ["invoice", "invoices@2", "fake/base-vl:nothing", "", "%00", "a" * 5000, "..%2F..%2Fetc"]
)
def test_unknown_models_are_404_with_near_names(client: httpx2.Client, path: str) -> None:
    reply = client.get(f"/v1/models/{path}")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert len(reply.content) < 1000
    if path == "invoice":
        assert "did you mean invoices" in reply.json()["error"]["message"]


def test_delete_unregisters_at_once_and_frees_behind(client: httpx2.Client, surface: Surface) -> None:
    ref = surface.registry.resolve("org/receipts")
    client.post("/v1/adapters/org/receipts/load")
    assert ref in surface.engine.loaded
    reply = client.delete("/v1/models/org%2Freceipts")
    assert reply.status_code == 200
    assert reply.json() == {"id": "org/receipts", "object": "model", "deleted": True}
    assert client.get("/v1/models/org/receipts").status_code == 404
    assert client.delete("/v1/models/org/receipts").status_code == 404
    deadline_s = time.monotonic() + 10
    while ref in surface.engine.loaded and time.monotonic() < deadline_s:
        client.get("/health")
    assert ref not in surface.engine.loaded


def test_the_base_cannot_be_deleted(client: httpx2.Client) -> None:
    for name in ("fake/base-vl", "base", "fake%2Fbase-vl"):
        reply = client.delete(f"/v1/models/{name}")
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "invalid_request"


def test_openai_python_lists_retrieves_and_deletes(surface: Surface) -> None:
    with serving(surface.app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == [BASE_NAME, "invoices", "org/receipts"]
        assert client.models.retrieve("org/receipts").id == "org/receipts"
        assert client.models.delete("org/receipts").deleted
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("org/receipts")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError):
            client.models.delete(BASE_NAME)
