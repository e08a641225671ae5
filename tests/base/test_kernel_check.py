"""A kernel serves if it agrees with its plain twin here; one that is wrong, throws or never ends its trial does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from base.errors import KernelRefused
from base.kernel_check import Case, error_of, may_serve

CPU = torch.device("cpu")


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def agreeing() -> Iterator[Case]:
    yield "three rows", numbers(3, 64), numbers(3, 64)


def wrong() -> Iterator[Case]:
    yield from agreeing()
    yield "a swapped pair of rows", numbers(3, 64)[[1, 0, 2]], numbers(3, 64)


def throwing() -> Iterator[Case]:
    yield from agreeing()
    raise RuntimeError("Failed to find C compiler.\nSee the manual.")


def absent() -> Iterator[Case]:
    from a_package_that_nobody_has import kernels  # type: ignore[import-not-found]

    yield kernels


def empty() -> Iterator[Case]:
    yield from ()


BAD = {
    "a swapped pair of rows: it is": wrong,
    "RuntimeError: Failed to find C compiler.": throwing,
    "ModuleNotFoundError: No module named": absent,
    "nothing here could be tried": empty,
}


def test_what_agrees_serves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lorikeet.base")
    assert may_serve("linear", agreeing, "auto", CPU)
    assert may_serve("linear", agreeing, "triton", CPU)
    assert "kernels.used kind=linear cases=1 is_whole=True worst=0.000" in caplog.text


@pytest.mark.parametrize(("reason", "trial"), BAD.items(), ids=[one.__name__ for one in BAD.values()])
def test_what_is_wrong_or_throws_is_not_used_and_the_log_says_why(
    reason: str, trial: Callable[[], Iterator[Case]], caplog: pytest.LogCaptureFixture
) -> None:
    assert not may_serve("attention", trial, "auto", CPU)
    assert "kernels.refused kind=attention reason=" in caplog.text
    assert reason in caplog.text and "See the manual" not in caplog.text
    with pytest.raises(
        KernelRefused, match=r"attention kernel cannot serve here .*: set cuda_kernels to torch"
    ):
        may_serve("attention", trial, "triton", CPU)


def test_torch_tries_nothing() -> None:
    def never() -> Iterator[Case]:
        raise AssertionError("tried")

    assert not may_serve("linear", never, "torch", CPU)


def test_kernels_serve_on_the_first_device_only(caplog: pytest.LogCaptureFixture) -> None:
    """Triton asks the thread for its device, not the tensors: on another one it would read what is not there."""

    def never() -> Iterator[Case]:
        raise AssertionError("tried")

    assert not may_serve("linear", never, "auto", torch.device("cuda", 1))
    assert "not on cuda:1: choose it by CUDA_VISIBLE_DEVICES" in caplog.text


def test_a_trial_ends_in_its_time_and_what_agreed_by_then_serves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lorikeet.base")
    tried: list[int] = []

    def long() -> Iterator[Case]:
        for place in range(100):
            tried.append(place)
            yield from agreeing()

    assert may_serve("adapters", long, "auto", CPU, limit_s=5.0, clock=lambda: 2.0 * len(tried))
    assert tried == [0, 1, 2]
    assert "cases=3 is_whole=False" in caplog.text


def test_a_trial_that_breaks_the_device_is_a_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access no kernel of this process runs, the plain ones neither."""

    def dead(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(
        KernelRefused, match=r"after which the device answers nothing.*set cuda_kernels to torch"
    ):
        may_serve("attention", throwing, "auto", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not may_serve("attention", throwing, "auto", torch.device("cuda"))


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_roundings_are_no_disagreement(dtype: torch.dtype) -> None:
    """A sum in another order, rounded to the dtype, with an adapter's rounded part added on top."""
    x, weight = numbers(17, 512, dtype=torch.float32), numbers(96, 512, dtype=torch.float32, seed=1)
    exact = x.double() @ weight.double().T
    other = (x[:, :256] @ weight[:, :256].T) + (x[:, 256:] @ weight[:, 256:].T)
    delta = numbers(17, 96, dtype=dtype, seed=2) * 8
    assert error_of(other.to(dtype) + delta, (exact + delta.double()).to(dtype)) <= 0.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", ["a lost block", "one row", "one number", "nan", "a dtype", "a shape"])
def test_faults_are_disagreements(dtype: torch.dtype, fault: str) -> None:
    """The smallest that a wrong mask or stride makes: 64 inputs of the widest linear, or one number of a row."""
    x, weight = numbers(4, 18944, dtype=torch.float32), numbers(32, 18944, dtype=torch.float32, seed=1)
    expected = x @ weight.T
    found = expected.clone()
    if fault == "a lost block":
        found -= x[:, -64:] @ weight[:, -64:].T
    elif fault == "one row":
        found[3] *= 1.02
    elif fault == "one number":
        found[1, 5] += found[1].std()
    elif fault == "nan":
        found[1, 5] = torch.nan
    made = found.to(torch.float64 if fault == "a dtype" else dtype)
    assert error_of(made[:3] if fault == "a shape" else made, expected.to(dtype)) > 1


def test_zeros_must_be_zeros() -> None:
    zeros = torch.zeros(2, 8)
    assert error_of(zeros, zeros) == 0
    assert error_of(zeros + 1e-6, zeros) > 1
