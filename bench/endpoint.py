"""Endpoint: an OpenAI-compatible server by URL, and how it wants adapters named.

Owns the request's body. Knows no transport. Servers differ only in where an adapter's name goes, in what they call it,
and in which fields beyond OpenAI's they take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from bench.pictures import data_uri
from bench.trace import Call


class Naming(StrEnum):
    """Where an adapter's name goes."""

    MODEL = "model"  # vLLM, transformers serve: model is the adapter
    ADAPTER = "adapter"  # ours
    LORA_PATH = "lora_path"  # SGLang
    ADAPTER_ID = "adapter_id"  # LoRAX
    COLON = "base:adapter"  # SGLang's OpenAI routes
    LLAMA = "lora"  # llama-server: [{"id": number, "scale": 1.0}]
    NONE = "none"  # the server has no adapters: everybody asks the base


@dataclass(frozen=True, slots=True)
class Endpoint:
    url: str
    base: str
    """What it calls the base model."""
    naming: Naming = Naming.ADAPTER
    adapters: tuple[str, ...] = ()
    """Adapter number i is called ``adapters[i]`` there."""
    api_key: str | None = None
    is_plain: bool = False
    """Takes OpenAI's own fields alone: ``ignore_eos`` is left out, and lengths may differ from what is asked."""
    label: str = "lorikeet"
    timeout_s: float = 600.0

    def require(self, num_adapters: int) -> None:
        """Raises ValueError if a trace needs more adapters than are named."""
        if self.naming is not Naming.NONE and num_adapters > len(self.adapters):
            raise ValueError(
                f"the workload needs {num_adapters} adapters and {self.label} has {len(self.adapters)}: make more with "
                "`lorikeet bench adapters`, or name them with --adapters"
            )

    def name_of(self, adapter: int | None) -> str | None:
        """The adapter's name there; None for the base."""
        return None if adapter is None or self.naming is Naming.NONE else self.adapters[adapter]

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, call: Call) -> dict[str, object]:
        """What is posted to /v1/chat/completions."""
        body: dict[str, object] = {
            "model": self.base,
            "messages": _messages(call),
            "max_tokens": call.num_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self.is_plain:
            body["ignore_eos"] = True
        body.update(self._adapter_fields(call))
        return body

    def _adapter_fields(self, call: Call) -> Mapping[str, object]:
        if call.fan_out > 1 and call.adapter is not None:
            if self.naming is not Naming.ADAPTER:
                raise ValueError(f"{self.label} has no way to let several adapters answer one call")
            return {"adapters": list(self.adapters[call.adapter : call.adapter + call.fan_out])}
        name = self.name_of(call.adapter)
        if name is None:
            return {}
        fields: dict[Naming, Mapping[str, object]] = {
            Naming.MODEL: {"model": name},
            Naming.ADAPTER: {"adapter": name},
            Naming.LORA_PATH: {"lora_path": name},
            Naming.ADAPTER_ID: {"adapter_id": name},
            Naming.COLON: {"model": f"{self.base}:{name}"},
            Naming.LLAMA: {"lora": [{"id": call.adapter, "scale": 1.0}]},
        }
        return fields[self.naming]


def _messages(call: Call) -> list[dict[str, object]]:
    system: list[dict[str, object]] = [{"role": "system", "content": call.system}] if call.system else []
    if call.picture is None:
        return [*system, {"role": "user", "content": call.prompt}]
    picture = {"type": "image_url", "image_url": {"url": data_uri(call.picture)}}
    return [*system, {"role": "user", "content": [picture, {"type": "text", "text": call.prompt}]}]
