"""Uploads: a package comes in file by file, whole or not at all, within its caps, and goes when it is abandoned."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.copying import storage_errors
from adapters.package import COPIED_NAMES, package_digest
from server import receiving
from server.errors import WireError
from server.keys import Caller, Key, KeyRing, hash_key
from server.uploads import MAX_OPEN, UPLOADS_PATH, Uploads, is_raw_body
from tests.support.packages import make_package
from tests.support.surface import Surface, client_of, make_surface

RAW = {"content-type": "application/octet-stream"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES = 256 * 1024


@pytest.fixture
def surface(tmp_path: Path) -> Surface:
    return make_surface(tmp_path, max_adapter_size=MAX_BYTES, max_body="64KiB")


@pytest.fixture
def client(surface: Surface) -> Iterator[httpx2.Client]:
    with client_of(surface) as client:
        yield client


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_package(tmp_path_factory.mktemp("package") / "p", seed=3)
    (folder / "README.md").write_text("# a card\n")
    return folder


def opened(client: httpx2.Client) -> dict[str, Any]:
    reply = client.post(UPLOADS_PATH)
    assert reply.status_code == 201, reply.text
    return dict(reply.json())


def put(client: httpx2.Client, upload: str, file: str, content: Any, **more: Any) -> httpx2.Response:
    headers = RAW | more.pop("headers", {})
    return client.put(f"{UPLOADS_PATH}/{upload}/{file}", content=content, headers=headers, **more)


def code_of(reply: httpx2.Response) -> tuple[int, str]:
    return reply.status_code, str(reply.json()["error"]["code"])


def files_of(surface: Surface) -> set[str]:
    """Every file under the uploads' folder, unfinished ones too."""
    root = surface.root.parent / "uploads"
    return {path.name for path in root.rglob("*") if path.is_file()}


def test_a_package_comes_file_by_file_and_is_registered(
    client: httpx2.Client, surface: Surface, package: Path
) -> None:
    upload = opened(client)
    assert upload["source"] == f"upload:{upload['id']}"
    assert upload["allowed_files"] == list(COPIED_NAMES)
    assert (upload["files"], upload["bytes"], upload["max_bytes"]) == ({}, 0, MAX_BYTES)
    assert upload["expires"] > upload["created"]
    for file in (CONFIG, WEIGHTS, "README.md"):
        data = (package / file).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        reply = put(client, upload["id"], file, data, params={"sha256": digest.upper()})
        assert (reply.status_code, reply.json()) == (
            201,
            {"file": file, "bytes": len(data), "sha256": digest},
        )
    shown = client.get(f"{UPLOADS_PATH}/{upload['id']}").json()
    assert shown["files"] == {f: (package / f).stat().st_size for f in (CONFIG, WEIGHTS, "README.md")}
    assert shown["bytes"] == sum(shown["files"].values())

    body = {"name": "invoice", "source": upload["source"], "sha256": package_digest(package)}
    reply = client.post("/v1/adapters", json=body)
    assert reply.status_code == 201
    assert reply.json()["digest"] == package_digest(package)
    assert (reply.json()["source"], reply.json()["current"]) == ("upload", True)
    assert code_of(client.get(f"{UPLOADS_PATH}/{upload['id']}")) == (404, "not_found")
    assert code_of(client.post("/v1/adapters", json=body)) == (404, "not_found")
    assert files_of(surface) == set()
    assert str(surface.root.parent) not in reply.text


def test_a_file_may_be_sent_again_and_takes_the_other_s_place(
    client: httpx2.Client, surface: Surface
) -> None:
    upload = opened(client)["id"]
    assert put(client, upload, CONFIG, b"x" * 200_000).status_code == 201
    assert (
        put(client, upload, CONFIG, b"y" * 250_000).status_code == 200
    )  # the first does not count beside it
    assert client.get(f"{UPLOADS_PATH}/{upload}").json()["bytes"] == 250_000
    assert files_of(surface) == {CONFIG}


@pytest.mark.parametrize(
    "file",
    ["adapter_model.bin", "x.py", "weights.zip", "..%2f..%2fx", ".incoming-x", "adapter_config.json.gz"],
)
def test_only_the_four_files_of_a_package_are_taken(
    client: httpx2.Client, surface: Surface, file: str
) -> None:
    reply = put(client, opened(client)["id"], file, b"data")
    assert code_of(reply)[0] in (400, 404)
    assert files_of(surface) == set()


