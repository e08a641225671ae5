"""Against a real S3 server: moto's, over HTTP, through s3fs and botocore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'lorikeet[s3]'")
pytest.importorskip("flask_cors", reason="moto's server is not installed: pip install 'lorikeet[dev]'")

import s3fs
from moto.server import ThreadedMotoServer

from adapters.errors import AdapterRejected, RejectReason, SourceRejected
from adapters.sources.arrival import Deadline
from adapters.sources.object_store import ObjectAddress, ObjectStoreSource

FILES = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": bytes(range(256)) * (9 << 12),  # 9 MiB: more than one read-ahead
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """A bucket with one package. The server's credentials are in its environment, as an operator gives them."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    system = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    system.mkdir("bucket")
    for name, data in FILES.items():
        system.pipe_file(f"bucket/adapters/invoices/{name}", data)
    yield system
    system.rm("bucket", recursive=True)


def source(max_bytes: int = 1 << 30) -> ObjectStoreSource:
    return ObjectStoreSource([ObjectAddress.parse("s3://bucket/adapters")], max_bytes)


def fetch(store: ObjectStoreSource, address: str, folder: Path) -> str:
    return store.fetch(store.parse(address), folder, Deadline(20))


def test_a_package_comes_byte_for_byte(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    assert fetch(source(), "s3://bucket/adapters/invoices", tmp_path) == "s3://bucket/adapters/invoices"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES


def test_what_is_not_there_too_large_or_a_pickle_is_refused(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    with pytest.raises(SourceRejected, match="nothing at that source"):
        fetch(source(), "s3://bucket/adapters/nothing", tmp_path)
    with pytest.raises(AdapterRejected) as refusal:
        fetch(source(1 << 20), "s3://bucket/adapters/invoices", tmp_path)
    assert refusal.value.reason is RejectReason.TOO_LARGE
    s3.pipe_file("bucket/adapters/old/adapter_config.json", b"{}")
    s3.pipe_file("bucket/adapters/old/adapter_model.bin", b"x")
    with pytest.raises(AdapterRejected, match=r"adapter_model\.bin") as refusal:
        fetch(source(), "s3://bucket/adapters/old", tmp_path)
    assert refusal.value.reason is RejectReason.UNSAFE_FORMAT
    assert list(tmp_path.iterdir()) == []


def test_what_was_put_a_moment_ago_is_seen(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    store = source()
    with pytest.raises(SourceRejected):
        fetch(store, "s3://bucket/adapters/late", tmp_path)
    for name, data in FILES.items():
        s3.pipe_file(f"bucket/adapters/late/{name}", data)
    fetch(store, "s3://bucket/adapters/late", tmp_path)
