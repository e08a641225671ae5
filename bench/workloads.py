"""The workloads: seeded, frozen, by name. `make_trace` turns one into calls; the same name gives the same digest.

Owns what is asked of a server and when. Knows no server. A workload's scale (words, tokens, calls) is a `Size`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from bench.draws import Lengths, gamma_arrivals, power_choices, zipf_choices
from bench.sizes import SIZES, Size
from bench.trace import Call, Picture, Trace
from bench.words import prose

SEED = 20261121
SLORA_ADAPTERS = 200
REPEATED_SHARE = 0.3
"""Of pictures: so many were sent before."""

Special = Literal["fan-out", "fan-out-apart", "one-picture"]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is drawn. A closed loop has ``num_streams``, an open one ``cv``."""

    name: str
    about: str
    num_streams: int | None = None
    cv: float | None = None
    num_adapters: int = 0
    """0 asks the base alone."""
    zipf: float = 0.0
    power: float | None = None
    """S-LoRA's alpha, in place of ``zipf``."""
    spread: bool = False
    """Call i asks adapter i modulo n: as many distinct ones at once as can be."""
    prompt: Lengths | None = None
    """In place of the size's."""
    output: Lengths | None = None
    length_kind: Literal["uniform", "lognormal"] = "uniform"
    picture_share: float = 0.0
    has_system: bool = False
    """Every call begins with the same long system prompt."""
    ranks: tuple[int, ...] = (16,)
    """Adapter i must have rank ``ranks[i % len(ranks)]``; `shapes adapters --ranks` makes such."""
    special: Special | None = None


def _catalogue() -> Mapping[str, Workload]:
    made = [
        *(
            Workload(
                f"closed-{n}", f"{n} streams over 8 adapters", num_streams=n, num_adapters=8, spread=True
            )
            for n in (1, 8, 16, 32, 64)
        ),
        *(Workload(f"base-{n}", f"{n} streams on the base", num_streams=n) for n in (1, 8, 16, 32, 64)),
        *(
            Workload(
                f"distinct-{n}",
                f"{n} streams over {n} adapters",
                num_streams=n,
                num_adapters=n,
                spread=True,
            )
            for n in (16, 64)
        ),
        Workload("base-1-of-96", "1 stream on the base, answers of 96 tokens", 1, output=Lengths(96, 96)),
        Workload(
            "distinct-16-of-96",
            "16 streams over 16 adapters, answers of 96 tokens",
            16,
            num_adapters=16,
            spread=True,
            output=Lengths(96, 96),
        ),
        *(
            Workload(f"open-cv{cv}", f"Gamma arrivals, cv {cv}", cv=float(cv), num_adapters=8, zipf=1.0)
            for cv in (1, 2, 4, 8)
        ),
        *(
            Workload(
                f"adapters-{n}-zipf{exponent:g}",
                f"16 streams over {n} adapters, Zipf {exponent:g}",
                num_streams=16,
                num_adapters=n,
                zipf=exponent,
            )
            for n in (1, 8, 64, 256, 1000)
            for exponent in (0.0, 1.0, 1.5)
        ),
        Workload(
            "lognormal",
            "8 streams, long-tailed lengths",
            8,
            num_adapters=8,
            zipf=1.0,
            length_kind="lognormal",
        ),
        Workload(
            "pictures",
            "8 streams, half with a picture, 30 % of them repeated",
            8,
            num_adapters=8,
            zipf=1.0,
            picture_share=0.5,
        ),
        Workload(
            "ranks",
            "16 streams over ranks 8, 16, 32 and 64",
            16,
            num_adapters=8,
            spread=True,
            ranks=(8, 16, 32, 64),
        ),
        Workload(
            "system",
            "8 streams behind one long system prompt",
            8,
            num_adapters=8,
            spread=True,
            has_system=True,
        ),
        Workload("storm", "8 streams, every call a new adapter", 8, num_adapters=64, spread=True),
        Workload("working-set", "16 streams over 32 adapters in turn", 16, num_adapters=32, spread=True),
        Workload(
            "fan-out",
            "one call answered by 8 adapters",
            1,
            num_adapters=8,
            picture_share=1.0,
            special="fan-out",
        ),
        Workload(
            "fan-out-apart",
            "the calls of fan-out, as 8 calls each",
            8,
            num_adapters=8,
            picture_share=1.0,
            special="fan-out-apart",
        ),
        Workload(
            "one-picture",
            "one picture asked about through 8 adapters",
            1,
            num_adapters=8,
            spread=True,
            picture_share=1.0,
            special="one-picture",
        ),
        *(
            Workload(
                f"slora-alpha{alpha:g}-cv{cv:g}",
                f"S-LoRA's synthetic trace, alpha {alpha:g}, cv {cv:g}",
                cv=cv,
                num_adapters=SLORA_ADAPTERS,
                power=alpha,
                prompt=Lengths(8, 511),
                output=Lengths(8, 511),
            )
            for alpha in (0.1, 0.3, 1.0)
            for cv in (1.0, 2.0)
        ),
    ]
    return {workload.name: workload for workload in made}