def test_too_much_is_413_before_and_while_it_comes_and_leaves_nothing(
    client: httpx2.Client, surface: Surface
) -> None:
    upload = opened(client)["id"]
    assert put(client, upload, CONFIG, b"x" * 100_000).status_code == 201
    for content in (b"x" * (MAX_BYTES + 1), b"x" * (MAX_BYTES - 99_999), iter([b"x" * 60_000] * 3)):
        assert code_of(put(client, upload, WEIGHTS, content)) == (413, "body_too_large")
    shown = client.get(f"{UPLOADS_PATH}/{upload}").json()
    assert (shown["files"], shown["bytes"]) == ({CONFIG: 100_000}, 100_000)
    assert files_of(surface) == {CONFIG}
    assert put(client, upload, WEIGHTS, b"x" * (MAX_BYTES - 100_000)).status_code == 201


def test_a_large_body_is_refused_from_its_head(client: httpx2.Client) -> None:
    upload = opened(client)["id"]
    url = client.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=10) as wire:
        wire.sendall(
            f"PUT {UPLOADS_PATH}/{upload}/{WEIGHTS} HTTP/1.1\r\nhost: localhost\r\n"
            f"content-type: application/octet-stream\r\ncontent-length: {1 << 40}\r\n\r\n".encode()
        )
        assert wire.recv(64).startswith(b"HTTP/1.1 413 ")


def test_a_wrong_sum_leaves_nothing(client: httpx2.Client, surface: Surface) -> None:
    upload = opened(client)["id"]
    for digest in ("0" * 64, "zz", "0" * 63):
        reply = put(client, upload, CONFIG, b"data", params={"sha256": digest})
        assert code_of(reply) == (400, "invalid_request")
        assert reply.json()["error"]["param"] == "sha256"
    assert files_of(surface) == set()


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data", ""])
def test_another_content_type_is_415(client: httpx2.Client, kind: str) -> None:
    reply = put(client, opened(client)["id"], CONFIG, b"{}", headers={"content-type": kind})
    assert code_of(reply) == (415, "unsupported_media_type")


def test_a_client_that_leaves_half_way_leaves_nothing(client: httpx2.Client, surface: Surface) -> None:
    upload = opened(client)["id"]
    url = client.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=10) as wire:
        wire.sendall(
            f"PUT {UPLOADS_PATH}/{upload}/{CONFIG} HTTP/1.1\r\nhost: localhost\r\n"
            "content-type: application/octet-stream\r\ncontent-length: 200000\r\n\r\n".encode()
            + b"x" * 70_000
        )
        _until(lambda: files_of(surface) != set())
        assert code_of(client.delete(f"{UPLOADS_PATH}/{upload}")) == (409, "adapter_busy")
    _until(lambda: files_of(surface) == set())
    assert client.get(f"{UPLOADS_PATH}/{upload}").json()["bytes"] == 0


def test_a_client_that_falls_silent_is_cut(
    client: httpx2.Client, surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "SILENCE_S", 0.1)
    upload = opened(client)["id"]
    url = client.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=10) as wire:
        wire.sendall(
            f"PUT {UPLOADS_PATH}/{upload}/{CONFIG} HTTP/1.1\r\nhost: localhost\r\n"
            "content-type: application/octet-stream\r\ncontent-length: 20\r\n\r\nabc".encode()
        )
        assert wire.recv(64).startswith(b"HTTP/1.1 400 ")
    assert files_of(surface) == set()


