"""load_base: from what the operator asked for to a resident, frozen model.

Owns: the order of loading, and the checks that what was loaded is what was meant: the exact set of 4-bit modules, no
weight missing, nothing trainable. Place in a request's way: none; once, at start.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Final, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from base.attention import LORIKEET_PAGED, register_attention
from base.checkpoint import Checkpoint, open_checkpoint
from base.config import BaseConfig
from base.cuda_attention import Heads, choose_attention
from base.cuda_linear import settle_cuda_linears
from base.decoder import Parts
from base.errors import BaseNotFound, UnsupportedBase
from base.fingerprint import fingerprint
from base.linear import four_bit_names, settle_cpu_linears
from base.memory import memory_by_part
from base.model import BaseModel
from base.native_parts import native_parts
from base.processing import load_processor
from base.processor import PatchSizes, Processor, TokenIds
from base.quantization import QuantizationPlan, plan_quantization
from base.spec import BaseSpec
from base.torch_attention import TorchAttention

logger = logging.getLogger("lorikeet.base")

CPU: Final = torch.device("cpu")


def load_base(config: BaseConfig) -> BaseModel:
    """Load, quantise and check the base. Takes seconds to minutes; logs the memory that each part takes.

    Raises BaseNotFound when it cannot be read, UnsupportedBase when it is read but cannot be served, KernelRefused when
    ``config`` insists on a kernel that does not serve here.
    """
    with _quiet():
        return _load(config)


def open_processor(config: BaseConfig) -> Processor:
    """The base's processor without its weights: what checks data before a model is loaded. Raises as ``load_base``."""
    return _processor(open_checkpoint(config), config)


def _processor(checkpoint: Checkpoint, config: BaseConfig) -> Processor:
    patches = PatchSizes(checkpoint.patch_size, checkpoint.vision.spatial_merge_size)
    return load_processor(checkpoint.folder, _token_ids(checkpoint), patches, config)


def _load(config: BaseConfig) -> BaseModel:
    started = time.monotonic()
    checkpoint = open_checkpoint(config)
    device = _device(config)
    ids = _token_ids(checkpoint)
    processor = _processor(checkpoint, config)
    plan = plan_quantization(checkpoint, config)
    module = _load_module(checkpoint, config, plan, device)
    _check_four_bit(module, plan, config.source)
    spec = _spec(checkpoint, config, plan, ids)
    parts, kernels = _settle(module, spec, config, device)
    module.eval().requires_grad_(False)
    memory = memory_by_part(module)
    _log(spec, memory, device, time.monotonic() - started)
    return BaseModel(module, spec, processor, config, memory, parts, kernels)


def _settle(
    module: Qwen2_5_VLForConditionalGeneration, spec: BaseSpec, config: BaseConfig, device: torch.device
) -> tuple[Parts, dict[str, str]]:
    """Fix how linears, and what lies between, compute on this device; whose kernels, where there was a choice."""
    if device.type == "cpu" and settle_cpu_linears(module, config.cpu_linear) == "native":
        return native_parts(spec), {}
    if device.type != "cuda":
        return Parts(TorchAttention()), {}
    linear = settle_cuda_linears(module.model.language_model, config.cuda_kernels, device)
    heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    attention, kernels = choose_attention(heads, module.dtype, config.cuda_kernels, device)
    return Parts(attention), {"linear": linear, **kernels}


def _load_module(
    checkpoint: Checkpoint, config: BaseConfig, plan: QuantizationPlan, device: torch.device
) -> Qwen2_5_VLForConditionalGeneration:
    """Weights through transformers, which knows both key layouts; with our attention for the language."""
    register_attention()
    if plan.stored is not None:
        checkpoint.config.quantization_config = plan.stored
    try:
        loaded: object = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype=getattr(torch, config.dtype),
            device_map={"": device},
            quantization_config=plan.on_the_fly,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BaseNotFound(config.source, f"its weights cannot be loaded ({error})") from error
    module, report = cast("tuple[Qwen2_5_VLForConditionalGeneration, dict[str, Iterable[object]]]", loaded)
    missing = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind])
    if missing:
        raise BaseNotFound(
            config.source, f"its weights lack or misshape {len(missing)} tensors, such as {missing[0]}"
        )
    module.model.language_model.config._attn_implementation = LORIKEET_PAGED
    return module


def _check_four_bit(module: nn.Module, plan: QuantizationPlan, source: str) -> None:
    """The set of 4-bit modules is the planned one, to the name: transformers' skip lists fail silently."""
    found = frozenset(four_bit_names(module))
    if found != plan.four_bit_names:
        extra, lacking = sorted(found - plan.four_bit_names), sorted(plan.four_bit_names - found)
        raise UnsupportedBase(
            source,
            f"after loading {len(found)} modules are in 4 bits instead of {len(plan.four_bit_names)}"
            f" (unplanned: {extra[:3]}, left out: {lacking[:3]}): this version of transformers is not supported",
        )


def _device(config: BaseConfig) -> torch.device:
    """Raises UnsupportedBase for one that is not here."""
    if config.device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise _no_device(config) from error
    num_gpus = torch.cuda.device_count()
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < num_gpus):
        return device
    raise _no_device(config)


def _no_device(config: BaseConfig) -> UnsupportedBase:
    found = f"cpu and {torch.cuda.device_count()} CUDA devices"
    return UnsupportedBase(config.source, f"there is no device {config.device!r} here: torch sees {found}")


def _token_ids(checkpoint: Checkpoint) -> TokenIds:
    return TokenIds(
        image=checkpoint.config.image_token_id,
        video=checkpoint.config.video_token_id,
        pad=checkpoint.pad_token_id,
        eos=checkpoint.eos_token_ids,
        vocab_size=checkpoint.text.vocab_size,
    )


def _spec(checkpoint: Checkpoint, config: BaseConfig, plan: QuantizationPlan, ids: TokenIds) -> BaseSpec:
    text = checkpoint.text
    return BaseSpec(
        name=checkpoint.name,
        revision=checkpoint.revision,
        fingerprint=fingerprint(checkpoint, config),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads or text.num_attention_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        max_positions=text.max_position_embeddings,
        eos_token_ids=ids.eos,
        pad_token_id=ids.pad,
        image_token_id=ids.image,
        merge_size=checkpoint.vision.spatial_merge_size,
        patch_size=checkpoint.patch_size,
        dtype=config.dtype,
        quantization=plan.kind,
    )


def _log(spec: BaseSpec, memory: dict[str, int], device: torch.device, seconds: float) -> None:
    parts = " ".join(f"{part}_mib={num_bytes / 2**20:.1f}" for part, num_bytes in memory.items())
    logger.info(
        "base.loaded name=%s device=%s quantization=%s dtype=%s fingerprint=%s took_s=%.1f %s",
        spec.name, device, spec.quantization, spec.dtype, spec.fingerprint[:12], seconds, parts,
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes, which say nothing that our checks do not."""
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
