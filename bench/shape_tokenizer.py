"""The tokenizer of made checkpoints: byte-level, as large as the vocabulary, one token for each word of a prompt.

Every id has a text of its own, so that equal texts are equal tokens, whichever server decoded them, and every token
gives the client something to see.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.words import WORDS

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""The last ids of the vocabulary, in this order."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""About Qwen2's: a word takes the space before it along."""


def save_tokenizer(folder: Path, vocab: int) -> None:
    """Write tokenizer.json and its settings. Raises ValueError for a vocabulary too small for bytes and words."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    texts = _texts(vocab - len(SPECIAL))
    model = models.BPE(vocab={text: place for place, text in enumerate(texts)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _texts(num: int) -> list[str]:
    """Bytes, words with and without a space before them, and made-up words for what is left."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*sorted(ByteLevel.alphabet()), *(f"Ġ{word}" for word in WORDS if len(word) > 0)]
    words += [word for word in WORDS if len(word) > 1]
    texts = list(dict.fromkeys([*words, "system", "user", "assistant"]))
    if len(texts) > num:
        raise ValueError(f"a vocabulary of {num + len(SPECIAL)} has no room for {len(texts)} bytes and words")
    return texts + [f"Ġ{_made_up(number)}" for number in range(num - len(texts))]


def _made_up(number: int) -> str:
    """A word for a number, unlike any other: syllables in base 75, begun as no common word is."""
    syllables = [first + second for first in "bdfgklmnprstvwz" for second in "aeiou"]
    word = "q"
    while True:
        number, place = divmod(number, len(syllables))
        word += syllables[place]
        if not number:
            return word
