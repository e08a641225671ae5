"""Compiles every Triton kernel for an H100 at the shapes of the 3B and the 7B, without a GPU, and says what came of it.

``python -m tests.support.compiling [bf16] [fp16]`` prints one JSON line a kernel. A process of its own, since the tests
have their kernels interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.kernel_cases import Case, cases

CAPABILITY = 90


@dataclass(frozen=True)
class Compiled:
    kernel: str
    shape: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_reads: int
    """Instructions that read 16 bytes of global memory."""
    narrow_reads: int
    """Instructions that copy less than 16 bytes a thread into shared memory."""
    products: int
    """mma.sync instructions."""
    group_products: int
    """wgmma instructions."""
    register_operands: int
    """wgmma instructions whose left side is in registers: what ptxas before 13.3 miscompiles."""
    lookup_layouts: tuple[str, ...]
    """Layouts of the tensors that the assembly takes four by four."""


def compile_case(case: Case) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, signature, dict(case.constants), attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": case.fuses}
    made = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    ptx, layouts = made.asm["ptx"], lookup_layouts(made.asm["ttgir"])
    registers, spilled = resources(made.asm["cubin"])
    return Compiled(
        kernel=case.kernel.__name__,
        shape=case.shape,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=made.metadata.shared,
        wide_reads=len(re.findall(r"cp\.async\.cg\.shared\.global|ld\.global\S*\.v4\.b32", ptx)),
        narrow_reads=len(re.findall(r"cp\.async\.ca\.shared\.global", ptx)),
        products=len(re.findall(r"mma\.sync\.", ptx)),
        group_products=len(group_products(ptx)),
        register_operands=num_register_operands(ptx),
        lookup_layouts=layouts,
    )


def group_products(ptx: str) -> list[str]:
    return re.findall(r"wgmma\.mma_async[^;]*;", ptx)


def num_register_operands(ptx: str) -> int:
    """Sums stand in braces, and then the left side: a descriptor, or registers in braces of their own."""
    return sum(bool(re.search(r"\}\s*,\s*\{", text)) for text in group_products(ptx))


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory, which is where they are spilled to."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing.stdout)
    assert usage is not None, listing.stdout
    return int(usage[1]), int(usage[2]) + int(usage[3])


def lookup_layouts(ttgir: str) -> tuple[str, ...]:
    definitions = dict(re.findall(r"^(#\w+) = (#ttg\.\S+<.*>)$", ttgir, re.MULTILINE))
    pattern = r"packed_element = 4 : i32[^:]*\} [^:]*: tensor<\d+x\d+xi8, (#\w+)>"
    return tuple(definitions[name] for name in re.findall(pattern, ttgir))


if __name__ == "__main__":
    for each in cases(sys.argv[1:] or ("bf16", "fp16")):
        sys.stdout.write(json.dumps(asdict(compile_case(each))) + "\n")
        sys.stdout.flush()
