"""build_engine: the one place where the engine's parts are made and joined. Memory is taken here and not later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch

from adapters.concatenation import ComposingReader
from adapters.kernel_trial import try_lora
from adapters.layer import attach
from adapters.mover import Mover
from adapters.native_lora import NativeLora
from adapters.ops.site_group import torch_adder
from adapters.ref import AdapterRef
from adapters.residency import Residency
from adapters.room import Room
from adapters.routing import RoutingSet
from adapters.sites import SiteTable, discover_sites
from adapters.slots import SlotBank
from adapters.triton_lora import TritonLora
from adapters.weights import AdapterWeights
from base.attention import DecodeAttention
from base.kernel_check import may_serve
from base.linear import dequantised_weight
from base.model import BaseModel
from base.ops.native_library import native_library
from engine.blocks import BlockPool
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.decode_buffers import DecodeBuffers
from engine.engine import Engine
from engine.executor import Executor
from engine.grammar import GrammarCompiler
from engine.graph_memory import graph_bytes, max_graph_blocks, num_graph_rows
from engine.graphs import DecodeGraphs
from engine.kv import KVCache, kv_bytes_per_token
from engine.lifecycle import Lifecycle
from engine.memory import MemoryPlan, plan_memory
from engine.messages import Outbound, Wake
from engine.native_selection import selection_on
from engine.observer import Observer, SilentObserver
from engine.probe import Probe, probe_blocks
from engine.recorder import CudaRecorder
from engine.runner import Runner
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.status import Picture, StatusBoard
from engine.swaps import AdapterSwaps
from engine.tiling import CPU_TILE, Tiling
from engine.transport import ThreadTransport
from engine.vision_cache import VisionCache
from engine.workers import begin_thread

logger = logging.getLogger("lorikeet.engine")


class PackageSource(Protocol):
    """Who reads registered versions: the registry, or a reader of its store."""

    def load(self, ref: AdapterRef) -> AdapterWeights: ...


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A warm engine whose loop nobody runs yet."""

    engine: Engine
    board: StatusBoard
    grammars: GrammarCompiler
    memory: MemoryPlan
    max_model_len: int
    num_blocks: int
    kernels: Mapping[str, str]
    """Whose kernels compute what; empty where there is no choice."""
    close: Callable[[], None]
    """Once the loop has ended."""


def build_engine(
    base: BaseModel,
    source: PackageSource,
    config: EngineConfig,
    observer: Observer | None = None,
    num_threads: int | None = None,
) -> EngineClient:
    """An engine on a thread of this process, and its client.

    Mutates ``base``: its linears are wrapped. One engine a base. ``num_threads``: the processors that its thread
    computes with; None leaves it to torch. Raises as ``build_parts``.
    """
    inbound: list[EngineClient] = []
    parts = build_parts(base, source, config, observer or SilentObserver(), lambda m: inbound[0].deliver(m))
    client = EngineClient(config, parts.max_model_len, base.processor, parts.memory)
    inbound.append(client)
    thread = begin_thread(parts.engine.run, "lorikeet-engine", num_threads)
    client.connect(ThreadTransport(parts.engine, thread, parts.board, parts.grammars, parts.close))
    return client


def build_parts(
    base: BaseModel,
    source: PackageSource,
    config: EngineConfig,
    observer: Observer,
    deliver: Callable[[Sequence[Outbound]], None],
) -> EngineParts:
    """Attach the adapter layers to the base, take the KV memory, and warm up. ``deliver`` is called in the loop.

    Raises ValueError where the memory cannot hold it, and KernelRefused as ``may_serve``.
    """
    sites = discover_sites(base.module)
    num_probe_blocks = probe_blocks(base, config.block_size)
    attention = graph_attention(base, config)
    for_graphs = 0 if attention is None else graph_bytes(config, base.spec, sites, base.dtype.itemsize)
    plan = plan_memory(config, base, sites, _slot_dtype(base), num_probe_blocks, for_graphs)
    _log_plan(plan)
    kernels = _kernels(base, sites, config)
    bank, routing, lora = _attach_adapters(base, sites, config, kernels.get("adapters", "torch"))
    num_blocks = plan.kv_bytes // kv_bytes_per_token(base.spec, base.dtype) // config.block_size
    max_model_len = _max_model_len(base, config, num_blocks)
    vision_cache = VisionCache(config.vision_cache_bytes)
    scratch_block = num_blocks + num_probe_blocks  # of recorded decodes alone
    cache = KVCache(
        base.spec, scratch_block + (attention is not None), config.block_size, base.dtype, base.device
    )
    tiling = _tiling(base, config)
    runner = Runner(base, routing, cache, vision_cache, tiling)
    probe = Probe(base, runner, vision_cache, num_blocks, config.block_size)
    residency = Residency(config.num_slots, Room(config.device_adapter_bytes))
    pool = BlockPool(num_blocks, config.block_size)
    scheduler = Scheduler(_paced(config, base), pool, residency, vision_cache, tiling)
    grammars = GrammarCompiler(base.processor.tokenizer, base.spec.eos_token_ids, base.spec.vocab_size)
    mover = Mover(
        bank, ComposingReader(source.load), config.host_adapter_bytes, lambda: engine.inbox.put(Wake())
    )
    swaps = AdapterSwaps(residency, mover, bank, probe, observer)
    board = StatusBoard(num_blocks, Picture({}, {}, 0, 0, swaps.picture(), 0, 0), kernels)
    vocab_size = base.spec.vocab_size
    lifecycle = Lifecycle(residency, observer, grammars, base.spec.eos_token_ids, vocab_size, max_model_len)
    executor = Executor(runner, Sampler(vocab_size, selection_on(base.device)), observer)
    engine = Engine(config, scheduler, executor, swaps, lifecycle, board, observer, deliver)
    probe.warm_up()
    if attention is not None:
        buffers = graph_buffers(base, config, max_model_len, scratch_block)
        graphs = DecodeGraphs(base, attention, cache, routing.language, lora, buffers)
        graphs.record(CudaRecorder(base.device))
        runner.replay_with(graphs)
    logger.info("engine.ready kv_tokens=%d max_model_len=%d", num_blocks * config.block_size, max_model_len)
    return EngineParts(engine, board, grammars, plan, max_model_len, num_blocks, kernels, mover.close)


