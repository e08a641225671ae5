"""Where data comes from: files of this machine, and data sets of the hub, which a stub stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from training.data.hub import DataSourceError, Download, HubData, fetch, find_files, parse


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("hf://datasets/org/name", HubData("org/name", None, None)),
        ("hf://datasets/org/name@v1.0", HubData("org/name", "v1.0", None)),
        ("hf://datasets/org/name/data/train.jsonl", HubData("org/name", None, "data/train.jsonl")),
        ("hf://datasets/org/name@abc/a.csv", HubData("org/name", "abc", "a.csv")),
    ],
)
def test_an_address_is_read(address: str, found: HubData) -> None:
    assert parse(address) == found


@pytest.mark.parametrize(
    "address", ["hf://org/name", "hf://datasets/name", "hf://datasets/a/b@", "hf://models/a/b"]
)
def test_another_address_is_refused_with_the_form(address: str) -> None:
    with pytest.raises(DataSourceError, match=r"hf://datasets/org/name\[@revision\]\[/file\]"):
        parse(address)


def hub_of(*names: str) -> Download:
    """A hub whose every data set holds these files."""

    def download(data: HubData, patterns: Sequence[str], folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(data.repo)

    return download


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["rows.jsonl", "README.md"], ["rows.jsonl"]),
        (["train.jsonl", "test.jsonl", "dataset_infos.json"], ["train.jsonl"]),
        (
            ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test.parquet"],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
    ],
)
def test_the_rows_of_a_data_set_are_found(tmp_path: Path, names: list[str], chosen: list[str]) -> None:
    found = find_files(["hf://datasets/org/name"], tmp_path, hub_of(*names))
    assert [str(path.relative_to(tmp_path / "org--name@main")) for path in found] == chosen


@pytest.mark.parametrize("names", [["a.jsonl", "b.jsonl"], ["README.md"], ["train_a.csv", "train_b.csv"]])
def test_a_data_set_of_several_files_asks_for_a_name(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(DataSourceError, match="name it, as in"):
        find_files(["hf://datasets/org/name"], tmp_path, hub_of(*names))


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataSourceError, match=r"no file b\.jsonl"):
        find_files(["hf://datasets/org/name/b.jsonl"], tmp_path, hub_of("a.jsonl"))


def test_pictures_come_with_the_rows_and_revisions_lie_apart(tmp_path: Path) -> None:
    asked: list[tuple[Sequence[str], Path]] = []

    def download(data: HubData, patterns: Sequence[str], folder: Path) -> None:
        asked.append((patterns, folder))
        hub_of("a.jsonl")(data, patterns, folder)

    find_files(["hf://datasets/o/n/a.jsonl", "hf://datasets/o/n@v2/a.jsonl"], tmp_path, download)
    assert asked[0][0][0] == "a.jsonl"
    assert "*.png" in asked[0][0]
    assert len({folder for _, folder in asked}) == 2


def test_files_of_this_machine_are_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    assert find_files([str(tmp_path / "a.jsonl")], tmp_path / "hub") == (tmp_path / "a.jsonl",)
    with pytest.raises(DataSourceError, match="does not exist"):
        find_files([str(tmp_path / "b.jsonl")], tmp_path)
    with pytest.raises(DataSourceError, match="is a folder"):
        find_files([str(tmp_path)], tmp_path)


def test_huggingface_hub_is_asked_for_files_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: calls.append((a, k)))
    fetch(HubData("o/n", "v2", None), ["*.jsonl"], tmp_path)
    expected = {
        "repo_type": "dataset",
        "revision": "v2",
        "local_dir": tmp_path,
        "allow_patterns": ["*.jsonl"],
    }
    assert calls == [(("o/n",), expected)]


def test_what_the_hub_refuses_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataSourceError, match=r"o/n cannot be fetched from the hub: no route to host$"):
        fetch(HubData("o/n", None, None), ["*.jsonl"], tmp_path)
