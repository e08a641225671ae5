"""Processor: messages and images to PromptInputs, and ids back to text. Shared by server, engine and training.

User text never becomes special tokens. Holds nothing that changes, so any number of threads may prepare at once.
The values it takes and gives are in base/prompt.py and are importable from here.

Place in a request's way: step 3 (in a worker thread) and step 11.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tokenizers import Tokenizer

from base.chat import ChatTemplate
from base.errors import InvalidImageCount, InvalidToken, PromptError
from base.images import ImagePreparer, PreparedImage
from base.positions import mrope_positions
from base.prompt import Grid, ImagePart, Message, PromptImage, PromptInputs, TextPart, ToolCall
from base.tokens import Tokens

__all__ = [
    "Grid",
    "ImagePart",
    "Message",
    "Processor",
    "PromptImage",
    "PromptInputs",
    "TextPart",
    "TokenIds",
    "ToolCall",
]


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The ids that mean something to the model, from its configuration."""

    image: int
    video: int
    pad: int
    eos: tuple[int, ...]
    vocab_size: int
    """Rows of the embedding: every id is below it."""


@dataclass(frozen=True, slots=True)
class PatchSizes:
    """How the vision tower wants its pixels cut, from its configuration."""

    patch_size: int
    merge_size: int


class Processor:
    """One base's way from messages to ids and patches. Made by ``base.processing.load_processor``."""

    def __init__(self, tokens: Tokens, template: ChatTemplate, images: ImagePreparer, ids: TokenIds) -> None:
        self._tokens = tokens
        self._template = template
        self.images: Final = images
        """Its limits: ``min_pixels``, ``max_pixels``, ``factor`` (sides are multiples of it)."""
        self._ids = ids

    # ---- what the model and the wire ask about tokens ----------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The full tokenizer, in which special tokens count. Do not change its settings: threads share it."""
        return self._tokens.full

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and the head: every id is below it. Ids from ``num_tokens`` up name no token."""
        return self._ids.vocab_size

    @property
    def num_tokens(self) -> int:
        return self._tokens.size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._ids.eos

    @property
    def image_token_id(self) -> int:
        return self._ids.image

    @property
    def tokenizer_sha256(self) -> str:
        """Of what each id means; computed anew at every look."""
        return self._tokens.sha256

    @property
    def template_sha256(self) -> str:
        return self._template.sha256

    def is_special(self, token_id: int) -> bool:
        return self._tokens.is_special(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Raw bytes of one token, perhaps part of a character; empty for an id that names no token."""
        return self._tokens.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """``token_bytes`` as text; what is no UTF-8 becomes U+FFFD."""
        return self._tokens.token_bytes(token_id).decode(errors="replace")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: never a special token."""
        return self._tokens.encode_plain(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokens.decode(ids, skip_special_tokens)

    # ---- prompts -----------------------------------------------------------------------------------------------

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt's text, one image token for each image. For showing: encoding it again is not the prompt."""
        text, _ = self._template.render(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return text

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The prompt's ids while each image is still one token; ``assemble`` widens them. Raises PromptError."""
        _, ids = self._template.render(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        num_images = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
        if ids.count(self._ids.image) != num_images:
            raise InvalidImageCount(ids.count(self._ids.image), num_images)
        return ids

    def prepare_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> PromptInputs:
        """Messages by the chat template, their images as patches. ``tools`` are OpenAI's, as JSON values.

        Takes tens of milliseconds with images: call it on a worker thread. Raises PromptError.
        """
        ids = self.chat_ids(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        parts = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
        return self.assemble(ids, [self.images.prepare(part) for part in parts])

    def prepare_text(self, text: str) -> PromptInputs:
        """Plain text, no template. Raises PromptError when it is empty."""
        return self.assemble(self.encode(text), [])

    def prepare_ids(self, ids: Sequence[int]) -> PromptInputs:
        """Ids as they are. Raises InvalidToken for one out of range, or that stands for an image."""
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidToken(
                    f"token id {token_id} is out of range: ids go from 0 to {self.vocab_size - 1}"
                )
            if token_id in (self._ids.image, self._ids.video):
                raise InvalidToken(
                    f"token id {token_id} stands for an image or a video: send images as content parts of a chat"
                )
        return self.assemble(list(ids), [])

    def assemble(self, ids: Sequence[int], prepared: Sequence[PreparedImage]) -> PromptInputs:
        """Widen each image token of ``chat_ids`` to its image's tokens and number the positions."""
        if not ids:
            raise PromptError("the prompt has no tokens: give at least one")
        wide: list[int] = []
        images: list[PromptImage] = []
        remaining = iter(prepared)
        for token_id in ids:
            if token_id != self._ids.image:
                wide.append(token_id)
                continue
            image = next(remaining)
            images.append(PromptImage(image.pixels, image.grid, image.digest, len(wide), image.num_tokens))
            wide += [token_id] * image.num_tokens
        positions, delta = mrope_positions(
            wide, self._ids.image, [image.grid for image in images], self.images.merge_size
        )
        return PromptInputs(tuple(wide), tuple(images), positions, delta)
