"""Lives of an engine: scripts of mixed requests, and what an engine over the pocket base says when it lives them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.ref import BASE, AdapterRef
from adapters.registry import Registry
from adapters.sites import discover_sites
from adapters.validation import Limits
from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from base.pocket import CHECKPOINT
from base.prompt import Message, TextPart
from engine.config import EngineConfig
from engine.messages import Abort, Inbound, LoadAdapter, Submit, UnloadAdapter
from engine.request import GenerationRequest
from engine.sampling import SamplingParams
from tests.support.late_device import LateDevice
from tests.support.stepping import Life, Stepped, now, plain, stepped

SAMPLES = Path(__file__).resolve().parents[2] / "adapters" / "samples"
ADAPTERS = ("french", "json", "patterns")
CONFIG = EngineConfig(num_slots=2, max_model_len=128, kv_bytes=4 << 20, max_running=14)
OFF = replace(CONFIG, step_ahead="off")
QUESTIONS = ("Hello!", "Who are you?", "What is the capital of France?", "Thanks!", "Count to ten, please.")
Scripted = dict[int, list[Inbound]]
Params = dict[str, Any]


class Bench:
    """A base, adapters, and requests to them."""

    def __init__(self, state: Path, device: str = "cpu") -> None:
        """On a CPU decodes are launched on a LateDevice, elsewhere as the engine launches them."""
        self.base: BaseModel = load_base(BaseConfig(source=str(CHECKPOINT), device=device))
        self.registry = Registry(state, discover_sites(self.base.module), Limits(), [self.base.spec.name])
        for name in ADAPTERS:
            self.registry.register(name, SAMPLES / name)
        self._prompts = {
            text: self.base.processor.prepare_chat([Message("user", (TextPart(text),))]) for text in QUESTIONS
        }

    def ref(self, name: str) -> AdapterRef:
        return self.registry.resolve(name)

    def submit(self, name: str, text: str = "Hello!", adapter: str = "", **params: Any) -> Submit:
        settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **params}
        sampling = SamplingParams(**settings)
        ref = self.ref(adapter) if adapter else BASE
        return Submit(GenerationRequest(name, self._prompts[text], ref, sampling, now()))

    def live(
        self,
        script: Scripted,
        config: EngineConfig = CONFIG,
        *,
        is_between: bool = False,
        device: dict[str, dict[int, Exception]] | None = None,
        is_sound: bool = True,
    ) -> Life:
        """``device``: faults and refusals. ``is_sound``: the device must find nothing that was not its own."""
        with stepped(self.base, self.registry, config) as made:
            late = LateDevice.under(made.engine) if self.base.device.type == "cpu" else None
            for field, values in (device or {}).items():
                setattr(late, field, values)
            life = made.live(self._answering(script, made), is_between=is_between)
            assert life.blocks_used == 0
            assert not made.engine._swaps.picture().slots[0].num_requests
            assert late is None or (not late.violations) == is_sound, late.violations[:3]
            assert (life.num_ahead > 0) == (config.step_ahead == "auto")
        return life

    @staticmethod
    def _answering(script: Scripted, made: Stepped) -> Scripted:
        """Loads and unloads tell this engine's life what came of them."""

        def own(message: Inbound) -> Inbound:
            if not isinstance(message, LoadAdapter | UnloadAdapter):
                return message
            return replace(message, reply=lambda report: made.note(*_report(report)))

        return {step: [own(message) for message in messages] for step, messages in script.items()}


def _report(report: object) -> tuple[object, ...]:
    return (type(report).__name__, str(report)) if isinstance(report, Exception) else plain(report)


def life_of_a_server(bench: Bench, seed: int) -> Scripted:
    """Newcomers, stops, aborts, swaps, loads and unloads, drawn by ``seed``."""
    draw = random.Random(seed)
    script: Scripted = {0: []}
    for number in range(14):
        step = draw.randrange(90) if number else 0
        name, adapter = f"r{number}", draw.choice(["", "", *ADAPTERS])
        params: Params = {"max_tokens": draw.randrange(1, 34)}
        if draw.random() < 0.4:
            params |= {"ignore_eos": False, "stop_token_ids": tuple(draw.sample(range(300), 60))}
        if draw.random() < 0.3:
            params |= {"temperature": 1.0, "seed": number}
        if draw.random() < 0.15:
            params |= {"logprobs": 1, "max_tokens": 4}
        script.setdefault(step, []).append(bench.submit(name, draw.choice(QUESTIONS), adapter, **params))
        if draw.random() < 0.3:
            reason = draw.choice(["abort", "stop"])
            script.setdefault(step + draw.randrange(1, 20), []).append(Abort(name, reason))  # type: ignore[arg-type]
    for _ in range(4):
        ref = bench.ref(draw.choice(ADAPTERS))
        acts: list[Inbound] = [
            UnloadAdapter(ref, timeout_s=60.0, reply=lambda report: None),
            LoadAdapter(ref, pin=False, reply=lambda report: None),
        ]
        script.setdefault(draw.randrange(90), []).append(draw.choice(acts))
    return script


def tokens_of(life: Life, request_id: str) -> list[int]:
    return [token for told in life.of(request_id) if told[0] == "Tokens" for token in told[2]]  # type: ignore[attr-defined]
