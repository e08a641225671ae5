"""What tests.support.compiling compiles: every kernel with the types and constants that our code starts it with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitsandbytes.functional import get_4bit_type

from adapters.ops.launch import lora_launch
from base.ops.nf4_launch import nf4_launch
from base.ops.permute import lookup_assembly, table_assembly

SCALAR = "i32"


@dataclass(frozen=True)
class Case:
    kernel: Any
    shape: str
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int = 4
    stages: int = 3
    fuses: bool = True


def cases(kinds: Sequence[str]) -> Iterator[Case]:
    for kind in kinds:
        yield from _loras(kind)
        yield from _nf4(kind)
        yield from _attention(kind)


def _types(kind: str) -> Any:
    import triton.language as tl

    return {"bf16": tl.bfloat16, "fp16": tl.float16}[kind]


def _loras(kind: str) -> Iterator[Case]:
    """Merged q, k and v of the 7B at 64 rows, its down at a prefill of 2048, a vision MLP whose width is odd."""
    from adapters.ops.kernels import lora

    x = f"*{kind}"
    tables = {
        "tiles_ptr": "*i32",
        "rows_ptr": "*i32",
        "entries_ptr": "*i64",
        "num_slots": SCALAR,
        "num_places": SCALAR,
    }
    for num_in, widths, num_rows in (
        (3584, (3584, 512, 512), 64),
        (18944, (3584,), 2048),
        (3420, (1280,), 4096),
    ):
        launch = lora_launch(num_in)
        parts, rows = launch.parts(num_in, num_rows), 16 if num_rows == 64 else 32
        shared = {
            "A_TYPE": _types(kind),
            "NUM_SITES": len(widths),
            "MAX_RANK": 64,
            "BLOCK_M": rows,
            "UPCAST": False,
        }
        shape = f"{kind} {num_in} to {widths}, {num_rows} rows"
        yield Case(
            lora.shrink,
            shape,
            {"x_ptr": x, "partial_ptr": "*fp32", **tables},
            {
                **shared,
                "NUM_IN": num_in,
                "STRIDE_X": num_in,
                "BLOCK_K": launch.block_k,
                "CHUNK": launch.chunk,
                "CHUNKS_PER_PART": launch.num_chunks(num_in) // parts,
            },
            launch.shrink_warps,
            launch.shrink_stages,
        )
        first, second, third = (*widths, 0, 0)[:3]
        yield Case(
            lora.expand,
            shape,
            {"y_ptr": x, "partial_ptr": "*fp32", **tables, "bias_ptr": x},
            {
                **shared,
                "STRIDE_Y": sum(widths),
                "WIDTH_0": first,
                "WIDTH_1": second,
                "WIDTH_2": third,
                "PARTS": parts,
                "BLOCK_N": launch.block_n,
                "HAS_BIAS": len(widths) == 3,
                "ROUNDS_DELTA": True,
            },
            launch.expand_warps,
        )


def _nf4(kind: str) -> Iterator[Case]:
    from base.ops.kernels import nf4

    name = {"bf16": "bfloat16", "fp16": "float16"}[kind]
    code = get_4bit_type("nf4", device="cpu").tolist()
    weight = {
        "codes_ptr": "*u8", "scales_ptr": "*u8", "code_ptr": "*fp32", "outer_code_ptr": "*fp32",
        "outer_ptr": "*fp32", "starts_ptr": "*i32", "offsets_ptr": "*fp32",
    }  # fmt: skip
    assembly = {"TABLE": table_assembly(code, name), "LOOKUP": lookup_assembly()}
    for num_in, num_out in ((3584, 4608), (11008, 2048)):
        common = {
            "NUM_IN": num_in,
            "NUM_OUT": num_out,
            "DTYPE": _types(kind),
            "NESTED": True,
            "UPCAST": False,
        }
        for num_rows in (1, 32, 64):
            launch = nf4_launch(num_rows, num_in, num_out)
            out = "*fp32" if launch.parts > 1 else f"*{kind}"
            yield Case(
                nf4.matmul,
                f"{kind} {num_in} to {num_out}, {num_rows} rows, {launch.parts} parts",
                {"x_ptr": f"*{kind}", "out_ptr": out, **weight, "bias_ptr": f"*{kind}", "num_rows": SCALAR},
                {
                    **common,
                    **assembly,
                    "STRIDE_X": num_in,
                    "HAS_BIAS": num_out == 4608,
                    "PARTS": launch.parts,
                    "BLOCKS_PER_PART": -(-num_in // 64 // launch.parts),
                    "BLOCK_M": launch.block_m,
                    "BLOCK_N": launch.block_n,
                },
                launch.warps,
                launch.stages,
                fuses=False,
            )
        yield Case(
            nf4.dequantise,
            f"{kind} {num_in} to {num_out}",
            {"out_ptr": f"*{kind}", **weight},
            {**common, **assembly, "BLOCK_N": 64},
            fuses=False,
        )
    yield Case(
        nf4.add_parts,
        f"{kind} 8 parts",
        {"parts_ptr": "*fp32", "out_ptr": f"*{kind}", "bias_ptr": f"*{kind}", "num_values": SCALAR},
        {"NUM_OUT": 4608, "DTYPE": _types(kind), "HAS_BIAS": True, "PARTS": 8, "SIZE": 1024, "UPCAST": False},
    )


def _attention(kind: str) -> Iterator[Case]:
    """Eight query heads of one key head as in the 3B, seven as in the 7B."""
    from base.ops.kernels import attention

    x = f"*{kind}"
    common = {"DIM": 128, "DTYPE": _types(kind), "UPCAST": False}
    for group, kv_heads, splits in ((8, 2, 16), (7, 4, 1)):
        yield Case(
            attention.attend,
            f"{kind} {group} heads of 128, {splits} splits",
            {
                "q_ptr": x, "keys_ptr": x, "values_ptr": x, "tables_ptr": "*i32", "lengths_ptr": "*i32",
                "sums_ptr": "*fp32", "tops_ptr": "*fp32", "max_blocks": SCALAR, "num_heads": SCALAR,
                "stride_q": SCALAR, "scale": "fp32",
            },
            {
                **common, "GROUP": group, "STRIDE_SLOT": 128 * kv_heads, "BLOCK_SIZE": 16, "SPLITS": splits,
                "BLOCK_N": 64,
            },
        )  # fmt: skip
        yield Case(
            attention.join,
            f"{kind} {splits} splits",
            {"sums_ptr": "*fp32", "tops_ptr": "*fp32", "out_ptr": x, "num_places": SCALAR},
            {**common, "SPLITS": splits},
            warps=1,
        )
    for heads, tile, kv_heads in ((16, 16, 2), (28, 32, 4)):
        row = (heads + 2 * kv_heads) * 128
        yield Case(
            attention.rotate_store,
            f"{kind} {heads} and {kv_heads} heads of 128",
            {
                "out_ptr": x, "q_ptr": x, "k_ptr": x, "v_ptr": x, "cos_ptr": x, "sin_ptr": x, "slots_ptr": "*i64",
                "keys_ptr": x, "values_ptr": x,
            },
            {
                **common, "STRIDE_Q": row, "STRIDE_K": row, "STRIDE_V": row, "NUM_HEADS": heads,
                "NUM_KV_HEADS": kv_heads, "TILE": tile, "KV_TILE": kv_heads,
            },
            fuses=False,
        )  # fmt: skip
