"""A processor that needs no checkpoint: one token for each byte of UTF-8, four for each image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from base.errors import InvalidToken
from base.prompt import ImagePart, Message, PromptImage, PromptInputs, TextPart
from base.spec import BaseSpec

BASE_NAME = "fake/base-vl"
IMAGE_TOKEN = 256
EOS_TOKEN = 257
VOCAB_SIZE = 260
IMAGE_TOKENS = 4


def fake_spec(name: str = BASE_NAME) -> BaseSpec:
    return BaseSpec(
        name=name,
        revision=None,
        fingerprint="f" * 64,
        num_layers=2,
        hidden_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=VOCAB_SIZE,
        max_positions=4096,
        eos_token_ids=(EOS_TOKEN,),
        pad_token_id=EOS_TOKEN,
        image_token_id=IMAGE_TOKEN,
        merge_size=2,
        patch_size=14,
        dtype="bfloat16",
        quantization="nf4",
    )


class FakeProcessor:
    """One token for each byte of UTF-8, four for each image; the template is ``role:text`` lines."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = (EOS_TOKEN,)

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.chats: list[tuple[Message, ...]] = []
        self.options: list[dict[str, object]] = []

    def prepare_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> PromptInputs:
        if self.failure is not None:
            raise self.failure
        self.chats.append(tuple(messages))
        self.options.append(
            {"tools": tools, "generation": add_generation_prompt, "continue": continue_final_message}
        )
        ids: list[int] = []
        images: list[PromptImage] = []
        for message in messages:
            ids += f"{message.role}:".encode()
            for part in message.parts:
                if isinstance(part, TextPart):
                    ids += part.text.encode()
                else:
                    images.append(_prompt_image(part, len(ids)))
                    ids += [IMAGE_TOKEN] * IMAGE_TOKENS
        return _prompt(ids, images)

    def prepare_text(self, text: str) -> PromptInputs:
        return _prompt(list(text.encode()))

    def prepare_ids(self, ids: Sequence[int]) -> PromptInputs:
        if any(not 0 <= i < VOCAB_SIZE or i == IMAGE_TOKEN for i in ids):
            raise InvalidToken(f"a token id is outside 0 to {VOCAB_SIZE - 1}, or an image's")
        return _prompt(list(ids))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return b"".join(self.token_bytes(i) for i in ids if i < 256 or not skip_special_tokens).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else f"<|{token_id}|>".encode()

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256


def _prompt(ids: list[int], images: Sequence[PromptImage] = ()) -> PromptInputs:
    positions = torch.arange(len(ids)).expand(3, -1)
    return PromptInputs(ids=tuple(ids), images=tuple(images), positions=positions, rope_delta=0)


def _prompt_image(part: ImagePart, offset: int) -> PromptImage:
    digest = hashlib.sha256(part.image.tobytes()).hexdigest()
    return PromptImage(torch.zeros(16, 8), (1, 4, 4), digest, offset, IMAGE_TOKENS)
