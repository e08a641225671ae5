"""Made checkpoints load everywhere, with the bits that were written; adapters fit them and act."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from base.config import BaseConfig
from base.loader import load_base
from bench.floors import read_shape
from bench.shape_adapters import make_adapters
from bench.shape_tokenizer import SPECIAL
from bench.shape_weights import nf4_tensors
from bench.shapes import SHAPES, make_checkpoint
from bench.words import WORDS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(SHAPES["tiny"], tmp_path_factory.mktemp("shapes") / "tiny")


def quant_state_of(linear: Linear4bit) -> QuantState:
    state = linear.weight.quant_state  # type: ignore[attr-defined]
    assert isinstance(state, QuantState)
    return state


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)


def test_the_language_linears_are_in_four_bits_and_nothing_else(
    model: Qwen2_5_VLForConditionalGeneration,
) -> None:
    four_bit = [name for name, child in model.named_modules() if isinstance(child, Linear4bit)]
    assert len(four_bit) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in four_bit)


def test_transformers_reads_the_bits_that_were_written(
    model: Qwen2_5_VLForConditionalGeneration, checkpoint: Path
) -> None:
    name = "model.language_model.layers.1.mlp.up_proj"
    written = load_file(checkpoint / "model-00001.safetensors")
    linear = model.get_submodule(name)
    assert isinstance(linear, Linear4bit)
    assert torch.equal(linear.weight.data.flatten(), written[f"{name}.weight"].flatten())
    weight = dequantize_4bit(linear.weight.data, quant_state_of(linear))
    assert weight.shape == (192, 128)
    assert float(weight.float().pow(2).mean().sqrt()) == pytest.approx(128**-0.5, rel=0.05)


def test_our_loader_reads_the_same_folder(checkpoint: Path) -> None:
    base = load_base(BaseConfig(str(checkpoint), device="cpu"))
    assert base.spec.name


def test_greedy_answers_depend_on_the_prompt(
    model: Qwen2_5_VLForConditionalGeneration, checkpoint: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    answers = set()
    for prompt in ("the people work", "some years come"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=6, do_sample=False)  # type: ignore[misc]
        answers.add(tokenizer.decode(out[0, ids.shape[1] :]))
    assert len(answers) == 2


def test_the_tokenizer_fills_the_vocabulary_and_gives_one_token_a_word(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SHAPES["tiny"].vocab
    text = " ".join(WORDS)
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(WORDS)
    assert tokenizer.decode(ids) == text
    config = json.loads((checkpoint / "config.json").read_text())
    assert tokenizer.token_to_id("<|image_pad|>") == config["image_token_id"]
    singles = {tokenizer.decode([number]) for number in range(256, SHAPES["tiny"].vocab - len(SPECIAL))}
    assert len(singles) == SHAPES["tiny"].vocab - len(SPECIAL) - 256  # every id has a text of its own
    loaded = AutoTokenizer.from_pretrained(checkpoint)
    assert loaded(text).input_ids == ids


@pytest.mark.parametrize("size", [(96, 128), (4864, 896)])
def test_made_bytes_are_what_bitsandbytes_writes(size: tuple[int, int]) -> None:
    made = dict(nf4_tensors("w", *size, torch.Generator().manual_seed(0)))
    own = Linear4bit(size[1], size[0], bias=False, quant_type="nf4", compress_statistics=True)
    own.weight.data = torch.randn(size).bfloat16()
    own = own.to("cpu")
    written = {key.replace("weight", "w", 1): tensor for key, tensor in own.state_dict().items()}
    quantised = quant_state_of(own).as_dict(packed=True)
    written |= {f"w.{key}": tensor for key, tensor in quantised.items()}
    assert {
        key: (tensor.shape, tensor.dtype) for key, tensor in made.items() if "quant_state" not in key
    } == {key: (tensor.shape, tensor.dtype) for key, tensor in written.items() if "quant_state" not in key}
    assert torch.allclose(made["w.quant_map"], written["w.quant_map"])
    assert torch.allclose(made["w.nested_quant_map"], written["w.nested_quant_map"])


def test_weights_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 64"):
        list(nf4_tensors("w", 3, 5, torch.Generator()))


def test_adapters_have_ranks_in_turn_and_act(checkpoint: Path, tmp_path: Path) -> None:
    names = make_adapters(checkpoint, tmp_path, 3, ranks=(4, 8))
    ranks = [json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] for name in names]
    assert ranks == [4, 8, 4]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(model, tmp_path / names[0], adapter_name="first")
        assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2 * 7
        adapted.load_adapter(tmp_path / names[2], "third")
        first = adapted(input_ids=ids).logits
        adapted.set_adapter("third")
        third = adapted(input_ids=ids).logits
    assert not torch.equal(plain, first) and not torch.equal(first, third)


def test_a_set_of_adapters_may_grow(checkpoint: Path, tmp_path: Path) -> None:
    make_adapters(checkpoint, tmp_path, 1, ranks=(4,), targets="qv")
    before = (tmp_path / "adapter-0000" / "adapter_model.safetensors").stat().st_mtime_ns
    assert make_adapters(checkpoint, tmp_path, 2, ranks=(4,), targets="qv") == (
        "adapter-0000",
        "adapter-0001",
    )
    assert (tmp_path / "adapter-0000" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_what_makes_no_adapter_or_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ranks"):
        make_adapters(checkpoint, tmp_path, 1, ranks=(0,))
    with pytest.raises(ValueError, match="there are language"):
        make_adapters(checkpoint, tmp_path, 1, targets="vision")
    with pytest.raises(FileExistsError, match="not empty"):
        make_checkpoint(SHAPES["tiny"], checkpoint)


@pytest.mark.parametrize(
    ("name", "linears", "head_dim"), [("0.5b", 357.9e6, 64), ("3b", 2.775e9, 128), ("7b", 6.525e9, 128)]
)
def test_shapes_are_the_published_ones(name: str, linears: float, head_dim: int, tmp_path: Path) -> None:
    shape = SHAPES[name]
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "intermediate_size": shape.mlp,
                "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
            }
        )
    )  # fmt: skip
    read = read_shape(tmp_path)
    assert read.num_linear_weights == pytest.approx(linears, rel=1e-3)
    assert read.head_dim == head_dim
