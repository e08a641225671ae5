"""Every Triton kernel compiles for an H100 at real shapes, without a GPU, and what comes of it can be fast and right.

The compiler and ptxas are in Triton's wheel. What this cannot show is speed, and whether the machine code does what the
interpreter did; ``pytest -m gpu`` does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.compiling import Compiled, num_register_operands

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {"shrink", "expand", "matmul", "dequantise", "add_parts", "attend", "join", "rotate_store"}
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one program may have on an H100 (CUDA's programming guide, compute capability 9.0)."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this build of triton brings no ptxas")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.support.compiling", "bf16"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


def test_all_kernels_compile_within_the_cards_limits(compiled: list[Compiled]) -> None:
    assert {each.kernel for each in compiled} == KERNELS
    for each in compiled:
        assert each.spilled_bytes == 0, each
        assert each.registers <= 255, each
        assert each.shared_bytes <= SHARED_LIMIT, each


def test_no_product_has_the_operand_that_ptxas_miscompiles(compiled: list[Compiled]) -> None:
    assert [each for each in compiled if each.register_operands] == []
    assert any(each.group_products for each in compiled)  # there are some that might have


def test_a_planted_register_operand_is_found() -> None:
    name = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    right = f"{name} {{%r1,%r2}}, %rd1, %rd2, p, 1, 1, 0, 1;"
    wrong = f"{name} {{%r1,%r2}}, {{%r3,%r4,%r5,%r6}}, %rd2, p, 1, 1, 1;"
    assert (num_register_operands(right), num_register_operands(right + "\n" + wrong)) == (0, 1)


def test_products_are_the_tensor_cores_and_weights_are_read_sixteen_bytes_at_a_time(
    compiled: list[Compiled],
) -> None:
    for each in compiled:
        if each.kernel in ("shrink", "expand", "matmul", "attend"):
            assert each.products or each.group_products, each
        wide = ("shrink", "expand", "matmul", "attend", "dequantise", "rotate_store")
        if each.kernel in wide and "3420" not in each.shape:
            assert each.wide_reads, each


def test_lookups_take_four_neighbouring_bytes_of_one_row(compiled: list[Compiled]) -> None:
    """The assembly of base.ops.permute uses one row's table for four registers; the layout must make that true."""
    users = [each for each in compiled if each.kernel in ("matmul", "dequantise")]
    assert users
    for each in users:
        assert each.lookup_layouts, each
        for layout in each.lookup_layouts:
            assert holds_fours_of_a_row(layout), layout


def holds_fours_of_a_row(layout: str) -> bool:
    if layout.startswith("#ttg.linear"):
        return layout.startswith("#ttg.linear<{register = [[0, 1], [0, 2]")
    sizes = re.search(r"sizePerThread = \[\d+, (\d+)\]", layout)
    return sizes is not None and int(sizes[1]) % 4 == 0 and "order = [1, 0]" in layout


def test_everything_but_the_kernels_imports_without_triton() -> None:
    names = ("adapters.layer", "adapters.triton_lora", "base.triton_attention", "base.ops.nf4_linear")
    code = (
        "import sys, importlib\nsys.modules['triton'] = None\n"
        f"for name in {names}:\n    importlib.import_module(name)\n"
        "from adapters.ops.triton_ops import has_triton\nassert not has_triton()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_planted_layout_across_rows_is_found() -> None:
    assert not holds_fours_of_a_row("#ttg.linear<{register = [[0, 1], [8, 0], [0, 2]], lane = []}>")
    assert not holds_fours_of_a_row("#ttg.blocked<{sizePerThread = [1, 2], order = [1, 0]}>")
    assert not holds_fours_of_a_row("#ttg.blocked<{sizePerThread = [4, 4], order = [0, 1]}>")
