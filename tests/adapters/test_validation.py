from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterError, AdapterRejected, RejectReason, SourceRejected
from adapters.validation import Limits, check_package
from adapters.weights import load_weights
from tests.support.packages import make_package, tiny_sites

SITES = tiny_sites()
BASES = ("Qwen/Qwen2.5-VL-3B-Instruct",)
LIMITS = Limits(max_rank=8, max_package_bytes=1 << 20, max_config_bytes=1 << 14, max_header_bytes=1 << 16)
Q0 = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def _config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(_weights(folder))
    change(tensors)
    save_file(tensors, _weights(folder))


def _header(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    data = _weights(folder).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    _raw_header(folder, json.dumps(header).encode(), data[8 + length :])


def _raw_header(folder: Path, header: bytes, buffer: bytes = b"") -> None:
    _weights(folder).write_bytes(struct.pack("<Q", len(header)) + header + buffer)


def _resize(role: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda tensors: tensors.update({f"{Q0}.{role}": torch.ones(*shape)}))


def _swap_offsets(header: dict[str, dict[str, object]]) -> None:
    offsets = header[f"{Q0}.lora_A.weight"]["data_offsets"]
    assert isinstance(offsets, list)
    offsets.reverse()


def _overlap(header: dict[str, dict[str, object]]) -> None:
    names = [name for name in header if name.endswith("lora_A.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def _fill(value: float, role: str = "lora_B") -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.{role}.weight"][1, 1] = value

    return lambda folder: _edit(folder, change)


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda tensors: tensors.update({new: tensors.pop(old)}))


def _only_pickle(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        _weights(folder).unlink()
        (folder / name).write_bytes(pickle.dumps({"a": 1}))

    return change


def _cast(dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: _edit(
        folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
    )


def _disjoint(tensors: dict[str, torch.Tensor]) -> None:
    """A and B both hold numbers, and yet B @ A is zero: they meet in no rank."""
    for name, tensor in tensors.items():
        tensor[slice(0, 2) if "lora_A" in name else slice(None), ... if "lora_A" in name else slice(2, 4)] = 0


BROKEN: dict[str, tuple[RejectReason, Callable[[Path], object]]] = {
    # files
    "no configuration": (RejectReason.MISSING_FILE, lambda f: (f / "adapter_config.json").unlink()),
    "no weights": (RejectReason.MISSING_FILE, lambda f: _weights(f).unlink()),
    "weights as .bin": (RejectReason.UNSAFE_FORMAT, _only_pickle("adapter_model.bin")),
    "weights as .pt": (RejectReason.UNSAFE_FORMAT, _only_pickle("adapter.PT")),
    "pickle under the right name": (
        RejectReason.UNSAFE_FORMAT,
        lambda f: _weights(f).write_bytes(pickle.dumps([1] * 9)),
    ),
    "torch zip under the right name": (
        RejectReason.UNSAFE_FORMAT,
        lambda f: torch.save({"a": torch.ones(2)}, _weights(f)),
    ),
    "gguf under the right name": (
        RejectReason.UNSAFE_FORMAT,
        lambda f: _weights(f).write_bytes(b"GGUF" + bytes(100)),
    ),
    "file over the limit": (RejectReason.TOO_LARGE, lambda f: os.truncate(_weights(f), 2 << 20)),
    "configuration over the limit": (
        RejectReason.TOO_LARGE,
        lambda f: _config(f, auto_mapping={"x": "y" * 20_000}),
    ),
    # configuration
    "broken configuration": (RejectReason.BAD_CONFIG, lambda f: (f / "adapter_config.json").write_text("{")),
    "broken lorikeet.json": (RejectReason.BAD_CONFIG, lambda f: (f / "lorikeet.json").write_text("[1]")),
    "another kind": (RejectReason.UNSUPPORTED_KIND, lambda f: _config(f, peft_type="IA3")),
    "bias": (RejectReason.UNSUPPORTED_OPTION, lambda f: _config(f, bias="all")),
    "another base": (
        RejectReason.BASE_MISMATCH,
        lambda f: _config(f, base_model_name_or_path="meta-llama/Llama-3-8B"),
    ),
    "another size of base": (
        RejectReason.BASE_MISMATCH,
        lambda f: _config(f, base_model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct"),
    ),
    "another fingerprint": (
        RejectReason.BASE_MISMATCH,
        lambda f: (f / "lorikeet.json").write_text('{"base": {"fingerprint": "other"}}'),
    ),
    # the tensor file
    "empty file": (RejectReason.BAD_TENSOR_FILE, lambda f: _weights(f).write_bytes(b"")),
    "cut short": (
        RejectReason.BAD_TENSOR_FILE,
        lambda f: os.truncate(_weights(f), _weights(f).stat().st_size - 1),
    ),
    "something after the end": (RejectReason.BAD_TENSOR_FILE, lambda f: _weights(f).open("ab").write(b"x")),
    "huge header length": (RejectReason.BAD_TENSOR_FILE, lambda f: _weights(f).write_bytes(b"\xff" * 64)),
    "header over the limit": (
        RejectReason.BAD_TENSOR_FILE,
        lambda f: _raw_header(f, b"{}" + b" " * (1 << 16)),
    ),
    "header is no JSON": (RejectReason.BAD_TENSOR_FILE, lambda f: _raw_header(f, b"x" * 10)),
    "header nests deep": (RejectReason.BAD_TENSOR_FILE, lambda f: _raw_header(f, b'{"a":' + b"[" * 30_000)),
    "header with a key twice": (RejectReason.BAD_TENSOR_FILE, lambda f: _raw_header(f, b'{"a":{},"a":{}}')),
    "header entry without shape": (
        RejectReason.BAD_TENSOR_FILE,
        lambda f: _raw_header(f, b'{"a":{"dtype":"F32"}}'),
    ),
    "metadata that is no text": (
        RejectReason.BAD_TENSOR_FILE,
        lambda f: _raw_header(f, b'{"__metadata__":{"a":1}}'),
    ),
    "negative shape": (
        RejectReason.BAD_TENSOR_FILE,
        lambda f: _header(f, lambda h: h[f"{Q0}.lora_A.weight"].update(shape=[-4, 32])),
    ),
    "shape of floats": (
        RejectReason.BAD_TENSOR_FILE,
        lambda f: _header(f, lambda h: h[f"{Q0}.lora_A.weight"].update(shape=[4.0, 32])),
    ),
    "shape that lies": (
        RejectReason.BAD_TENSOR_FILE,
        lambda f: _header(f, lambda h: h[f"{Q0}.lora_A.weight"].update(shape=[2**40, 2**40])),
    ),
    "offsets swapped": (RejectReason.BAD_TENSOR_FILE, lambda f: _header(f, _swap_offsets)),
    "tensors overlap": (RejectReason.BAD_TENSOR_FILE, lambda f: _header(f, _overlap)),
    "no tensors": (RejectReason.MISSING_KEYS, lambda f: _raw_header(f, b"{}")),
    "float64": (RejectReason.BAD_DTYPE, _cast(torch.float64)),
    "int8": (RejectReason.BAD_DTYPE, _cast(torch.int8)),
    # names
    "a tensor of an unknown module": (
        RejectReason.UNKNOWN_KEYS,
        _rename(f"{Q0}.lora_A.weight", "base_model.model.x.lora_A.weight"),
    ),
    "a layer that the base has not": (
        RejectReason.UNKNOWN_KEYS,
        lambda f: _edit(
            f,
            lambda t: t.update(
                {n.replace("layers.1", "layers.9"): t.pop(n) for n in list(t) if "layers.1" in n}
            ),
        ),
    ),
    "a tensor that is no LoRA": (
        RejectReason.UNKNOWN_KEYS,
        lambda f: _edit(f, lambda t: t.update(extra=torch.ones(1))),
    ),
    "magnitudes without DoRA": (
        RejectReason.UNKNOWN_KEYS,
        lambda f: _edit(f, lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(32)})),
    ),
    "one site in two layouts": (
        RejectReason.UNKNOWN_KEYS,
        lambda f: _edit(
            f, lambda t: t.update({f"{Q0.replace('language_model.', '')}.lora_A.weight": torch.ones(4, 32)})
        ),
    ),
    "a module that is no target": (
        RejectReason.UNKNOWN_KEYS,
        lambda f: _config(f, target_modules=["q_proj"]),
    ),
    "an excluded module": (RejectReason.UNKNOWN_KEYS, lambda f: _config(f, exclude_modules=["v_proj"])),
    "a layer that was not transformed": (
        RejectReason.UNKNOWN_KEYS,
        lambda f: _config(f, layers_to_transform=[0]),
    ),
    "embeddings": (
        RejectReason.UNSUPPORTED_OPTION,
        lambda f: _edit(
            f,
            lambda t: t.update(
                {"base_model.model.model.language_model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}
            ),
        ),
    ),
    "the head": (
        RejectReason.UNSUPPORTED_OPTION,
        lambda f: _edit(f, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)})),
    ),
    "the patch convolution": (
        RejectReason.UNSUPPORTED_OPTION,
        lambda f: _edit(
            f,
            lambda t: t.update(
                {"base_model.model.model.visual.patch_embed.proj.lora_A.weight": torch.ones(4, 3, 2, 14, 14)}
            ),
        ),
    ),
    "A without its B": (
        RejectReason.MISSING_KEYS,
        lambda f: _edit(f, lambda t: t.pop(f"{Q0}.lora_B.weight")),
    ),
    "B without its A": (
        RejectReason.MISSING_KEYS,
        lambda f: _edit(f, lambda t: t.pop(f"{Q0}.lora_A.weight")),
    ),
    "DoRA without magnitudes": (RejectReason.MISSING_KEYS, lambda f: _config(f, use_dora=True)),
    # shapes
    "A of another width": (RejectReason.BAD_SHAPE, _resize("lora_A.weight", 4, 33)),
    "A transposed": (RejectReason.BAD_SHAPE, _resize("lora_A.weight", 32, 4)),
    "A with three dimensions": (RejectReason.BAD_SHAPE, _resize("lora_A.weight", 4, 32, 1)),
    "B of another width": (RejectReason.BAD_SHAPE, _resize("lora_B.weight", 31, 4)),
    "ranks of A and B differ": (RejectReason.BAD_SHAPE, _resize("lora_B.weight", 32, 3)),
    "an empty rank": (RejectReason.BAD_SHAPE, _resize("lora_A.weight", 0, 32)),
    "a rank that the configuration does not give": (RejectReason.BAD_SHAPE, lambda f: _config(f, r=3)),
    "a pattern that the tensors do not follow": (
        RejectReason.BAD_SHAPE,
        lambda f: _config(f, rank_pattern={"q_proj": 2}),
    ),
    "rank over the limit": (RejectReason.RANK_TOO_LARGE, lambda f: make_package(f, SITES, rank=9)),
    # numbers
    "NaN": (RejectReason.NON_FINITE, _fill(float("nan"))),
    "NaN in A": (RejectReason.NON_FINITE, _fill(float("nan"), "lora_A")),
    "infinity": (RejectReason.NON_FINITE, _fill(float("-inf"))),
    "overflow once scaled": (RejectReason.NON_FINITE, _fill(3e38)),
    "B is zero": (RejectReason.NO_EFFECT, lambda f: make_package(f, SITES, zeroed=("layers",))),
    "alpha is zero": (RejectReason.NO_EFFECT, lambda f: _config(f, lora_alpha=0)),
    "A and B meet in no rank": (RejectReason.NO_EFFECT, lambda f: _edit(f, _disjoint)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_refused_with_its_own_reason(case: str, tmp_path: Path) -> None:
    folder = make_package(tmp_path, SITES)
    reason, break_it = BROKEN[case]
    break_it(folder)
    with pytest.raises(AdapterRejected) as refusal:
        check_package(folder, SITES, LIMITS, BASES, base_fingerprint="ours")
    assert refusal.value.reason is reason
    assert len(refusal.value.details) <= 10
    assert len(str(refusal.value)) < 500
    assert str(tmp_path) not in str(refusal.value)


def test_every_reason_but_those_of_other_rooms_has_a_case() -> None:
    elsewhere = {RejectReason.DIGEST_MISMATCH, RejectReason.PROBE_FAILED, RejectReason.PROBE_MISMATCH}
    assert {reason for reason, _ in BROKEN.values()} | elsewhere == set(RejectReason)


def test_a_sound_package_is_reported_as_it_is(tmp_path: Path) -> None:
    folder = make_package(
        tmp_path, SITES, targets=("q_proj", "attn.proj"), dtype=torch.bfloat16, use_rslora=True
    )
    report = check_package(folder, SITES, LIMITS, BASES)
    assert (report.kind, report.rank, report.num_sites) == ("rslora", 4, 3)
    assert report.targets == ("q_proj", "attn.proj")
    assert report.parts == ("language", "vision")
    assert report.num_bytes == 2 * 4 * (2 * (32 + 32) + (24 + 24))
    assert len(report.digest) == len(report.vision_digest) == len(report.language_digest) == 64


def test_a_dora_package_may_have_a_zero_b(tmp_path: Path) -> None:
    """Its magnitudes may act alone; only the model's own weights can tell, so that is the probe's business."""
    folder = make_package(tmp_path, SITES, use_dora=True, zeroed=("layers",))
    assert check_package(folder, SITES, LIMITS, BASES).kind == "dora"


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "unsloth/Qwen2.5-VL-3B-Instruct",
        "unsloth/qwen2.5-vl-3b-instruct-unsloth-bnb-4bit",
        "/data/models/whatever",
        "./out/checkpoint-300",
        "C:\\models\\qwen",
        "my-base",
    ],
)
def test_a_base_s_other_names_and_local_paths_are_accepted(name: str | None, tmp_path: Path) -> None:
    folder = make_package(tmp_path, SITES, base_model_name_or_path=name)
    check_package(folder, SITES, LIMITS, BASES)


