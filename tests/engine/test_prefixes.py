"""A block's key tells apart whatever changes its keys and values, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.composition import compose
from adapters.ref import BASE, AdapterRef
from engine.blocks import BlockPool
from engine.prefix import Prefixes
from engine.sequence import Sequence
from engine.tiling import Tiling
from tests.support.requests import make_image, make_sequence, ref

NUM = 24
LANGUAGE = ref("x")
SEES = AdapterRef("v", 1, "digest-v", vision_digest="vision-v")
SEES_TOO = AdapterRef("w", 1, "digest-w", vision_digest="vision-w")


def keys(sequence: Sequence, tiling: Tiling | None = None) -> list[bytes]:
    prefixes = Prefixes(BlockPool(64, 4), tiling or Tiling(8))
    return list(prefixes.keys(sequence, sequence.num_tokens // 4))


def shared(one: Sequence, other: Sequence, tiling: Tiling | None = None) -> int:
    """How many first blocks have the same keys; and none behind them has."""
    pairs = list(zip(keys(one, tiling), keys(other, tiling), strict=False))
    count = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    assert all(a != b for a, b in pairs[count:])
    return count


def asked(adapter: AdapterRef = BASE, picture: str = "", num_tokens: int = NUM, at: int = 9) -> Sequence:
    images = (make_image(picture, at, 3),) if picture else ()
    return make_sequence("s", num_tokens, adapter, images)


def with_token(sequence: Sequence, index: int) -> Sequence:
    prompt = sequence.request.prompt
    ids = (*prompt.ids[:index], prompt.ids[index] + 1, *prompt.ids[index + 1 :])
    return Sequence(replace(sequence.request, prompt=replace(prompt, ids=ids)), sequence.sampler)


@pytest.mark.parametrize("index", [0, 3, 4, 11, 23])
def test_another_token_changes_its_block_and_all_behind_it(index: int) -> None:
    assert shared(asked(), with_token(asked(), index)) == index // 4


def test_language_weights_change_every_block_and_equal_ones_none() -> None:
    assert shared(asked(), asked(LANGUAGE)) == 0
    assert shared(asked(LANGUAGE), asked(ref("x", 2))) == 0
    renamed = replace(LANGUAGE, name="y", version=7, digest="other package, same language weights")
    assert shared(asked(LANGUAGE), asked(renamed)) == 6


def test_an_adapter_of_vision_weights_alone_shares_text_with_the_base_and_nothing_from_its_images_on() -> (
    None
):
    assert shared(asked(), asked(SEES)) == 6
    assert shared(asked(picture="p"), asked(SEES, "p")) == 2
    assert shared(asked(SEES, "p"), asked(SEES_TOO, "p")) == 2
    assert shared(asked(SEES, "p"), asked(replace(SEES, name="again"), "p")) == 6


def test_another_picture_or_another_place_changes_its_block_and_all_behind_it() -> None:
    assert shared(asked(picture="p"), asked(picture="q")) == 2
    assert shared(asked(picture="p"), asked(picture="p", at=10)) == 2
    assert shared(asked(picture="p"), asked()) == 2


def test_an_adapter_that_says_nothing_of_its_parts_shares_with_nobody() -> None:
    assert shared(asked(), asked(AdapterRef("old", 1, "digest-old"))) == 0


def test_compositions_share_by_what_acts() -> None:
    half = compose([(LANGUAGE, 0.5)])
    assert shared(asked(LANGUAGE), asked(half)) == 0
    assert shared(asked(LANGUAGE, "p"), asked(compose([(LANGUAGE, 1.0), (SEES, 1.0)]), "p")) == 2


def test_the_last_tile_of_a_prompt_is_shared_only_with_prompts_that_end_there() -> None:
    assert shared(asked(num_tokens=21), asked(num_tokens=23)) == 4
    assert shared(asked(num_tokens=22), asked(num_tokens=22)) == 5
    rounded = Tiling(4, is_exact=False)
    assert shared(asked(num_tokens=21), asked(num_tokens=23), rounded) == 5


def test_what_was_generated_is_not_what_a_prompt_computes_where_bits_count() -> None:
    def answered() -> Sequence:
        sequence = asked(num_tokens=16)
        sequence.output_ids = list(asked().request.prompt.ids[16:])
        return sequence

    assert shared(answered(), asked()) == 4
    assert shared(answered(), asked(), Tiling(4, is_exact=False)) == 6


@pytest.mark.parametrize("num_prompt", [1, 7, 8, 9, 31, 32, 33])
def test_pieces_are_the_same_from_whatever_cut_they_are_begun(num_prompt: int) -> None:
    tiling, end = Tiling(8), num_prompt + 5
    whole = list(tiling.pieces(0, end, num_prompt))
    assert [b for b, _ in whole] == [0, *[e for _, e in whole][:-1]] and whole[-1][1] == end
    assert all(e - b == 1 for b, e in whole if b >= num_prompt)
    cuts = [p for p in range(1, end) if tiling.is_cut(p, num_prompt)]
    for cut in cuts:
        parts = [*tiling.pieces(0, cut, num_prompt), *tiling.pieces(cut, end, num_prompt)]
        assert parts == whole
    assert all(tiling.cut_within(0, limit, num_prompt) in [0, *cuts] for limit in range(end))
