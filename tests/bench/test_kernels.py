"""The kernel bench: machine limits that can be, floors worked out by hand, and what it times is what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from base.ops.native_library import has_native_library
from bench.floors import LanguageShape, Machine
from bench.kernel_run import language_shape
from bench.kernels import Stand, _Bed, time_kernels
from bench.machine import best_seconds, blocked_product, has_blocked_product, measure_machine

CPU = torch.device("cpu")
SHAPE = LanguageShape(128, 2, 4, 2, 32, 192, 1024)


def stand(rows: tuple[int, ...] = (1, 4)) -> Stand:
    return Stand(SHAPE, Machine(1e9, 1e12, 1e9), CPU, rows, rank=8, num_adapters=2, context=64, budget_s=0.0)


def test_every_kernel_is_timed_at_every_number_of_rows() -> None:
    timings = list(time_kernels(stand(), ("q",)))
    assert {(each.kernel, each.rows) for each in timings} == {
        (kernel, rows) for kernel in ("matmul", "lora", "attention") for rows in (1, 4)
    }
    assert all(each.us > 0 and each.floor_us > 0 for each in timings)
    num_ways = 3 + has_blocked_product() + has_native_library()
    assert len([each for each in timings if each.kernel == "matmul"]) == num_ways * 2


def test_floors_are_those_worked_out_by_hand() -> None:
    found = {(each.kernel, each.variant): each for each in time_kernels(stand((4,)), ("q",))}
    lora = found[
        "lora", "ours over 2 adapters"
    ]  # 2 adapters of 8 x 256 in fp32, 4 rows of 128 + 2 x 128 in bf16
    assert lora.floor_us == pytest.approx((2 * 8 * 256 * 4 + 2 * 4 * 384) / 1e3)
    copy = found["matmul", "16-bit copy"]
    assert copy.floor_us == pytest.approx((2 * 128 * 128 + 2 * 4 * 256) / 1e3)
    attention = found["attention", "sdpa, context 64"]
    assert attention.floor_us == pytest.approx(2 * 4 * 2 * 64 * 32 * 2 / 1e3)


def test_operations_decide_where_they_take_longer() -> None:
    bound = Stand(SHAPE, Machine(1e12, 1e6, 1e3), CPU)
    assert bound.floor_us(100, 1e6) == pytest.approx(1e6)
    assert bound.floor_us(100, 1e3, is_lora=True) == pytest.approx(1e6)


def test_our_lora_and_the_loop_compute_the_same() -> None:
    bed = _Bed(stand(), "q")
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    bed.route([(4, -1)])
    bare = bed.linear(x).float()
    bed.route([(2, 0), (2, 1)])
    added = bed.linear(x).float() - bare
    assert torch.allclose(added, torch.cat(bed.loop(x, 2)), atol=0.05, rtol=0.05)
    assert float(added.detach().abs().max()) > 0.5


def test_a_machine_s_limits_are_positive_and_a_sleep_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine.COPY_BYTES", 2**22)
    monkeypatch.setattr("bench.machine.PRODUCT", (16, 64, 64))
    machine = measure_machine(CPU)
    assert min(machine.bytes_per_s, machine.flops_per_s, machine.lora_flops_per_s) > 1e6
    calls = []
    assert best_seconds(lambda: calls.append(1), CPU, budget_s=0.0, least=3) >= 0
    assert len(calls) == 4  # one to warm up


@pytest.mark.skipif(not has_blocked_product(), reason="this torch has no oneDNN")
def test_the_product_in_blocks_is_the_product() -> None:
    weight, x = torch.randn(96, 64), torch.randn(5, 64)
    assert torch.allclose(blocked_product(weight, 16)(x), x @ weight.T, atol=1e-4)


def test_shapes_are_found_by_name_or_folder() -> None:
    assert language_shape("7b").num_linear_weights == pytest.approx(6.525e9, rel=1e-3)
    with pytest.raises(ValueError, match="no shape"):
        language_shape("13b")


@pytest.mark.gpu
def test_triton_s_product_is_the_loop_s() -> None:
    device = torch.device("cuda")
    bed = _Bed(replace(stand(), device=device), "q")
    x = torch.randn(5, 128, dtype=torch.bfloat16, device=device)
    added = bed.triton(x, 2)().float()
    assert torch.allclose(added, torch.cat(bed.loop(x, 2)).float(), atol=0.05, rtol=0.05)