def _slot_dtype(base: BaseModel) -> torch.dtype:
    """PEFT computes LoRA in fp32 beside a 16-bit base: on a CPU we do the same; on a GPU fp32 would halve the speed."""
    return torch.float32 if base.device.type == "cpu" else base.dtype


def _kernels(base: BaseModel, sites: SiteTable, config: EngineConfig) -> dict[str, str]:
    """The base's, and who computes adapters; empty where there is no choice. Raises KernelRefused."""
    if base.device.type not in ("cpu", "cuda"):
        return dict(base.kernels)
    is_cpu = base.device.type == "cpu"
    kind, choice = ("native", config.cpu_adapters) if is_cpu else ("triton", base.config.cuda_kernels)
    dtypes = (_slot_dtype(base), base.dtype)
    is_served = may_serve(
        "adapters",
        lambda: try_lora(
            base.module, sites, config.max_rank, *dtypes, base.device, _LORA[kind], keeps_halves=is_cpu
        ),
        choice,
        base.device,
    )
    return {**base.kernels, "adapters": kind if is_served else "torch"}


def _native_lora(sites: SiteTable, bank: SlotBank) -> NativeLora:
    """Raises NativeMissing."""
    return NativeLora(sites, bank, native_library())


_LORA: Final[Mapping[str, Callable[[SiteTable, SlotBank], NativeLora | TritonLora]]] = {
    "native": _native_lora,
    "triton": TritonLora,
}
"""Who computes adapters other than torch, by the name in ``kernels``."""


def graph_attention(base: BaseModel, config: EngineConfig) -> DecodeAttention | None:
    """What decodes are recorded over; None where they are not.

    Raises ValueError where they must be and cannot: on a device without CUDA graphs, or over attention that lives in
    Python's numbers.
    """
    if config.cuda_graphs == "off":
        return None
    attention = base.decoder.attention
    if base.device.type == "cuda" and isinstance(attention, DecodeAttention):
        return attention
    if config.cuda_graphs == "on":
        raise ValueError(
            f"cuda_graphs is on, and {type(attention).__name__} on {base.device} cannot be recorded: set it to auto"
        )
    return None


def graph_buffers(
    base: BaseModel, config: EngineConfig, max_model_len: int, scratch_block: int
) -> DecodeBuffers:
    return DecodeBuffers(
        num_graph_rows(config),
        max_graph_blocks(config, max_model_len),
        config.block_size,
        scratch_block,
        base.spec.vocab_size,
        base.device,
    )


def _attach_adapters(
    base: BaseModel, sites: SiteTable, config: EngineConfig, kernel: str
) -> tuple[SlotBank, RoutingSet, TritonLora | None]:
    """kernel: a key of ``_LORA``, or torch. The last returned is what recorded steps must prepare; None without."""
    sizes = (config.num_slots, config.max_rank)
    bank = SlotBank(sites, *sizes, _slot_dtype(base), base.device, keeps_halves=kernel == "native")
    routing = RoutingSet.on(base.device)
    lora = _LORA[kernel](sites, bank) if kernel in _LORA else None
    attach(base.module, sites, bank, routing, dequantised_weight, torch_adder if lora is None else lora.adder)
    return bank, routing, lora if isinstance(lora, TritonLora) else None


def _log_plan(plan: MemoryPlan) -> None:
    parts = " ".join(f"{name.replace(' ', '_')}_mib={size / 2**20:.1f}" for name, size in plan.parts.items())
    logger.info("engine.memory budget_mib=%.0f %s", (plan.budget_bytes or 0) / 2**20, parts)


def _tiling(base: BaseModel, config: EngineConfig) -> Tiling:
    """On a CPU exact, in tiles of whole blocks; elsewhere prompts are cut at blocks and attended whole."""
    if base.device.type == "cpu":
        return Tiling(max(CPU_TILE, config.block_size), is_exact=True)
    return Tiling(config.block_size, is_exact=False)


def _paced(config: EngineConfig, base: BaseModel) -> EngineConfig:
    """With the prompts' share of a step beside decodes, where it was left open: a CPU's time goes with the rows."""
    if config.prefill_beside_decodes is not None:
        return config
    is_cpu = base.device.type == "cpu"
    return replace(config, prefill_beside_decodes=CPU_TILE if is_cpu else config.prefill_chunk)


def _max_model_len(base: BaseModel, config: EngineConfig, num_blocks: int) -> int:
    """What is asked for, what the base can do, and what the cache holds: the least of the three."""
    asked = config.max_model_len or base.spec.max_positions
    return min(asked, base.spec.max_positions, num_blocks * config.block_size)
