"""Who computes adapters on CUDA is decided by a trial before anything is attached, and on a CPU not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from adapters.sites import Site
from base.config import BaseConfig, CudaKernels
from base.errors import KernelRefused
from base.model import BaseModel
from base.ops.native_library import NativeMissing, has_native_library
from engine import build
from engine.config import EngineConfig

Case = tuple[str, Tensor, Tensor]


def agreeing(*_: object, **__: object) -> Iterator[Case]:
    yield "a row", torch.ones(1, 8), torch.ones(1, 8)


def wrong(*_: object, **__: object) -> Iterator[Case]:
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


@pytest.mark.parametrize(("trial", "by"), [(agreeing, "native"), (wrong, "torch")])
def test_on_a_cpu_adapters_are_the_compiled_kernel_s_where_the_trial_agrees(
    trial: Callable[..., Iterator[Case]], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "try_lora", trial)
    assert build._kernels(base_on("cpu", "triton"), {}, EngineConfig()) == {"adapters": by}
    assert build._kernels(base_on("cpu"), {}, EngineConfig(cpu_adapters="torch")) == {"adapters": "torch"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_trial_s_bank_keeps_halves_as_the_serving_one_will(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def noting(*_: object, keeps_halves: bool) -> Iterator[Case]:
        asked.append(keeps_halves)
        return agreeing()

    monkeypatch.setattr(build, "try_lora", noting)
    build._kernels(base_on(device), {}, EngineConfig())
    assert asked == [device == "cpu"]


@pytest.mark.skipif(not has_native_library(), reason="the compiled kernels are not here")
@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_only_the_compiled_kernel_s_bank_keeps_halves(kernel: str) -> None:
    base = base_on("cpu")
    base.module.add_module("l", nn.Linear(8, 16))
    sites = {"l": Site("l", 8, 16, "language")}
    bank, _, _ = build._attach_adapters(base, sites, EngineConfig(), kernel)
    assert (bank.dtype, bank.keeps_halves) == (torch.float32, kernel == "native")


def test_whoever_insists_on_the_compiled_kernel_is_told_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "try_lora", wrong)
    with pytest.raises(KernelRefused, match=r"adapters kernel .*set cpu_adapters to torch"):
        build._kernels(base_on("cpu"), {}, EngineConfig(cpu_adapters="native"))


def test_a_kernel_that_was_not_compiled_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> object:
        raise NativeMissing("they were not compiled")

    monkeypatch.setattr(build, "native_library", missing)
    with pytest.raises(KernelRefused, match="they were not compiled"):
        build._kernels(base_on("cpu"), {}, EngineConfig(cpu_adapters="native"))


def test_other_devices_have_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "try_lora", None)
    assert build._kernels(base_on("mps"), {}, EngineConfig()) == {}
