from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import SourceRejected
from adapters.sources.local import LocalSource


def _package(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _package(tmp_path / "root" / "invoice")
    _package(tmp_path / "root" / "acme" / "receipts")
    _package(tmp_path / "outside")
    _package(tmp_path / "root-beside")
    return tmp_path / "root"


def test_names_and_absolute_paths_under_a_root_resolve(root: Path, tmp_path: Path) -> None:
    source = LocalSource([tmp_path / "none", root])
    assert source.resolve("invoice") == root / "invoice"
    assert source.resolve("acme/receipts") == root / "acme" / "receipts"
    assert source.resolve(str(root / "invoice")) == root / "invoice"
    assert source.resolve(f"file://{root}/invoice/") == root / "invoice"
    assert source.resolve(str(root / "acme" / ".." / "invoice")) == root / "invoice"
    assert source.root_of(root / "invoice") == root


@pytest.mark.parametrize(
    "source",
    [
        "{tmp}/outside",
        "../outside",
        "invoice/../../outside",
        "{tmp}/root-beside",
        "{tmp}/root/escape",
        "escape",
        "/etc",
        "/etc/passwd",
        "",
        "nothing",
        "invoice/adapter_config.json",
        "in\0voice",
        "x" * 5000,
        "hf://org/repo",
        "https://example.com/a",
        "s3://bucket/a",
        "http:/x",
        "C:\\adapters",
        "~/adapters",
    ],
)
def test_everything_else_is_refused_without_saying_where_things_are(
    source: str, root: Path, tmp_path: Path
) -> None:
    (root / "escape").symlink_to(tmp_path / "outside")
    with pytest.raises(SourceRejected) as refusal:
        LocalSource([root]).resolve(source.format(tmp=tmp_path))
    if "{tmp}" not in source:
        assert str(tmp_path) not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_what_lies_outside_and_what_does_not_exist_read_the_same(root: Path) -> None:
    messages = set()
    for path in ("/etc", "/no-such-folder"):
        with pytest.raises(SourceRejected) as refusal:
            LocalSource([root]).resolve(path)
        messages.add(str(refusal.value).replace(path, ""))
    assert len(messages) == 1


def test_a_root_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert LocalSource([tmp_path / "link"]).resolve("invoice") == root / "invoice"


def test_scanning_finds_packages_and_their_organisations_but_no_escapes(root: Path, tmp_path: Path) -> None:
    (root / "escape").symlink_to(tmp_path / "outside")
    (root / "empty").mkdir()
    _package(root / ".hidden")
    assert LocalSource([root]).scan() == {
        "acme/receipts": root / "acme" / "receipts",
        "invoice": root / "invoice",
    }
    assert LocalSource([root / "invoice", tmp_path / "none"]).scan() == {"invoice": root / "invoice"}


def test_without_roots_nothing_resolves(root: Path) -> None:
    with pytest.raises(SourceRejected):
        LocalSource([]).resolve(str(root / "invoice"))
