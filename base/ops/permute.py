"""PTX that turns 4-bit codes into 16-bit numbers by byte permutation, for NVIDIA's cards.

``prmt.b32 d, a, b, s`` picks four bytes out of the eight of a and b, by the four low nibbles of s. With each scale's 16
results (code times scale, rounded once, as bitsandbytes does) split into a plane of low and one of high bytes, a plane
is four registers, and four codes are looked up in it by three permutations. A table costs 32 instructions and serves
the codes that its thread has of one output and block; eight lookups cost 21.

Text only; tests/base/test_triton_nf4.py runs it, instruction by instruction, against the plain table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

_ROUND: Final = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}


def has_assembly(dtype: str) -> bool:
    return dtype in _ROUND


def table_assembly(code: Sequence[float], dtype: str) -> str:
    """For one scale, $8: the planes of its 16 results, low bytes in $0-$3 and high bytes in $4-$7.

    code: what the 16 codes stand for. dtype: ``bfloat16`` or ``float16``.
    """
    lines = [".reg .b32 pair<8>;", ".reg .f32 scale, value<16>;", "mov.b32 scale, $8;"]
    lines += [f"mul.rn.f32 value{place}, scale, 0f{_bits(value):08X};" for place, value in enumerate(code)]
    lines += [f"{_ROUND[dtype]} pair{pair}, value{2 * pair + 1}, value{2 * pair};" for pair in range(8)]
    for place in range(4):
        lines.append(f"prmt.b32 ${place}, pair{2 * place}, pair{2 * place + 1}, 0x6420;")
        lines.append(f"prmt.b32 ${place + 4}, pair{2 * place}, pair{2 * place + 1}, 0x7531;")
    return _block(lines)


def lookup_assembly() -> str:
    """For four bytes of codes under one scale, $4: their high halves' numbers in $0-$1, their low ones' in $2-$3.

    Each operand of a group of four comes four times, so the scale's planes are $5, $9, ... $33.
    """
    low, high = ([f"${5 + 4 * place}" for place in places] for places in (range(4), range(4, 8)))
    lines = [".reg .b32 pick, half, a, b, l, h;", *_selectors()]
    for pair in range(2):
        if pair:
            lines += ["shr.u32 pick, pick, 16;", "shr.u32 half, half, 16;"]
        lines += [*_plane(low, "l"), *_plane(high, "h")]
        lines += [f"prmt.b32 ${pair}, l, h, 0x7351;", f"prmt.b32 ${pair + 2}, l, h, 0x6240;"]
    return _block(lines)


def _selectors() -> Iterator[str]:
    """A code's low three bits pick within eight entries (``pick``), its fourth between the eights (``half``)."""
    yield "and.b32 pick, $4, 0x77777777;"
    yield "shr.u32 half, $4, 1;"
    yield "and.b32 half, half, 0x44444444;"
    yield "or.b32 half, half, 0x32103210;"


def _plane(registers: Sequence[str], into: str) -> Iterator[str]:
    yield f"prmt.b32 a, {registers[0]}, {registers[1]}, pick;"
    yield f"prmt.b32 b, {registers[2]}, {registers[3]}, pick;"
    yield f"prmt.b32 {into}, a, b, half;"


def _block(lines: Sequence[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
