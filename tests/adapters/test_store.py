from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters import copying
from adapters.errors import AdapterRejected, InsufficientStorage, RejectReason, SourceRejected
from adapters.package import file_sha256, package_digest
from adapters.store import PackageStore
from tests.support.packages import make_package


@pytest.fixture
def store(tmp_path: Path) -> PackageStore:
    return PackageStore(tmp_path / "packages")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make_package(tmp_path / "source")


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)}


def test_only_the_files_that_count_are_copied(store: PackageStore, package: Path) -> None:
    for name in ("README.md", "lorikeet.json", "training_args.bin", "optimizer.pt", "run.py"):
        (package / name).write_text("{}")
    (package / "checkpoint-1").mkdir()
    digest = store.add(package)
    assert _names(store.path(digest)) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorikeet.json",
        "README.md",
    }
    assert digest == package_digest(package)


def test_later_changes_of_the_source_change_nothing(store: PackageStore, package: Path) -> None:
    digest = store.add(package)
    (package / "adapter_config.json").write_text("{}")
    shutil.rmtree(package)
    assert package_digest(store.path(digest)) == digest


def test_the_same_content_is_kept_once(store: PackageStore, package: Path, tmp_path: Path) -> None:
    assert store.add(package) == store.add(make_package(tmp_path / "again"))
    assert len(store.digests()) == 1


def test_content_that_rotted_is_repaired_by_adding_it_again(store: PackageStore, package: Path) -> None:
    digest = store.add(package)
    stored = store.path(digest) / "adapter_model.safetensors"
    stored.chmod(0o644)
    stored.write_bytes(b"rotten")
    assert store.add(package) == digest
    assert package_digest(store.path(digest)) == digest


def test_an_expected_sha256_may_be_the_package_s_or_the_tensor_file_s(
    store: PackageStore, package: Path
) -> None:
    digest = package_digest(package)
    with (package / "adapter_model.safetensors").open("rb") as file:
        of_tensors = file_sha256(file)
    assert store.add(package, expected_sha256=digest) == digest
    assert store.add(package, expected_sha256=of_tensors.upper()) == digest
    with pytest.raises(AdapterRejected) as refusal:
        store.add(package, expected_sha256="0" * 64)
    assert refusal.value.reason is RejectReason.DIGEST_MISMATCH


def test_a_package_over_the_cap_is_refused_before_it_is_copied(
    store: PackageStore, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_copy_file", _never)
    with pytest.raises(AdapterRejected) as refusal:
        store.add(package, max_bytes=1000)
    assert refusal.value.reason is RejectReason.TOO_LARGE


def test_a_package_that_the_disk_cannot_hold_is_refused_before_it_is_copied(
    store: PackageStore, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(package)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(copying, "_copy_file", _never)
    with pytest.raises(InsufficientStorage, match="1000 free"):
        store.add(package)


def _never(*args: object) -> None:
    raise AssertionError("copied")


def _failing_fsync(code: int) -> Callable[[int], None]:
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    return fsync


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_closed_disk_is_insufficient_storage_and_leaves_nothing(
    code: int, store: PackageStore, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _failing_fsync(code))
    with pytest.raises(InsufficientStorage):
        store.add(package)
    assert _names(tmp_path / "packages") == {".lock"}


def test_a_refused_copy_leaves_nothing(store: PackageStore, package: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), store.staged(package):
        raise ValueError("no")
    assert _names(tmp_path / "packages") == {".lock"}


def test_a_link_that_leads_out_is_not_copied(store: PackageStore, package: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (package / "lorikeet.json").symlink_to(secret)
    with pytest.raises(SourceRejected, match="leads out"):
        store.add(package)


def test_sweeping_takes_leftovers_and_what_nothing_refers_to(store: PackageStore, tmp_path: Path) -> None:
    kept, orphan = (store.add(make_package(tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    (tmp_path / "packages" / ".incoming-dead").mkdir()
    (tmp_path / "packages" / ".leaving-dead").mkdir()
    with store.alone() as is_alone:
        assert is_alone
        store.sweep({kept})
    assert _names(tmp_path / "packages") == {".lock", kept}
    assert orphan not in store.digests()


def test_nobody_is_alone_while_another_adds(store: PackageStore, package: Path, tmp_path: Path) -> None:
    other = PackageStore(tmp_path / "packages")
    with store.staged(package), other.alone() as is_alone:
        assert not is_alone
    with other.alone() as is_alone:
        assert is_alone


def test_a_held_package_is_not_deleted(store: PackageStore, package: Path, tmp_path: Path) -> None:
    digest = store.add(package)
    other = PackageStore(tmp_path / "packages")
    hold = other.hold(digest)
    assert not store.remove(digest)
    hold.release()
    assert store.remove(digest)
    assert not store.remove(digest)
    with pytest.raises(FileNotFoundError):
        store.hold(digest)
