"""Packages from the hub: pinned, allow-listed, four files, sizes before bytes, and no token but the server's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import AdapterError, AdapterRejected, FetchFailed, RejectReason, SourceRejected
from adapters.sources.arrival import Deadline
from adapters.sources.hub import HubSource
from tests.support.hub import COMMIT, Hub, serving_hub

FILES = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": b"tensors" * 1000,
    "README.md": b"a card",
}


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with serving_hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite is kept off the network; the hub of these tests is on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(served: Hub) -> Hub:
    fresh = Hub(url=served.url, repos={"acme/invoices": dict(FILES)})
    for name in Hub.__slots__:  # the server keeps its object
        setattr(served, name, getattr(fresh, name))
    return served


def source_of(hub: Hub, **options: object) -> HubSource:
    values: dict[str, object] = {"max_bytes": 1 << 20, "endpoint": hub.url, **options}
    return HubSource(frozenset({"acme"}), **values)  # type: ignore[arg-type]


def fetch(source: HubSource, address: str, folder: Path, timeout_s: float = 20) -> str:
    return source.fetch(source.parse(address), folder, Deadline(timeout_s))


@pytest.mark.parametrize(
    "address", ["hf://acme/invoices", "hf://acme/invoices@main", f"hf://acme/invoices@{COMMIT}"]
)
def test_four_files_come_and_the_source_names_the_commit(hub: Hub, tmp_path: Path, address: str) -> None:
    hub.repos["acme/invoices"] |= {"optimizer.pt": b"x", "run.py": b"x", "sub/adapter_config.json": b"x"}
    assert fetch(source_of(hub), address, tmp_path) == f"hf://acme/invoices@{COMMIT}"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    assert sorted(hub.downloads()) == sorted(FILES)


@pytest.mark.parametrize(
    "address",
    [
        "hf://evil/invoices",
        "hf://acme.evil/invoices",
        "hf://ACME/invoices",
        "hf://acme",
        "hf://acme/",
        "hf://acme/a/b",
        "hf://acme/../evil/x",
        "hf://acme/..",
        "hf://acme/x@",
        "hf://acme/x@../main",
        "hf://acme/x@a..b",
        "hf://acme/x@-rf",
        "hf://acme/x?token=1",
        "hf://user:pw@acme/x",
        "hf://acme/x\n",
        "hf://acme/" + "x" * 200,
    ],
)
def test_other_organisations_and_malformed_addresses_never_reach_the_hub(hub: Hub, address: str) -> None:
    with pytest.raises(SourceRejected):
        source_of(hub).parse(address)
    assert hub.requests == []


def test_a_repository_that_moved_to_another_organisation_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.moved["acme/invoices"] = "evil/invoices"
    with pytest.raises(SourceRejected, match="evil"):
        fetch(source_of(hub), "hf://acme/invoices", tmp_path)
    assert hub.downloads() == []


def test_what_does_not_exist_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SourceRejected, match="no acme/receipts"):
        fetch(source_of(hub), "hf://acme/receipts", tmp_path)
    with pytest.raises(SourceRejected, match="no revision 'v9'"):
        fetch(source_of(hub), "hf://acme/invoices@v9", tmp_path)


def test_the_size_is_judged_before_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    for name, announced in (("adapter_model.safetensors", 2 << 20), ("README.md", 5 << 20)):
        hub.announced = {name: announced}
        with pytest.raises(AdapterRejected) as refusal:
            fetch(source_of(hub), "hf://acme/invoices", tmp_path)
        assert refusal.value.reason is RejectReason.TOO_LARGE
    assert hub.downloads() == []


def test_a_repository_with_only_a_pickle_is_refused_by_name(hub: Hub, tmp_path: Path) -> None:
    hub.repos["acme/invoices"]["adapter_model.bin"] = hub.repos["acme/invoices"].pop(
        "adapter_model.safetensors"
    )
    with pytest.raises(AdapterRejected, match=r"adapter_model\.bin") as refusal:
        fetch(source_of(hub), "hf://acme/invoices", tmp_path)
    assert refusal.value.reason is RejectReason.UNSAFE_FORMAT
    assert hub.downloads() == []


@pytest.mark.parametrize("announced", [6999, 7001])
def test_a_file_of_another_length_than_announced_is_not_taken(
    hub: Hub, tmp_path: Path, announced: int
) -> None:
    hub.announced = {"adapter_model.safetensors": announced}
    with pytest.raises(FetchFailed, match=f"{announced} bytes"):
        fetch(source_of(hub), "hf://acme/invoices", tmp_path)


def test_a_file_of_another_digest_than_announced_is_not_taken(hub: Hub, tmp_path: Path) -> None:
    hub.digests = {"adapter_model.safetensors": "0" * 64}
    with pytest.raises(FetchFailed, match="SHA-256"):
        fetch(source_of(hub), "hf://acme/invoices", tmp_path)


def test_the_token_is_the_servers_own_or_none(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_the_machines_login")
    hub.token = "hf_the_servers"
    with pytest.raises(SourceRejected, match="hub_token"):
        fetch(source_of(hub), "hf://acme/invoices", tmp_path)
    assert {token for _, token in hub.requests} == {None}
    fetch(source_of(hub, token="hf_the_servers"), "hf://acme/invoices", tmp_path)
    assert {token for _, token in hub.requests} == {None, "Bearer hf_the_servers"}


def test_a_deadline_ends_it(hub: Hub, tmp_path: Path) -> None:
    hub.gate = threading.Event()
    with pytest.raises(FetchFailed):
        fetch(source_of(hub), "hf://acme/invoices", tmp_path, timeout_s=0.3)
    hub.gate.set()


def test_a_hub_that_is_not_there_is_a_failed_fetch(tmp_path: Path) -> None:
    source = HubSource(frozenset({"acme"}), 1 << 20, endpoint="http://127.0.0.1:9")
    with pytest.raises(FetchFailed) as failure:
        fetch(source, "hf://acme/invoices", tmp_path)
    assert "127.0.0.1" not in str(failure.value)


# ---- offline ---------------------------------------------------------------------------------------------------


def cache(root: Path, files: dict[str, bytes]) -> Path:
    """A hub cache as huggingface_hub lays it out: snapshots of links into blobs."""
    repo = root / "models--acme--invoices"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, data in files.items():
        (repo / "blobs" / name).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return root


def test_offline_the_machines_cache_answers_and_the_hub_is_not_asked(hub: Hub, tmp_path: Path) -> None:
    source = source_of(hub, is_offline=True, cache_dir=cache(tmp_path / "cache", FILES))
    for address in ("hf://acme/invoices", f"hf://acme/invoices@{COMMIT}"):
        folder = tmp_path / address.rpartition("/")[2]
        folder.mkdir()
        assert fetch(source, address, folder) == f"hf://acme/invoices@{COMMIT}"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    with pytest.raises(SourceRejected, match="hf download"):
        fetch(source, "hf://acme/receipts", tmp_path)
    assert hub.requests == []


def test_hf_hub_offline_is_honoured(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceRejected, match="asks no hub"):
        fetch(source_of(hub, cache_dir=tmp_path), "hf://acme/invoices", tmp_path)
    assert hub.requests == []


def test_a_link_out_of_the_cache_is_not_followed(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    root = cache(tmp_path / "cache", FILES)
    weights = root / "models--acme--invoices" / "snapshots" / COMMIT / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterError, match="leads out"):
        fetch(source_of(hub, is_offline=True, cache_dir=root), "hf://acme/invoices", tmp_path / "out")