CATALOGUE = _catalogue()


def workload_named(name: str) -> Workload:
    """Raises KeyError with the names that exist."""
    if name not in CATALOGUE:
        raise KeyError(f"no workload {name!r}; there are {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def make_trace(
    workload: Workload,
    size_name: str,
    *,
    num_calls: int | None = None,
    rate: float | None = None,
    seed: int = SEED,
) -> Trace:
    """The calls of a workload at a size. Raises KeyError for a size that does not exist."""
    if size_name not in SIZES:
        raise KeyError(f"no size {size_name!r}; there are {', '.join(SIZES)}")
    size = SIZES[size_name]
    # what is asked apart is what is asked at once
    rng = random.Random(f"{seed}/{workload.name.removesuffix('-apart')}/{size_name}")
    num = num_calls or (size.min_calls if "fan-out" in workload.name else _num_calls(workload, size))
    calls = _calls(workload, size, num, rate or size.rate, rng)
    return Trace(workload.name, size_name, _special(workload, calls), workload.num_streams)


def _num_calls(workload: Workload, size: Size) -> int:
    if workload.num_streams is None:
        return size.num_open_calls
    return max(size.min_calls, size.calls_per_stream * workload.num_streams)


def _calls(workload: Workload, size: Size, num: int, rate: float, rng: random.Random) -> tuple[Call, ...]:
    prompts = _of_kind(workload.prompt or size.prompt, workload).draw(num, rng)
    outputs = _of_kind(workload.output or size.output, workload).draw(num, rng)
    adapters = _adapters(workload, num, rng)
    times = (0.0,) * num if workload.cv is None else gamma_arrivals(rate, workload.cv, num, rng)
    pictures = _pictures(workload, size, num, rng)
    system = prose(size.num_system_words, random.Random("system")) if workload.has_system else None
    return tuple(
        Call(
            index=index,
            prompt=prose(prompts[index], rng),
            num_tokens=outputs[index],
            adapter=adapters[index],
            at_s=times[index],
            system=system,
            picture=pictures[index],
        )
        for index in range(num)
    )


def _of_kind(lengths: Lengths, workload: Workload) -> Lengths:
    return replace(lengths, kind=workload.length_kind)


def _adapters(workload: Workload, num: int, rng: random.Random) -> tuple[int | None, ...]:
    if not workload.num_adapters:
        return (None,) * num
    if workload.spread:
        return tuple(index % workload.num_adapters for index in range(num))
    if workload.power is not None:
        return power_choices(workload.num_adapters, workload.power, num, rng)
    return zipf_choices(workload.num_adapters, workload.zipf, num, rng)


def _pictures(workload: Workload, size: Size, num: int, rng: random.Random) -> tuple[Picture | None, ...]:
    """A share of calls has one; of those, some were sent before."""
    sent: list[Picture] = []
    drawn: list[Picture | None] = []
    for _ in range(num):
        if rng.random() >= workload.picture_share:
            drawn.append(None)
        elif sent and rng.random() < REPEATED_SHARE:
            drawn.append(rng.choice(sent))
        else:
            sent.append(Picture(*rng.choice(size.pictures), seed=rng.randrange(2**32)))
            drawn.append(sent[-1])
    return tuple(drawn)


def _special(workload: Workload, calls: tuple[Call, ...]) -> tuple[Call, ...]:
    """What a few workloads do besides drawing."""
    if workload.special == "fan-out":
        return tuple(replace(call, adapter=0, fan_out=workload.num_adapters) for call in calls)
    if workload.special == "fan-out-apart":
        num = workload.num_adapters
        return tuple(replace(c, index=c.index * num + k, adapter=k) for c in calls for k in range(num))
    if workload.special == "one-picture":
        return tuple(replace(call, picture=calls[0].picture) for call in calls)
    return calls
