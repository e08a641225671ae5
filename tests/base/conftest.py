"""Checkpoints and bases that the tests of this room share; made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from tests.support.checkpoints import make_checkpoint
from tests.support.oracle import Oracle


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied head, even sizes, two vision blocks."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="session")
def odd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 7B's ratios: untied head, 7 heads on 1; the published key layout; more rows than tokens."""
    folder = tmp_path_factory.mktemp("odd")
    return make_checkpoint(
        folder, tied=False, hidden=448, heads=7, kv_heads=1, mlp=512, layers=3, vocab=640, layout="old", seed=5,
        vision_depth=4, fullatt_block_indexes=(1, 3),
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> BaseModel:
    return load_base(BaseConfig(source=str(tiny_folder)))


@pytest.fixture(scope="session")
def odd(odd_folder: Path) -> BaseModel:
    return load_base(BaseConfig(source=str(odd_folder)))


@pytest.fixture(scope="session")
def tiny_oracle(tiny_folder: Path) -> Oracle:
    return Oracle(tiny_folder)


@pytest.fixture(scope="session")
def odd_oracle(odd_folder: Path) -> Oracle:
    return Oracle(odd_folder)


@pytest.fixture(scope="session")
def tiny_dequantised(tiny_folder: Path) -> BaseModel:
    return load_base(BaseConfig(source=str(tiny_folder), cpu_linear="dequantised"))


@pytest.fixture(scope="session")
def odd_dequantised(odd_folder: Path) -> BaseModel:
    return load_base(BaseConfig(source=str(odd_folder), cpu_linear="dequantised"))


@pytest.fixture(scope="session")
def tiny_float32(tiny_folder: Path) -> BaseModel:
    return load_base(BaseConfig(source=str(tiny_folder), cpu_linear="float32"))


@pytest.fixture(scope="session")
def odd_float32(odd_folder: Path) -> BaseModel:
    return load_base(BaseConfig(source=str(odd_folder), cpu_linear="float32"))