def test_a_full_disk_is_507_and_leaves_nothing(
    client: httpx2.Client, surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = opened(client)["id"]

    def full(writer: object, piece: bytes) -> None:
        with storage_errors():
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(receiving._Writer, "write", full)
    assert code_of(put(client, upload, CONFIG, b"data")) == (507, "insufficient_storage")
    assert files_of(surface) == set()
    monkeypatch.undo()
    usage = shutil.disk_usage(surface.root)._replace(free=7)
    monkeypatch.setattr("server.receiving.shutil.disk_usage", lambda path: usage)
    assert code_of(put(client, upload, CONFIG, b"data")) == (507, "insufficient_storage")
    assert client.get(f"{UPLOADS_PATH}/{upload}").json()["files"] == {}


def test_a_refused_package_leaves_the_upload_to_be_mended(
    client: httpx2.Client, surface: Surface, package: Path
) -> None:
    upload = opened(client)
    put(client, upload["id"], WEIGHTS, (package / WEIGHTS).read_bytes())
    reply = client.post("/v1/adapters", json={"name": "a", "source": upload["source"]})
    assert code_of(reply) == (422, "adapter_rejected")
    assert reply.json()["error"]["reason"] == "missing_file"
    put(client, upload["id"], CONFIG, (package / CONFIG).read_bytes())
    assert client.post("/v1/adapters", json={"name": "a", "source": upload["source"]}).status_code == 201


def test_there_are_only_so_many_at_once(client: httpx2.Client) -> None:
    uploads = [opened(client)["id"] for _ in range(MAX_OPEN)]
    refused = client.post(UPLOADS_PATH)
    assert code_of(refused) == (429, "too_many_loads")
    assert 0 < int(refused.headers["retry-after"]) <= 900
    assert client.delete(f"{UPLOADS_PATH}/{uploads[0]}").json() == {"id": uploads[0], "deleted": True}
    opened(client)


def test_unknown_uploads_are_404(client: httpx2.Client) -> None:
    for upload in ("x", "up-" + "0" * 32, "%2e%2e%2f"):
        assert client.get(f"{UPLOADS_PATH}/{upload}").status_code == 404
        assert put(client, upload, CONFIG, b"x").status_code == 404
    reply = client.post("/v1/adapters", json={"name": "a", "source": "upload:up-1"})
    assert code_of(reply) == (404, "not_found")
    assert reply.json()["error"]["param"] == "source"


def test_uploads_are_for_admins_and_each_has_its_own(tmp_path: Path) -> None:
    callers = {"one-admin-key": "one", "two-admin-key": "two"}
    keys = [Key(hash_key(key), Caller(name, frozenset({"admin"}))) for key, name in callers.items()]
    keys.append(Key(hash_key("infer-key-1"), Caller("app", frozenset({"infer"}))))
    surface = make_surface(tmp_path, KeyRing(keys))
    with client_of(surface) as client:
        one, two, app = ({"authorization": f"Bearer {key}"} for key in (*callers, "infer-key-1"))
        upload = client.post(UPLOADS_PATH, headers=one).json()["id"]
        path = f"{UPLOADS_PATH}/{upload}"
        for method in ("GET", "PUT", "DELETE"):
            assert client.request(method, path, headers=app).status_code == 403
            assert client.request(method, f"{path}/{CONFIG}").status_code == 401
        assert client.post(UPLOADS_PATH, headers=app).status_code == 403
        assert put(client, upload, CONFIG, b"x", headers=two).status_code == 404
        body = {"name": "a", "source": f"upload:{upload}"}
        assert client.post("/v1/adapters", json=body, headers=two).status_code == 404
        assert put(client, upload, CONFIG, b"x", headers=one).status_code == 201


# ---- abandoned -------------------------------------------------------------------------------------------------


def test_an_abandoned_upload_goes_by_its_age(tmp_path: Path) -> None:
    now_s = [0.0]
    uploads = Uploads(tmp_path / "u", MAX_BYTES, idle_s=100, clock=lambda: now_s[0])
    kept, gone, used = uploads.open("x"), uploads.open("x"), uploads.open("x")
    with uploads.using(used):
        now_s[0] = 90
        uploads.find(kept.id, "x")
        now_s[0] = 100
        uploads.expire()
        assert [u.folder.exists() for u in (kept, gone, used)] == [True, False, True]
        with pytest.raises(WireError):
            uploads.find(gone.id, "x")
    now_s[0] = 199
    uploads.expire()
    assert [u.folder.exists() for u in (kept, used)] == [False, True]
    uploads.close()
    assert list((tmp_path / "u").iterdir()) == []


def test_nobody_need_come_by_for_it_to_go(tmp_path: Path) -> None:
    async def run() -> bool:
        uploads = Uploads(tmp_path / "u", MAX_BYTES, idle_s=0.02)
        uploads.open("x")
        deadline_s = time.monotonic() + 5
        while len(uploads) and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        return len(uploads) == 0 and not list((tmp_path / "u").iterdir())

    assert asyncio.run(run())


_OTHER = """
import sys, time
from pathlib import Path
from server.uploads import Uploads
upload = Uploads(Path(sys.argv[1]), 100).open("x")
(upload.folder / "adapter_config.json").write_text("{}")
print(upload.id, flush=True)
time.sleep(60)
"""


def test_a_start_clears_what_the_dead_left_and_spares_the_living(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _OTHER, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert other.stdout is not None
    folder = tmp_path / other.stdout.readline().strip()
    assert Uploads(tmp_path, 100).clear_orphans() == 0
    assert folder.is_dir()
    other.kill()
    other.wait()
    other.stdout.close()
    assert Uploads(tmp_path, 100).clear_orphans() == 1
    assert not folder.exists()
    assert Uploads(tmp_path / "none", 100).clear_orphans() == 0


def test_only_the_files_of_uploads_are_raw_bodies() -> None:
    assert is_raw_body("PUT", f"{UPLOADS_PATH}/up-1/{CONFIG}")
    for method, path in (("POST", f"{UPLOADS_PATH}/x"), ("PUT", UPLOADS_PATH), ("PUT", "/v1/aliases/a")):
        assert not is_raw_body(method, path)


def _until(is_so: Any) -> None:
    deadline_s = time.monotonic() + 10
    while not is_so() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert is_so()
