"""Packages from object stores: under allowed prefixes only, four files, sizes before bytes; on fsspec's own systems."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from adapters.errors import AdapterRejected, DriverMissing, FetchFailed, RejectReason, SourceRejected
from adapters.sources.arrival import Deadline
from adapters.sources.object_store import DRIVERS, ObjectAddress, ObjectStoreSource, check_driver

FILES = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": b"tensors" * 1000,
    "lorikeet.json": b"{}",
}
PREFIX = "s3://bucket/adapters"


class Store(MemoryFileSystem):  # type: ignore[misc]
    """A bucket in memory, that says what was read."""

    store: dict[str, Any] = {}
    pseudo_dirs: list[str] = [""]
    opened: list[str] = []

    def open(self, path: str, *args: Any, **options: Any) -> Any:
        self.opened.append(path.rpartition("/")[2])
        return super().open(path, *args, **options)


@pytest.fixture
def store() -> Iterator[Store]:
    system = Store(skip_instance_cache=True)
    put(system, "bucket/adapters/invoices", FILES)
    system.opened.clear()
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    system.opened.clear()


def put(system: Any, path: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        system.pipe_file(f"{path}/{name}", data)


def source_of(system: object, *prefixes: str, max_bytes: int = 1 << 20) -> ObjectStoreSource:
    addresses = [ObjectAddress.parse(prefix) for prefix in prefixes or (PREFIX,)]
    return ObjectStoreSource(addresses, max_bytes, lambda scheme: system)


def fetch(source: ObjectStoreSource, address: str, folder: Path, timeout_s: float = 20) -> str:
    return source.fetch(source.parse(address), folder, Deadline(timeout_s))


def test_a_packages_files_come_and_nothing_beside_them(store: Store, tmp_path: Path) -> None:
    put(store, "bucket/adapters/invoices", {"run.py": b"x", "optimizer.pt": b"x"})
    store.opened.clear()
    assert (
        fetch(source_of(store), "s3://bucket/adapters/invoices/", tmp_path) == "s3://bucket/adapters/invoices"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    assert sorted(store.opened) == sorted(FILES)


def test_on_fsspecs_local_file_system_too(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket" / "adapters" / "invoices"
    bucket.mkdir(parents=True)
    for name, data in FILES.items():
        (bucket / name).write_bytes(data)
    system = fsspec.filesystem("dir", path=str(tmp_path), fs=fsspec.filesystem("file"))
    (tmp_path / "out").mkdir()
    fetch(source_of(system), "s3://bucket/adapters/invoices", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/adapters-secret/x",
        "s3://bucket/adapter",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/adapters/../secret",
        "s3://bucket/./adapters/x",
        "s3://bucket//adapters/x",
        "s3://bucket/adapters//x",
        "s3://bucket/adapters/%2e%2e/secret",
        "s3://bucket/adapters\\..\\secret",
        "s3://bucket/adapters/*",
        "s3://bucket/adapters/[x]",
        "s3://bucket/adapters/x?versionId=1",
        "s3://bucket/adapters/x#y",
        "s3://key:secret@bucket/adapters/x",
        "s3://other/adapters/x",
        "S3://Bucket/adapters/x",
        "gs://bucket/adapters/x",
        "simplecache::s3://bucket/adapters/x",
        "s3://bucket/adapters/zip://x::file://etc",
        "s3://bucket/adapters/x\n",
        "s3://bucket/adapters/" + "x" * 2000,
        "s3://",
        "",
    ],
)
def test_what_lies_under_no_allowed_prefix_is_never_asked_for(store: Store, address: str) -> None:
    with pytest.raises(SourceRejected) as refusal:
        source_of(store).parse(address)
    assert "bucket/adapters" not in str(refusal.value).replace("bucket/folder", "")
    assert store.opened == []


def test_prefixes_allow_themselves_and_what_is_below(store: Store) -> None:
    source = source_of(store, "s3://bucket/adapters/", "gs://models")
    for address in (PREFIX, f"{PREFIX}/a/b c/d@3", "S3://bucket/adapters/x", "gs://models", "gs://models/a"):
        assert source.parse(address)
    assert source.schemes == {"s3", "gs"}


def test_sizes_are_judged_before_the_first_byte(store: Store, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected) as refusal:
        fetch(source_of(store, max_bytes=7000), f"{PREFIX}/invoices", tmp_path)
    assert refusal.value.reason is RejectReason.TOO_LARGE
    put(store, "bucket/adapters/invoices", {"lorikeet.json": b" " * (5 << 20)})
    store.opened.clear()
    with pytest.raises(AdapterRejected, match=r"lorikeet\.json") as refusal:
        fetch(source_of(store, max_bytes=1 << 30), f"{PREFIX}/invoices", tmp_path)
    assert refusal.value.reason is RejectReason.TOO_LARGE
    assert store.opened == []


def test_what_is_missing_is_said_with_what_is_there(store: Store, tmp_path: Path) -> None:
    put(store, "bucket/adapters/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    with pytest.raises(AdapterRejected, match=r"adapter_model\.bin") as refusal:
        fetch(source_of(store), f"{PREFIX}/old", tmp_path)
    assert refusal.value.reason is RejectReason.UNSAFE_FORMAT
    put(store, "bucket/adapters/notes", {"notes.txt": b"x"})
    with pytest.raises(AdapterRejected, match=r"no adapter_config\.json") as refusal:
        fetch(source_of(store), f"{PREFIX}/notes", tmp_path)
    assert refusal.value.reason is RejectReason.MISSING_FILE
    with pytest.raises(SourceRejected, match="nothing at that source"):
        fetch(source_of(store), f"{PREFIX}/nothing", tmp_path)


@pytest.mark.parametrize("announced", [6000, 8000])
def test_a_file_of_another_length_than_announced_is_not_taken(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, announced: int
) -> None:
    true = store.info

    def info(path: str) -> dict[str, object]:
        return {**true(path), **({"size": announced} if path.endswith(".safetensors") else {})}

    monkeypatch.setattr(store, "info", info)
    with pytest.raises(FetchFailed, match=f"{announced} bytes"):
        fetch(source_of(store), f"{PREFIX}/invoices", tmp_path)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("arn:aws:iam::123:user/me"), SourceRejected),
        (OSError(5, "arn:aws:iam::123:user/me"), FetchFailed),
        (RuntimeError("arn:aws:iam::123:user/me"), FetchFailed),
        (TimeoutError("arn:aws:iam::123:user/me"), FetchFailed),
    ],
)
def test_a_drivers_errors_become_ours_without_their_text(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def fail(path: str) -> None:
        raise error

    monkeypatch.setattr(store, "info", fail)
    with pytest.raises(kind) as refusal:
        fetch(source_of(store), f"{PREFIX}/invoices", tmp_path)
    assert "arn" not in str(refusal.value)


def test_the_deadline_is_kept_between_pieces(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FetchFailed, match="fetch_timeout_s"):
        fetch(source_of(store), f"{PREFIX}/invoices", tmp_path, timeout_s=0)


@pytest.mark.parametrize("scheme", DRIVERS)
def test_a_missing_driver_names_the_extra_that_installs_it(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DriverMissing, match=rf"pip install 'lorikeet\[{scheme}\]'"):
        ObjectStoreSource([ObjectAddress.parse(f"{scheme}://bucket")], 1)
    with pytest.raises(SourceRejected):
        check_driver("ftp")


# ---- gs:// and az:// through fsspec's own registry -------------------------------------------------------------


class Driver(MemoryFileSystem):  # type: ignore[misc]
    """In the place of gcsfs and adlfs: a store in memory that keeps what it was opened with."""

    store: dict[str, Any] = {}
    pseudo_dirs: list[str] = [""]
    opened_with: list[dict[str, object]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        self.opened_with.append(options)
        super().__init__(*args, **options)


@pytest.fixture(params=["gs", "az"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    scheme = str(request.param)
    monkeypatch.setitem(_registry, scheme, Driver)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    yield scheme
    for kept in (Driver.store, Driver.opened_with):
        kept.clear()
    Driver.pseudo_dirs[:] = [""]


def driven(scheme: str, **options: str | int | bool) -> ObjectStoreSource:
    """As a server makes it, with nothing in the driver's place but fsspec's registry."""
    prefix = ObjectAddress.parse(f"{scheme}://models/adapters")
    return ObjectStoreSource([prefix], 1 << 20, options={scheme: options} if options else {})


def test_the_other_clouds_packages_come_through_their_scheme_s_driver(scheme: str, tmp_path: Path) -> None:
    put(Driver(), "models/adapters/invoices", FILES | {"run.py": b"x"})
    source = f"{scheme}://models/adapters/invoices"
    assert fetch(driven(scheme), source, tmp_path) == source
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES


def test_a_driver_gets_the_operator_s_options_and_none_of_a_client_s(scheme: str, tmp_path: Path) -> None:
    put(Driver(), "models/adapters/invoices", FILES)
    Driver.opened_with.clear()
    fetch(driven(scheme, account_name="ours", use_ssl=True), f"{scheme}://models/adapters/invoices", tmp_path)
    (options,) = Driver.opened_with
    assert options == {"account_name": "ours", "use_ssl": True, "use_listings_cache": False}


@pytest.mark.parametrize(
    "rest",
    [
        "models/other/invoices",  # beside the prefix
        "models/adapters-2/invoices",  # a longer name than the prefix's last part
        "other/adapters/invoices",  # another bucket or container
        "models/adapters/../secrets",
        "models@account.dfs.core.windows.net/adapters/invoices",  # Azure's account in the address
        "account:key@models/adapters/invoices",
        "models/adapters/*",
        "models/adapters/x?versionId=1",
        "models/adapters/x#123",  # a generation of Google's
        "models/adapters/x%2f..",
    ],
)
def test_the_other_clouds_addresses_lead_below_their_prefix_only(scheme: str, rest: str) -> None:
    with pytest.raises(SourceRejected):
        driven(scheme).parse(f"{scheme}://{rest}")
    assert Driver.opened_with == []


def test_one_cloud_s_prefix_allows_nothing_of_another_s(scheme: str) -> None:
    for other in {"s3", "gs", "az"} - {scheme}:
        with pytest.raises(SourceRejected):
            driven(scheme).parse(f"{other}://models/adapters/invoices")


def test_nothing_at_an_address_and_a_driver_that_breaks_are_told_apart(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceRejected, match="nothing at that source"):
        fetch(driven(scheme), f"{scheme}://models/adapters/nobody", tmp_path)

    def refuse(self: object, path: str, **options: object) -> None:
        raise ValueError("account_key=SECRET")

    monkeypatch.setattr(Driver, "info", refuse)
    with pytest.raises(FetchFailed, match=rf"{scheme}:// cannot be read \(ValueError\)") as caught:
        fetch(driven(scheme), f"{scheme}://models/adapters/nobody", tmp_path)
    assert "SECRET" not in str(caught.value)
