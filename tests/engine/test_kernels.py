"""Who computes adapters on CUDA is decided by a trial before anything is attached, and on a CPU not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from base.config import BaseConfig, CudaKernels
from base.errors import KernelRefused
from base.model import BaseModel
from engine import build
from engine.config import EngineConfig

Case = tuple[str, Tensor, Tensor]


def agreeing(*_: object) -> Iterator[Case]:
    yield "a row", torch.ones(1, 8), torch.ones(1, 8)


def wrong(*_: object) -> Iterator[Case]:
    yield "a row", torch.ones(1, 8), torch.zeros(1, 8)


def base_on(device: str, choice: CudaKernels = "auto") -> BaseModel:
    made = SimpleNamespace(
        device=torch.device(device),
        dtype=torch.bfloat16,
        module=nn.Module(),
        config=BaseConfig(cuda_kernels=choice),
        kernels={"attention": "triton"} if device == "cuda" else {},
    )
    return cast("BaseModel", made)


@pytest.fixture(autouse=True)
def a_device_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize(("trial", "by"), [(agreeing, "triton"), (wrong, "torch")])
def test_adapters_are_tritons_where_the_trial_agrees(
    trial: Callable[..., Iterator[Case]], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "try_lora", trial)
    kernels = build._kernels(base_on("cuda"), {}, EngineConfig())
    assert kernels == {"attention": "triton", "adapters": by}


def test_whoever_insists_is_told_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "try_lora", wrong)
    with pytest.raises(KernelRefused, match="adapters kernel"):
        build._kernels(base_on("cuda", "triton"), {}, EngineConfig())
    assert build._kernels(base_on("cuda", "torch"), {}, EngineConfig())["adapters"] == "torch"


def test_a_cpu_has_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "try_lora", None)
    assert build._kernels(base_on("cpu", "triton"), {}, EngineConfig()) == {}
