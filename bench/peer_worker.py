"""A worker process: transformers and PEFT in the ways that people serve adapters with them, call after call.

Reads one trace a line from standard input, writes one run a line to standard output; the first line says what was
loaded. Text alone: it has no picture processor. Run as ``python -m bench.peer_worker``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, BatchEncoding, GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from bench.load import Run
from bench.peers import PeerKind, PeerWeights, trace_from_json
from bench.provenance import versions
from bench.streamed import Streamed
from bench.trace import Call, Trace


class Clock(BaseStreamer):
    """When each step's tokens came; the prompt itself comes first and is not counted."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self.times.append(time.monotonic())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing more comes."""


class Worker:
    """A model, loaded, and the four ways to run calls on it."""

    def __init__(
        self,
        kind: PeerKind,
        checkpoint: Path,
        root: Path,
        device: str,
        names: Sequence[str],
        weights: PeerWeights = PeerWeights.SHIPPED,
    ) -> None:
        where = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        base = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.bfloat16, device_map=where
        )
        if weights is not PeerWeights.SHIPPED:
            base = _dequantised(base, weights)
        base.train(False)
        base.generation_config.eos_token_id = None  # lengths are exact, as everywhere in the bench
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
        self._kind = kind
        self._names = names
        self._device = where
        self._model: Any = base  # a PeftModel below; generate has no type of its own in both
        if kind is not PeerKind.GENERATE:
            self._model = _with_adapters(base, root, names)

    def facts(self) -> dict[str, object]:
        return {"versions": versions(), "device": self._device, "num_threads": torch.get_num_threads()}

    @torch.inference_mode()
    def run(self, trace: Trace) -> Run:
        """Raises ValueError for calls with pictures."""
        if any(call.picture or call.fan_out > 1 for call in trace.calls):
            raise ValueError("this peer takes text alone, one adapter a call")
        width = (trace.num_streams or 8) if self._kind is PeerKind.ADAPTER_NAMES else 1
        begin_s = time.monotonic()
        ended: list[Streamed] = []
        for calls in _batches(trace, width, begin_s):
            sent_s = [
                _sent_s(trace, place, begin_s, ended) for place in range(len(ended), len(ended) + len(calls))
            ]
            ended += self._answer(calls, sent_s, None if trace.num_streams else begin_s)
        return Run(tuple(ended), max(streamed.end_s for streamed in ended) - begin_s)

    def _answer(
        self, calls: Sequence[Call], sent_s: Sequence[float], due_from_s: float | None
    ) -> list[Streamed]:
        clock = Clock()
        inputs = self._inputs(calls)
        out = self._how(calls)(inputs, max(call.num_tokens for call in calls), clock)
        answers = out[:, inputs["input_ids"].shape[1] :].tolist()
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            self._streamed(call, sent, clock, answer, prompt, due_from_s)
            for call, sent, answer, prompt in zip(calls, sent_s, answers, prompts, strict=True)
        ]

    def _inputs(self, calls: Sequence[Call]) -> BatchEncoding:
        texts = [
            self._tokenizer.apply_chat_template(_messages(call), tokenize=False, add_generation_prompt=True)
            for call in calls
        ]
        encoded: BatchEncoding = self._tokenizer(texts, return_tensors="pt", padding=True).to(self._device)
        return encoded

    def _how(self, calls: Sequence[Call]) -> Callable[[BatchEncoding, int, Clock], Tensor]:
        """The way of this kind to run these calls."""
        adapters = [None if call.adapter is None else self._names[call.adapter] for call in calls]
        if self._kind is PeerKind.GENERATE:
            return self._generate
        if self._kind is PeerKind.ADAPTER_NAMES:
            names = [name or "__base__" for name in adapters]
            return lambda inputs, num, clock: self._generate(inputs, num, clock, adapter_names=names)
        if adapters[0] is None:
            return self._generate_plain
        if self._kind is PeerKind.SET_ADAPTER:
            self._model.set_adapter(adapters[0])
            return self._generate
        merged = adapters[0]
        return lambda inputs, num, clock: self._generate_merged(inputs, num, clock, merged)

    def _generate(
        self, inputs: BatchEncoding, num: int, clock: Clock, adapter_names: list[str] | None = None
    ) -> Tensor:
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=num, do_sample=False, pad_token_id=self._tokenizer.pad_token_id
        )
        more = {} if adapter_names is None else {"adapter_names": adapter_names}
        result: Tensor = self._model.generate(**inputs, generation_config=config, streamer=clock, **more)
        return result

    def _generate_plain(self, inputs: BatchEncoding, num: int, clock: Clock) -> Tensor:
        with self._model.disable_adapter():
            return self._generate(inputs, num, clock)

    def _generate_merged(self, inputs: BatchEncoding, num: int, clock: Clock, name: str) -> Tensor:
        self._model.set_adapter(name)
        self._model.merge_adapter([name])
        try:
            return self._generate(inputs, num, clock)
        finally:
            self._model.unmerge_adapter()

    def _streamed(
        self,
        call: Call,
        sent_s: float,
        clock: Clock,
        answer: list[int],
        prompt: int,
        due_from_s: float | None,
    ) -> Streamed:
        """A row of a batch: it has its tokens when the batch has made them, and is over with its own last one."""
        ids = answer[: call.num_tokens]
        times = tuple(clock.times[: len(ids)])
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Streamed(
            index=call.index,
            adapter=None if call.adapter is None or not self._names else self._names[call.adapter],
            sent_s=sent_s,
            token_times=times,
            end_s=times[-1],
            num_prompt_tokens=int(prompt),
            num_cached_tokens=0,
            num_output_tokens=len(ids),
            text_sha256=hashlib.sha256(text.encode()).hexdigest(),
            failure=None if len(ids) == call.num_tokens else f"{len(ids)} tokens came of {call.num_tokens}",
            due_s=None if due_from_s is None else due_from_s + call.at_s,
        )


