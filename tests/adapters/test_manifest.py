from __future__ import annotations

import dataclasses
import json

import pytest
from peft import LoraConfig

from adapters.errors import AdapterRejected, RejectReason
from adapters.keys import Role, TensorKey, parse_key
from adapters.manifest import parse_manifest
from adapters.options import HONOURED, REFUSED, WITHOUT_EFFECT
from adapters.strict_json import MAX_DEPTH

Q0 = TensorKey("model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj", Role.A)


def _parse(**fields: object) -> object:
    return parse_manifest(json.dumps({"peft_type": "LORA", **fields}).encode())


def test_every_field_of_the_installed_peft_is_in_one_group() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - HONOURED - WITHOUT_EFFECT - REFUSED.keys() == set()
    assert HONOURED & WITHOUT_EFFECT == HONOURED & REFUSED.keys() == WITHOUT_EFFECT & REFUSED.keys() == set()


def test_peft_s_own_defaults_are_accepted() -> None:
    defaults = LoraConfig().to_dict()
    assert parse_manifest(json.dumps({**defaults, "peft_type": "LORA"}).encode()).kind == "lora"


@pytest.mark.parametrize(
    "field, value",
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["embed_tokens"]),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [0]}),
        ("target_parameters", ["experts.gate"]),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"top_k": 3}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("velora_config", {"num_groups": 64}),
        ("monteclora_config", {"num_samples": 8}),
        ("kasa_config", {"beta": 1e-4}),
        ("megatron_config", {"x": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "PiSSA"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "something_new"),
        ("an_option_of_a_later_peft", True),
        ("an_option_of_a_later_peft", 0.5),
        ("rank_pattern", {"layers.[0-9]+.q_proj": 4}),
        ("alpha_pattern", {"(q|v)_proj": 4}),
        ("alpha_pattern", {".*q_proj": 4}),
        ("alpha_pattern", {"": 4}),
        ("rank_pattern", {"(a+)+$": 4}),
    ],
)
def test_an_option_that_would_change_the_result_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(AdapterRejected, match=field) as refusal:
        _parse(**{field: value})
    assert refusal.value.reason is RejectReason.UNSUPPORTED_OPTION


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False},
        {"init_lora_weights": None},
        {"loftq_config": {"loftq_bits": 4}},
        {"lora_dropout": 0.3, "inference_mode": False, "task_type": "CAUSAL_LM"},
        {"auto_mapping": {"unsloth_fixed": True}},
        {"an_option_of_a_later_peft": None, "another": False, "third": {}, "fourth": []},
        {"modules_to_save": []},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
    ],
)
def test_what_cannot_matter_is_accepted(fields: dict[str, object]) -> None:
    _parse(**fields)


@pytest.mark.parametrize(
    "kind", ["IA3", "LOHA", "LOKR", "ADALORA", "VERA", "PREFIX_TUNING", "XLORA", "lora", 7]
)
def test_another_kind_is_refused_by_its_name(kind: object) -> None:
    with pytest.raises(AdapterRejected, match=str(kind)) as refusal:
        _parse(peft_type=kind)
    assert refusal.value.reason is RejectReason.UNSUPPORTED_KIND


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "{}",
        '{"peft_type": "LORA", "r": 8, "r": 16}',
        '{"peft_type": "LORA", "lora_alpha": NaN}',
        '{"peft_type": "LORA", "lora_alpha": 1e999}',
        '{"peft_type": "LORA", "lora_alpha": "16"}',
        '{"peft_type": "LORA", "lora_alpha": true}',
        '{"peft_type": "LORA", "r": 0}',
        '{"peft_type": "LORA", "r": -1}',
        '{"peft_type": "LORA", "r": 8.5}',
        '{"peft_type": "LORA", "r": true}',
        '{"peft_type": "LORA", "r": null}',
        '{"peft_type": "LORA", "use_dora": "yes"}',
        '{"peft_type": "LORA", "rank_pattern": [1]}',
        '{"peft_type": "LORA", "rank_pattern": {"q_proj": 0}}',
        '{"peft_type": "LORA", "alpha_pattern": {"q_proj": null}}',
        '{"peft_type": "LORA", "target_modules": [1]}',
        '{"peft_type": "LORA", "layers_to_transform": ["1"]}',
        '{"peft_type": "LORA", "base_model_name_or_path": 7}',
        '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}",
        '{"peft_type": "LORA", "auto_mapping": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}",
        '{"peft_type": "LORA", "auto_mapping": ' + "[" * 100_000,
        "\ufeff{}",
    ],
)
def test_a_malformed_configuration_is_refused_as_such(text: str) -> None:
    with pytest.raises(AdapterRejected) as refusal:
        parse_manifest(text.encode())
    assert refusal.value.reason is RejectReason.BAD_CONFIG
    assert len(str(refusal.value)) < 400


def test_a_configuration_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(AdapterRejected) as refusal:
        parse_manifest(b"\xff\xfe{\x00}\x00")
    assert refusal.value.reason is RejectReason.BAD_CONFIG


def test_brackets_inside_strings_are_not_depth() -> None:
    _parse(auto_mapping={"note": "[" * 100 + '\\"' + "{" * 100})


@pytest.mark.parametrize(
    "pattern, is_named",
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn.q_proj", True),
        ("layers.0.self_attn.q_proj", True),
        ("0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        ("^model.layers.0.self_attn.q_proj", True),
        ("^model.language_model.layers.0.self_attn.q_proj", True),
        ("^model.layers.0.self_attn.q_proj$", True),
        ("^layers.0.self_attn.q_proj", False),
        ("^self_attn.q_proj", False),
        (r"layers\.0\.self_attn\.q_proj", True),
        ("q_proj$", True),
        ("layers.1.self_attn.q_proj", False),
        ("10.self_attn.q_proj", False),
    ],
)
def test_patterns_name_modules_by_whole_segments_from_the_end(pattern: str, is_named: bool) -> None:
    manifest = parse_manifest(
        json.dumps({"peft_type": "LORA", "r": 8, "rank_pattern": {pattern: 2}}).encode()
    )
    assert manifest.rank_of(Q0) == (2 if is_named else 8)


def test_scale_follows_kind_and_pattern() -> None:
    plain = parse_manifest(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 2}}')
    assert plain.scale_of(Q0, 4) == 0.5
    stable = parse_manifest(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": true}')
    assert stable.scale_of(Q0, 4) == 4.0


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.self_attn.q_proj",
        "lora_A.weight",
        "model.language_model.layers.0.self_attn.q_proj.lora_A.other.weight",
        "model.language_model.layers.0.self_attn.q_proj.lora_A",
        "model.language_model.layers.0.self_attn.q_proj.lora_A.weight.weight",
        "model.embed_tokens.lora_embedding_A",
        "",
    ],
)
def test_names_that_are_no_lora_tensor_of_a_linear_are_told_apart(name: str) -> None:
    key = parse_key(name)
    assert key is None or not key.site.startswith("model.language_model.layers.0.self_attn.q_proj")
