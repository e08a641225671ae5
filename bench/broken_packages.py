"""Broken adapters by the dozen: a sound PEFT folder, spoilt in one way each. Imports none of ours.

Owns the ways alone; what a server says to each is its own business.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

from bench.living_packages import CONFIG, WEIGHTS

Spoil = Callable[[Path], None]


class TensorInfo(TypedDict, total=False):
    """A tensor, as a safetensors header has it."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


Header = dict[str, TensorInfo]


def _config(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        (folder / CONFIG).write_text(json.dumps({**config, **changes}), "utf-8")

    return spoil


def _text(name: str, text: bytes) -> Spoil:
    return lambda folder: _write(folder / name, text)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _header(change: Callable[[Header, list[str]], None]) -> Spoil:
    """``change`` gets the header and the names of its tensors, in order."""

    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header: Header = json.loads(data[8 : 8 + length])
        change(header, sorted(name for name in header if name != "__metadata__"))
        text = json.dumps(header).encode()
        _write(folder / WEIGHTS, struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def _values(pattern: bytes, *, only_b: bool = False) -> Spoil:
    """Overwrites the first values of the first tensor, or with ``only_b`` all of every B, by repeats of ``pattern``."""

    def spoil(folder: Path) -> None:
        data = bytearray((folder / WEIGHTS).read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        header: Header = json.loads(data[8:begin])
        names = sorted(name for name in header if name != "__metadata__")
        for name in [n for n in names if ".lora_B." in n] if only_b else names[:1]:
            first, last = header[name]["data_offsets"]
            size = last - first if only_b else len(pattern)
            data[begin + first : begin + first + size] = (pattern * (size // len(pattern) + 1))[:size]
        _write(folder / WEIGHTS, bytes(data))

    return spoil


def _rename(header: Header, old: str, new: str) -> None:
    header[new] = header.pop(old)


def _cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    _write(folder / WEIGHTS, data[: len(data) // 2])


def _lead_out(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/etc/hostname")


def _as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


BROKEN: Mapping[str, Spoil] = {
    "no configuration": lambda folder: (folder / CONFIG).unlink(),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights in a format that carries code": _as_pickle,
    "a pickle under the right name": _text(WEIGHTS, b"\x80\x04\x95" + b"\0" * 64),
    "empty weights": _text(WEIGHTS, b""),
    "a configuration that is no JSON": _text(CONFIG, b"{"),
    "a configuration that is a list": _text(CONFIG, b"[]"),
    "a configuration of two megabytes": _text(CONFIG, b" " * (2 << 20)),
    "a link that leads out": _lead_out,
    "another method": _config(peft_type="PROMPT_TUNING"),
    "another base": _config(base_model_name_or_path="meta-llama/Llama-3.1-8B"),
    "rank 0": _config(r=0),
    "a rank that is a text": _config(r="eight"),
    "a rank over the limit": _config(r=100_000),
    "another rank than the tensors": _config(r=3),
    "an alpha that is no number": _config(lora_alpha="NaN"),
    "alpha 0": _config(lora_alpha=0),
    "whole modules saved beside": _config(modules_to_save=["lm_head"]),
    "a module nobody targeted": _config(target_modules=["lm_head"]),
    "weights cut short": _cut,
    "a header longer than the file": lambda folder: _write(folder / WEIGHTS, struct.pack("<Q", 1 << 40) + b"{}"),
    "a header that is no JSON": lambda folder: _write(folder / WEIGHTS, struct.pack("<Q", 8) + b"notjson!"),
    "a tensor of no module": _header(lambda h, names: _rename(h, names[0], "base_model.model.nobody.lora_A.weight")),
    "an A without its B": _header(lambda h, names: _drop(h, next(n for n in names if ".lora_B." in n))),
    "a shape turned round": _header(lambda h, names: h[names[0]].update({"shape": h[names[0]]["shape"][::-1]})),
    "whole numbers as weights": _header(lambda h, names: h[names[0]].update({"dtype": "I32"})),
    "tensors that overlap": _header(lambda h, names: h[names[1]].update({"data_offsets": h[names[0]]["data_offsets"]})),
    "a NaN": _values(struct.pack("<f", float("nan"))),
    "an infinity": _values(struct.pack("<f", float("inf"))),
    "no effect: every B is zero": _values(b"\0", only_b=True),
}  # fmt: skip


def _drop(header: Header, name: str) -> None:
    del header[name]