@pytest.mark.parametrize(
    "name, is_accepted",
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", True),
        ("me/my-Qwen2.5-VL-tune", True),
        ("meta-llama/Llama-3-8B", False),
    ],
)
def test_a_base_without_hub_name_takes_its_own_family(name: str, is_accepted: bool, tmp_path: Path) -> None:
    folder = make_package(tmp_path, SITES, base_model_name_or_path=name)
    if is_accepted:
        check_package(folder, SITES, LIMITS, ["my-folder"])
        return
    with pytest.raises(AdapterRejected) as refusal:
        check_package(folder, SITES, LIMITS, ["my-folder"])
    assert refusal.value.reason is RejectReason.BASE_MISMATCH


def test_the_same_fingerprint_is_accepted(tmp_path: Path) -> None:
    folder = make_package(tmp_path, SITES)
    (folder / "lorikeet.json").write_text('{"base": {"fingerprint": "ours"}}')
    check_package(folder, SITES, LIMITS, BASES, base_fingerprint="ours")


def test_the_digest_follows_configuration_and_weights_but_not_the_readme(tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return check_package(folder, SITES, LIMITS, BASES).digest

    folder = make_package(tmp_path / "a", SITES)
    first = digest(folder)
    (folder / "README.md").write_text("changed")
    assert digest(folder) == first
    assert digest(make_package(tmp_path / "b", SITES)) == first
    assert digest(make_package(tmp_path / "c", SITES, seed=1)) != first
    assert digest(make_package(tmp_path / "d", SITES, lora_alpha=9)) != first
    (folder / "lorikeet.json").write_text("{}")
    assert digest(folder) != first


def test_links_may_lead_within_the_package_and_the_allowed_folder_but_not_out(tmp_path: Path) -> None:
    folder = make_package(tmp_path / "root" / "package", SITES)
    (folder / "inner").mkdir()
    _weights(folder).rename(folder / "inner" / "blob")
    _weights(folder).symlink_to("inner/blob")
    check_package(folder, SITES, LIMITS, BASES)

    (folder / "inner" / "blob").rename(tmp_path / "root" / "blob")
    _weights(folder).unlink()
    _weights(folder).symlink_to(tmp_path / "root" / "blob")
    with pytest.raises(SourceRejected, match="leads out"):
        check_package(folder, SITES, LIMITS, BASES)
    check_package(folder, SITES, LIMITS, BASES, within=tmp_path / "root")


def test_a_pipe_in_a_package_neither_hangs_nor_passes(tmp_path: Path) -> None:
    folder = make_package(tmp_path, SITES)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(SourceRejected, match="plain file"):
        check_package(folder, SITES, LIMITS, BASES)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        check_package(tmp_path / "nothing", SITES, LIMITS, BASES)


def test_an_evil_pattern_costs_no_time(tmp_path: Path) -> None:
    folder = make_package(tmp_path, SITES, alpha_pattern={"a" * 5000: 3}, target_modules=r"(a+)+$|(x+x+)+y")
    check_package(folder, SITES, LIMITS, BASES)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_bytes_change_a_package_passes_or_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    folder = make_package(tmp_path, SITES)
    path = folder / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, min(len(content) - 1, 1500)))
    content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    path.write_bytes(content)
    with contextlib.suppress(AdapterError):
        check_package(folder, SITES, LIMITS, BASES)
        load_weights(folder, SITES)
