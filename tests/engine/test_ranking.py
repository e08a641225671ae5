"""The likeliest token, chosen inside a recording, is the sampler's: in ties, without a finite value, and replayed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.ranking import NO_TOKEN, write_best
from engine.sampler import Sampler, SamplerState, sampled
from engine.sampling import SamplingParams

V = 33
INF, NAN = float("inf"), float("nan")


def row(**values: float) -> Tensor:
    """Values by id (``t5=1.0``), -1 elsewhere."""
    made = torch.full((V,), -1.0)
    for name, value in values.items():
        made[int(name[1:])] = value
    return made


def ties(seed: int) -> Tensor:
    """So few different values that the largest is there many times."""
    return torch.randint(0, 3, (V,), generator=torch.Generator().manual_seed(seed)).float()


ROWS: dict[str, Tensor] = {
    "one largest": row(t7=2.0),
    "the first": row(t0=2.0),
    "the last": row(t32=2.0),
    "two equal": row(t9=2.0, t20=2.0),
    "two equal at the ends": row(t0=2.0, t32=2.0),
    "all equal": torch.zeros(V),
    "zero and minus zero": row(t4=-0.0, t5=0.0),
    "minus infinity but one": torch.full((V,), -INF).index_fill_(0, torch.tensor([12]), -50.0),
    "minus infinity": torch.full((V,), -INF),
    "infinity": row(t3=INF, t4=5.0),
    "two infinities": row(t3=INF, t30=INF),
    "a NaN": row(t6=NAN, t2=9.0),
    "NaN and infinity": row(t6=NAN, t2=INF),
    "all NaN": torch.full((V,), NAN),
    "the smallest differences": row(t8=1.0, t9=1.0 + 2**-23, t10=1.0),
    **{f"many ties {seed}": ties(seed) for seed in range(4)},
}


def chosen_by_sampler(logits: Tensor) -> list[object]:
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    states = [SamplerState(greedy, (1,), (2,), V) for _ in logits]
    return list(Sampler(V).sample(logits, states))


@pytest.mark.parametrize("name", ROWS)
def test_the_choice_is_the_samplers(name: str) -> None:
    logits = ROWS[name].unsqueeze(0)
    found = torch.full((1,), 5)
    write_best(found, logits)
    assert [sampled(token_id) for token_id in found.tolist()] == chosen_by_sampler(logits)


def test_ties_go_to_the_lowest_id_and_what_is_not_finite_has_none() -> None:
    found = torch.zeros(4, dtype=torch.int64)
    names = ("two equal", "many ties 0", "a NaN", "minus infinity")
    write_best(found, torch.stack([ROWS[name] for name in names]))
    first_of_ties = ROWS["many ties 0"].tolist().index(2.0)
    assert found.tolist() == [9, first_of_ties, NO_TOKEN, NO_TOKEN]


def test_a_replay_chooses_anew() -> None:
    pytest.importorskip("triton")
    from tests.support.tape import Tape

    logits, found = torch.zeros(3, V), torch.zeros(3, dtype=torch.int64)
    replay = Tape().record(lambda: write_best(found, logits))
    for names in (list(ROWS)[i : i + 3] for i in range(len(ROWS) - 2)):
        logits.copy_(torch.stack([ROWS[name] for name in names]))
        replay()
        assert [sampled(token_id) for token_id in found.tolist()] == chosen_by_sampler(logits)
