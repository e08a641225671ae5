"""The fields of ``adapter_config.json``: which are honoured, which cannot matter, and which are refused and why.

Owns one table over every field of PEFT's LoraConfig (0.19 to 0.21) and of its base classes. A field that is in no
group is refused unless its value is empty, so that an option of a later PEFT can never be ignored in silence. A test
walks the installed PEFT's fields and fails when one is in no group.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.errors import AdapterRejected, RejectReason

HONOURED = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
    }
)

WITHOUT_EFFECT = frozenset(
    {
        # what the file is, not what it computes
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "revision",
        "runtime_config",
        # training only
        "lora_dropout",
        "lorap_lr_ratio",
        "lorap_emb_lr",
        # read only together with an option that is refused, or with an initialisation that leaves the base alone
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
    }
)

REFUSED: Mapping[str, str] = {
    "bias": "it changes the base's own biases, which all adapters share; retrain with bias='none'",
    "modules_to_save": "it replaces whole modules of the shared base; retrain with LoRA on linears only",
    "lora_bias": "biases of LoRA layers are not served; retrain with lora_bias=false",
    "fan_in_fan_out": "the base's linears store [out, in]; export the adapter with fan_in_fan_out=false",
    "trainable_token_indices": "it changes the shared embeddings; retrain without it",
    "target_parameters": "only linear modules carry adapters; use target_modules",
    "layer_replication": "it changes the base's depth, which all adapters share; retrain without it",
    "alora_invocation_tokens": "activated LoRA is not served; retrain as plain LoRA",
    "arrow_config": "Arrow routing is not served; register its task adapters one by one",
    "use_qalora": "QALoRA is not served; retrain as plain LoRA",
    "use_bdlora": "block-diagonal LoRA is not served; expand it to plain LoRA",
    "velora_config": "VeLoRA stores tensors that plain LoRA has not; export it as plain LoRA",
    "monteclora_config": "MonteCLoRA is not served; retrain as plain LoRA",
    "kasa_config": "KaSA truncates the shared base's weights; retrain as plain LoRA",
    "megatron_config": "Megatron's parallel linears are not served; export the adapter for PEFT",
}

_NEUTRAL: Mapping[str, tuple[object, ...]] = {"bias": ("none",)}
"""Values, beside the empty ones, at which a refused field changes nothing."""

PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations, beside true and false, that set A and B and leave the base's weights alone (PEFT's
``LoraLayer.update_layer``), so that the saved adapter is plain LoRA."""


def check_options(config: Mapping[str, object]) -> None:
    """Raise AdapterRejected (unsupported_option) if any field would change the result in a way that is not served."""
    for field, value in config.items():
        if field in HONOURED or field in WITHOUT_EFFECT or _is_neutral(field, value):
            continue
        why = REFUSED.get(
            field, "this server does not know the option; set it to null if the adapter does not need it"
        )
        raise AdapterRejected(
            RejectReason.UNSUPPORTED_OPTION,
            f"adapter_config.json sets {_short(field)} to {_short(value)}: {why}",
            (_short(field),),
        )
    _check_init(config.get("init_lora_weights", True))


def _check_init(init: object) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in PLAIN_INITS):
        return
    raise AdapterRejected(
        RejectReason.UNSUPPORTED_OPTION,
        f"adapter_config.json sets 'init_lora_weights' to {_short(init)}, an initialisation that changed the base's "
        "weights before training; convert it to plain LoRA (PEFT: save_pretrained with "
        "path_initial_model_for_weight_conversion)",
        ("'init_lora_weights'",),
    )


def _is_neutral(field: str, value: object) -> bool:
    return value is None or value is False or value in _NEUTRAL.get(field, ()) or value in ("", [], {})


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