def _dequantised(
    base: Qwen2_5_VLForConditionalGeneration, weights: PeerWeights
) -> Qwen2_5_VLForConditionalGeneration:
    """The same values, as transformers itself unpacks them."""
    plain: Qwen2_5_VLForConditionalGeneration = base.dequantize()  # type: ignore[no-untyped-call]
    plain.to(torch.float32 if weights is PeerWeights.FP32 else torch.bfloat16)  # type: ignore[arg-type]
    return plain


def _with_adapters(base: Qwen2_5_VLForConditionalGeneration, root: Path, names: Sequence[str]) -> PeftModel:
    model = PeftModel.from_pretrained(base, root / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(root / name), name)
    model.train(False)
    return model


def _messages(call: Call) -> list[dict[str, str]]:
    system = [{"role": "system", "content": call.system}] if call.system else []
    return [*system, {"role": "user", "content": call.prompt}]


def _batches(trace: Trace, width: int, begin_s: float) -> Iterator[Sequence[Call]]:
    """Calls in order, as many at once as this way takes; in an open loop none before it is due."""
    for calls in batched(trace.calls, width):
        if trace.num_streams is None:
            time.sleep(max(0.0, begin_s + calls[-1].at_s - time.monotonic()))
        yield calls


def batched(calls: Sequence[Call], width: int) -> Iterator[Sequence[Call]]:
    for start in range(0, len(calls), width):
        yield calls[start : start + width]


def _sent_s(trace: Trace, place: int, begin_s: float, ended: Sequence[Streamed]) -> float:
    """When a client would have sent it: in a closed loop when one of its streams was free, else when it was due."""
    if trace.num_streams is None:
        return begin_s + trace.calls[place].at_s
    before = place - trace.num_streams
    return sorted(streamed.end_s for streamed in ended)[before] if before >= 0 else begin_s


def main(arguments: Sequence[str], lines: TextIO, replies: TextIO) -> None:
    """Serve traces until the input ends."""
    kind, checkpoint, root, device, weights, *names = arguments
    worker = Worker(PeerKind(kind), Path(checkpoint), Path(root), device, names, PeerWeights(weights))
    _say(replies, worker.facts())
    for line in lines:
        try:
            _say(replies, asdict(worker.run(trace_from_json(json.loads(line)))))
        except (ValueError, RuntimeError, TypeError) as error:  # a peer that cannot is a result, not our end
            _say(replies, {"error": f"{type(error).__name__}: {error}"})


def _say(replies: TextIO, content: object) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries that print must not get between the answers
    main(sys.argv[1:], sys.stdin, answers)
