"""What load_base reads, what it makes of it, and what it refuses by name."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from base.attention import LORIKEET_PAGED
from base.config import BaseConfig
from base.errors import BaseNotFound, UnsupportedBase
from base.linear import DequantisedLinear, dequantised_weight, four_bit_names
from base.loader import load_base
from base.model import BaseModel
from base.processor import Message, TextPart
from base.quantization import today_name
from tests.support.checkpoints import key_in, make_checkpoint
from tests.support.oracle import Oracle, load_stock, same_where_certain
from tests.support.paged import generate_greedy

RESPONSE = MagicMock(headers={}, status_code=404)  # what the hub client's errors look at
LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def language_linears(base: BaseModel) -> set[str]:
    return {f"model.language_model.layers.{i}.{leaf}" for i in range(base.spec.num_layers) for leaf in LEAVES}


def greedy(base: BaseModel, num_tokens: int = 8) -> list[int]:
    return generate_greedy(
        base, base.processor.prepare_chat([Message("user", (TextPart("What?"),))]), num_tokens
    )


def edit(folder: Path, **changes: object) -> Path:
    """Change top-level entries of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def pre_quantised(
    source: Path, folder: Path, rename: Callable[[str], str], skip: list[str], *, with_template: bool = True
) -> Path:
    """What publishers of bitsandbytes checkpoints upload: quantised tensors, and a skip list in their own spelling."""
    folder.mkdir()
    stock = load_stock(source)
    stock.save_pretrained(folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = {rename(today_name(name)): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = skip
    (folder / "config.json").write_text(json.dumps(config))
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_exactly_the_language_linears_are_in_four_bits(tiny_folder: Path) -> None:
    base = load_base(BaseConfig(source=str(tiny_folder), cpu_linear="unpacked"))
    assert set(four_bit_names(base.module)) == language_linears(base)
    assert base.module.lm_head.weight.dtype == torch.bfloat16
    assert base.spec.quantization == "nf4"


def test_everything_is_frozen_and_attends_by_plan(tiny: BaseModel) -> None:
    assert not any(parameter.requires_grad for parameter in tiny.module.parameters())
    assert not any(module.training for module in tiny.module.modules())
    assert tiny.module.model.language_model.config._attn_implementation == LORIKEET_PAGED
    assert tiny.module.model.visual.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("tied", [True, False])
def test_both_key_layouts_load_the_same_weights(tmp_path: Path, tied: bool) -> None:
    today = make_checkpoint(tmp_path / "today", tied=tied, seed=1)
    old = make_checkpoint(tmp_path / "old", tied=tied, seed=1, layout="old")
    assert key_in("old", "model.language_model.layers.0.x") == "model.layers.0.x"
    first, second = (load_base(BaseConfig(source=str(folder))) for folder in (today, old))
    theirs = dict(second.module.state_dict())
    ours = dict(first.module.state_dict())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert greedy(first) == greedy(
        second
    )  # positions too: the older configuration spells rope in another way
    assert first.spec.fingerprint != second.spec.fingerprint  # the files differ


@pytest.mark.parametrize(
    "layout, skip",
    [
        ("today", ["model.visual", "lm_head"]),
        ("old", ["visual", "lm_head"]),
        ("old", ["lm_head", "multi_modal_projector", "merger", "modality_projection"]),
    ],
)
def test_pre_quantised_checkpoints_load_as_they_are(
    tmp_path: Path, odd_folder: Path, layout: str, skip: list[str]
) -> None:
    folder = pre_quantised(
        odd_folder, tmp_path / "bnb", lambda name: key_in("old" if layout == "old" else "today", name), skip
    )
    base = load_base(BaseConfig(source=str(folder), cpu_linear="unpacked"))
    assert set(four_bit_names(base.module)) == language_linears(base)
    fresh = load_base(BaseConfig(source=str(odd_folder), cpu_linear="unpacked"))
    for name in four_bit_names(base.module):
        assert torch.equal(
            dequantised_weight(base.module.get_submodule(name)),
            dequantised_weight(fresh.module.get_submodule(name)),
        )
    assert greedy(base) == greedy(fresh)


def test_a_pre_quantised_checkpoint_may_keep_other_layers_in_sixteen_bits(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """As published "dynamic" quantisations do, with their own spelling of which."""
    folder = pre_quantised(
        tiny_folder, tmp_path / "bnb", lambda name: key_in("old", name), ["visual", "model.layers.0.mlp"]
    )
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    plain = load_file(tiny_folder / "model.safetensors")
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.0.mlp.{leaf}.weight"
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
        tensors[name] = plain[name.replace("model.layers", "model.language_model.layers")]
    save_file(tensors, weights, metadata={"format": "pt"})
    base = load_base(BaseConfig(source=str(folder), cpu_linear="unpacked"))
    kept = {name for name in language_linears(base) if ".layers.0.mlp." in name}
    assert set(four_bit_names(base.module)) == language_linears(base) - kept
    assert len(greedy(base)) == 8


def test_a_base_without_quantisation_equals_transformers(tiny_folder: Path) -> None:
    base = load_base(BaseConfig(source=str(tiny_folder), quantization="none"))
    assert not four_bit_names(base.module)
    assert not any(isinstance(module, DequantisedLinear) for module in base.module.modules())
    prompt = base.processor.prepare_chat([Message("user", (TextPart("What?"),))])
    reference = Oracle(tiny_folder, quantized=False).generate(prompt, 8)
    assert same_where_certain(generate_greedy(base, prompt, 8), reference)
    assert base.spec.quantization == "none"


def test_the_pocket_base_loads_by_name() -> None:
    base = load_base(BaseConfig())
    assert base.spec.name == "lorikeet-pocket"
    assert base.spec.revision is None
    assert base.device.type == "cpu" or torch.cuda.is_available()


def test_memory_is_counted_by_part(
    tiny_folder: Path, odd_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lorikeet.base"):
        tied = load_base(BaseConfig(source=str(tiny_folder), cpu_linear="unpacked")).memory_by_part
    assert "base.loaded" in caplog.text
    assert "vision_mib=" in caplog.text
    assert tied["head"] == 0
    assert tied["embeddings"] == 512 * 128 * 2
    num_weights = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 192)
    assert 0.5 * num_weights < tied["language_4bit"] < 0.6 * num_weights + 2 * 4000
    untied = load_base(BaseConfig(source=str(odd_folder), cpu_linear="dequantised")).memory_by_part
    assert untied["head"] == 640 * 448 * 2
    assert untied["language_4bit"] == 0
    assert untied["language"] > 0
    wide = load_base(BaseConfig(source=str(odd_folder), cpu_linear="float32")).memory_by_part
    assert wide["head"] == 640 * 448 * 4
    assert wide["language"] == 2 * untied["language"]
    assert wide["embeddings"] == untied["embeddings"]


def test_the_fingerprint_follows_weights_settings_and_nothing_else(tmp_path: Path) -> None:
    def mark(folder: Path, **settings: object) -> str:
        return load_base(BaseConfig(source=str(folder), **settings)).spec.fingerprint  # type: ignore[arg-type]

    first, same, other = (
        make_checkpoint(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert mark(first) == mark(same)
    assert mark(first) == mark(first, cpu_linear="unpacked")
    assert len({mark(first), mark(other), mark(first, quantization="none")}) == 3
    assert len(mark(first)) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": "qwen2_vl"}, "'qwen2_vl'"),
        ({"model_type": None}, "None"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "not in 4 bits"),
    ],
)
def test_other_bases_are_refused_by_name_before_weights_are_read(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    folder = edit(make_checkpoint(tmp_path / "base"), **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedBase, match=reason):
        load_base(BaseConfig(source=str(folder)))


@pytest.mark.parametrize(
    "text_changes, reason",
    [
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None},
            "sliding",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_attention_that_cannot_be_batched_is_refused(
    tmp_path: Path, text_changes: dict[str, object], reason: str
) -> None:
    folder = make_checkpoint(tmp_path / "base")
    text = json.loads((folder / "config.json").read_text())["text_config"] | text_changes
    edit(folder, text_config={key: value for key, value in text.items() if value is not None})
    with pytest.raises(UnsupportedBase, match=reason):
        load_base(BaseConfig(source=str(folder)))


def test_what_is_not_there_is_said_with_what_to_do(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file.safetensors"
    file.write_bytes(b"")
    unread = make_checkpoint(tmp_path / "unread")
    (unread / "config.json").write_text("{")
    bare = make_checkpoint(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    mute = make_checkpoint(tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    blind = make_checkpoint(tmp_path / "blind")
    (blind / "preprocessor_config.json").unlink()
    table = {
        str(tmp_path / "nowhere"): "check the path",
        str(empty): "config.json",
        str(file): "is a file",
        str(unread): "cannot be read",
        str(bare): "safetensors",
        str(mute): "tokenizer",
        str(blind): "preprocessor_config.json",
        "a/b/c": "check the path",
        "nobody/nothing": "cache",
    }
    for source, reason in table.items():
        with pytest.raises(BaseNotFound, match=reason):
            load_base(BaseConfig(source=source, local_files_only=True))


def snapshot(folder: Path, asked: list[object]) -> Callable[..., str]:
    def download(
        source: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        asked.append((source, revision, "*.safetensors" in allow_patterns, local_files_only))
        return str(folder)

    return download


def test_a_hub_id_is_served_under_its_name_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "models--owner--some--name" / "snapshots" / "0123abcd")
    asked: list[object] = []
    monkeypatch.setattr("base.location.snapshot_download", snapshot(folder, asked))
    base = load_base(BaseConfig(source="owner/some--name", revision="main"))
    assert asked == [("owner/some--name", "main", False, False), ("owner/some--name", "main", True, False)]
    assert (base.spec.name, base.spec.revision) == ("owner/some--name", "0123abcd")
    assert load_base(BaseConfig(source=str(folder))).spec.name == "owner/some--name"


def test_another_hub_model_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edit(make_checkpoint(tmp_path / "base"), model_type="llava")
    asked: list[object] = []
    monkeypatch.setattr("base.location.snapshot_download", snapshot(folder, asked))
    with pytest.raises(UnsupportedBase, match="'llava'"):
        load_base(BaseConfig(source="owner/name"))
    assert asked == [("owner/name", None, False, False)]


@pytest.mark.parametrize(
    "error, reason",
    [
        (GatedRepoError("x", response=RESPONSE), "accept its terms"),
        (RepositoryNotFoundError("x", response=RESPONSE), "no such repository"),
        (RevisionNotFoundError("x", response=RESPONSE), "no revision 'v9'"),
        (HFValidationError("x"), "neither a folder nor a hub id"),
        (ConnectionError("no route"), "no route"),
    ],
)
def test_the_hubs_errors_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("base.location.snapshot_download", fail)
    with pytest.raises(BaseNotFound, match=reason):
        load_base(BaseConfig(source="owner/name", revision="v9"))


def test_lacking_and_broken_weights_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "base")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != name}, weights, metadata={"format": "pt"}
    )
    with pytest.raises(BaseNotFound, match="up_proj"):
        load_base(BaseConfig(source=str(folder)))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseNotFound):
        load_base(BaseConfig(source=str(folder)))


def test_a_chat_template_may_be_kept_anywhere_or_nowhere(tmp_path: Path, tiny: BaseModel) -> None:
    folder = make_checkpoint(tmp_path / "base", seed=3)
    chat = [Message("user", (TextPart("hi"),))]
    expected = tiny.processor.prepare_chat(chat).ids
    (folder / "chat_template.json").unlink()
    assert load_base(BaseConfig(source=str(folder))).processor.prepare_chat(chat).ids == expected
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_base(BaseConfig(source=str(folder))).processor.prepare_chat(chat).ids == expected
    (folder / "chat_template.jinja").write_text(template.replace("helpful", "rude"))
    assert load_base(BaseConfig(source=str(folder))).processor.prepare_chat(chat).ids != expected


@pytest.mark.parametrize("device", ["abacus", "mps", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(tiny_folder: Path, device: str) -> None:
    with pytest.raises(UnsupportedBase, match=f"no device '{device}' here"):
        load_base(BaseConfig(source=str(tiny_folder), device=device))
