"""lorikeet.json: what is written is read back, and nothing malformed gets further than its own refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import AdapterRejected, RejectReason
from adapters.profile import (
    MAX_PROFILE_BYTES,
    BaseFacts,
    GateFacts,
    PackageProfile,
    ProcessorFacts,
    RecordedProbe,
    parse_profile,
    profile_json,
    read_profile,
)

SHA = "ab" * 32
PROBE = RecordedProbe("Describe.", 56, SHA, ((7, 1.5), (3, -0.25)), ((3, 2.0),), SHA)
FULL = PackageProfile(
    name="invoice",
    weights_sha256=SHA,
    base=BaseFacts("org/base", "abc", "f" * 64, "nf4", "bfloat16", ("lm_head",)),
    processor=ProcessorFacts(SHA, SHA, 3136, 1_003_520),
    recipe={"r": 16, "language": {"r": None}},
    data={"digest": "d", "rows": 10, "labels": 30},
    scores={"loss": 0.5},
    base_scores={"loss": 2.0},
    gate=GateFacts(True, ("loss 0.5 <= base 2",)),
    environment={"torch": "2.13"},
    profile={"rank": 16},
    probes=(PROBE, PROBE),
)


def test_what_is_written_is_read_back() -> None:
    assert parse_profile(profile_json(FULL)) == FULL
    assert parse_profile(profile_json(PackageProfile())) == PackageProfile()


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=64,
                unique_by=lambda pair: pair[0]))  # fmt: skip
def test_every_logit_is_read_back_to_the_bit(top: list[tuple[int, float]]) -> None:
    probe = RecordedProbe("a", None, SHA, tuple(top), tuple(top))
    assert parse_profile(profile_json(PackageProfile(probes=(probe,)))).probes == (probe,)


@pytest.mark.parametrize(
    "text", ["{}", '{"base": {"fingerprint": "x"}}', '{"format": 1, "later": [{"a": 1}]}']
)
def test_what_is_absent_is_empty_and_what_is_unknown_is_passed_over(text: str) -> None:
    assert parse_profile(text.encode()).probes == ()


def changed(**sections: object) -> Callable[[dict[str, object]], None]:
    return lambda document: document.update(sections)


def probe(**fields: object) -> Callable[[dict[str, object]], None]:
    known = json.loads(profile_json(FULL))["probes"][0]
    return changed(probes=[{**known, **fields}])


MALFORMED = {
    "a later format": changed(format=2),
    "format true": changed(format=True),
    "name a number": changed(name=5),
    "name endless": changed(name="x" * 5000),
    "digest no digest": changed(weights_sha256="abc"),
    "digest in capitals": changed(weights_sha256="AB" * 32),
    "base a list": changed(base=[]),
    "fingerprint a number": changed(base={"fingerprint": 1}),
    "skip of numbers": changed(base={"skip": [1]}),
    "pixels negative": changed(processor={"min_pixels": -1}),
    "pixels a float": changed(processor={"max_pixels": 1.5}),
    "recipe a text": changed(recipe="r"),
    "rows a text": changed(data={"rows": "many"}),
    "scores of text": changed(scores={"adapter": {"loss": "low"}}),
    "scores true": changed(scores={"base": {"loss": True}}),
    "gate without a word": changed(gate={}),
    "gate with a million rules": changed(gate={"passed": True, "rules": ["x"] * 1000}),
    "environment a list": changed(environment=[1]),
    "profile a list": changed(profile=[1]),
    "probes an object": changed(probes={}),
    "nine probes": changed(probes=[json.loads(profile_json(FULL))["probes"][0]] * 9),
    "a probe of text": changed(probes=["a"]),
    "a probe with a huge text": probe(text="x" * 5000),
    "a probe without logits": probe(top=[]),
    "too many logits": probe(top=[[i, 0.0] for i in range(65)]),
    "a token twice": probe(top=[[1, 0.5], [1, 0.5]]),
    "a token below zero": probe(top=[[-1, 0.5]]),
    "a token true": probe(top=[[True, 0.5]]),
    "a token beyond any vocabulary": probe(base_top=[[1 << 31, 0.5]]),
    "a logit beyond any": probe(top=[[1, 1e30]]),
    "a logit of digits without end": probe(top=[[1, 10**400]]),
    "a logit of text": probe(top=[[1, "0.5"]]),
    "three in a pair": probe(top=[[1, 0.5, 2]]),
    "a side of text": probe(picture_side="56"),
    "ids without a digest": probe(ids_sha256="x"),
}


@pytest.mark.parametrize("kind", sorted(MALFORMED))
def test_what_is_malformed_is_refused_by_the_name_of_its_field(kind: str) -> None:
    document = json.loads(profile_json(FULL))
    MALFORMED[kind](document)
    with pytest.raises(AdapterRejected) as caught:
        parse_profile(json.dumps(document).encode())
    assert caught.value.reason is RejectReason.BAD_CONFIG
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b"\xff", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 10_000]
)
def test_what_is_no_sound_json_is_refused(data: bytes) -> None:
    with pytest.raises(AdapterRejected) as caught:
        parse_profile(data)
    assert caught.value.reason is RejectReason.BAD_CONFIG


def test_a_score_s_name_from_a_stranger_is_not_echoed_whole() -> None:
    document = {"scores": {"adapter": {"\x1b[2J" + "x" * 9999: "y"}}}
    with pytest.raises(AdapterRejected) as caught:
        parse_profile(json.dumps(document).encode())
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_beyond_its_bound_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "lorikeet.json").write_bytes(b"{}" + b" " * MAX_PROFILE_BYTES)
    with pytest.raises(AdapterRejected) as caught:
        read_profile(tmp_path)
    assert caught.value.reason is RejectReason.TOO_LARGE


def test_a_package_without_the_file_has_no_profile(tmp_path: Path) -> None:
    assert read_profile(tmp_path) is None
