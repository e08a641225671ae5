"""Pieces joined are the decoding of all ids, and no piece ends inside a character."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from base.tokens import Tokens
from engine.detokenizer import Detokenizer

TEXTS = [
    "hello world",
    "naïve café",
    "日本語テキスト",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "a\u0301\u200d",
    "\x00\x7f\t\r\n",
    "𝔘𝔫𝔦",
]
SPECIALS = ["<|im_end|>", "<tool_call>", "</tool_call>"]


def small_tokenizer() -> Tokenizer:
    """Byte-level BPE with so few merges that most characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken("<two words>", special=False)])
    return tokenizer


TOKENIZER = small_tokenizer()
VOCABULARY = Tokens(TOKENIZER.to_str())
SIZE = TOKENIZER.get_vocab_size()


def id_of(token: str) -> int:
    token_id = TOKENIZER.token_to_id(token)
    assert token_id is not None
    return token_id


END, OPEN, CLOSE = (id_of(token) for token in SPECIALS)


def pieces(token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(VOCABULARY)
    return [*(detokenizer.feed(token_id) for token_id in token_ids), detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, SIZE - 1).filter(lambda i: i not in (OPEN, CLOSE)), max_size=40))
def test_any_ids_give_what_decoding_them_all_gives(token_ids: list[int]) -> None:
    assert "".join(pieces(token_ids)) == TOKENIZER.decode(token_ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)))
def test_text_comes_back_in_whole_characters(text: str) -> None:
    found = pieces(TOKENIZER.encode(text).ids)
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found) or "\ufffd" in text


def test_a_character_waits_for_its_last_byte() -> None:
    detokenizer = Detokenizer(VOCABULARY)
    seen = [(detokenizer.feed(id_of(c)), detokenizer.is_inside_character) for c in ("ð", "Ł", "ĺ", "Ģ")]
    assert seen == [("", True), ("", True), ("", True), ("😀", False)]
    assert detokenizer.flush() == ""


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    token_ids = [id_of(c) for c in ("ð", "Ł")]
    assert pieces(token_ids) == ["", "", "\ufffd"]


def test_special_tokens_are_no_text_but_tool_call_marks_are() -> None:
    assert pieces([END, OPEN, END, CLOSE]) == ["", "<tool_call>", "", "</tool_call>", ""]
    assert VOCABULARY.token_bytes(END) == b"<|im_end|>"
    assert VOCABULARY.is_special(END)


def test_an_added_token_with_a_space_is_its_own_text() -> None:
    assert pieces([id_of("<two words>")]) == ["<two words>", ""]


def test_ids_that_name_no_token_are_nothing() -> None:
    assert pieces([SIZE, SIZE + 10_000, -1]) == ["", "", "", ""]


def test_token_bytes_are_parts_of_characters() -> None:
    token_ids = TOKENIZER.encode("日本 é").ids
    assert b"".join(VOCABULARY.token_bytes(i) for i in token_ids) == "日本 é".encode()
