"""Out of memory in a step: it is done in smaller parts, nobody who fits fails, and tokens are those of a quiet day."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from base.model import BaseModel
from base.pocket import CHECKPOINT
from engine.config import EngineConfig
from engine.errors import EngineError, OutOfMemory
from engine.exhaustion import RECOVERY_STEPS, Ceiling, is_out_of_memory
from engine.observer import StepRetried
from engine.runner import Runner, StepLogits
from engine.step import Chunk, StepPlan
from tests.support.scenes import scene
from tests.support.serving import Answer, Ask, Rig, gather

ASKS = [
    Ask("Hello!"),
    Ask("Describe the pictures.", None, (scene(), scene("blue", "square"))),
    Ask("Who are you?"),
    Ask("Tell me of the sea, the sky and the birds in it. " * 3),
]
KINDS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
)
Fault = Callable[[StepPlan], bool]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    # each ask computes its whole prompt: a prefix that was met before would need no room
    config = EngineConfig(max_model_len=512, kv_bytes=4 << 20, prefix_cache=False)
    made = Rig(str(CHECKPOINT), tmp_path_factory.mktemp("exhaustion"), config)
    yield made
    made.close()


@pytest.fixture(scope="module")
def quiet(rig: Rig) -> list[Answer]:
    return asyncio.run(rig.alone(ASKS))


async def outcomes(rig: Rig) -> list[Answer | EngineError]:
    async def one(ask: Ask) -> Answer | EngineError:
        try:
            return await gather(rig.submit(ask))
        except EngineError as error:
            return error

    return list(await asyncio.gather(*(one(ask) for ask in ASKS)))


def plant(monkeypatch: pytest.MonkeyPatch, has_no_room: Fault, error: Exception = KINDS[0]) -> list[int]:
    """Steps for which ``has_no_room`` holds throw; the token counts of those that did are returned, as they come."""
    run, failed = Runner.run, []

    def short(self: Runner, plan: StepPlan) -> StepLogits:
        if has_no_room(plan):
            failed.append(plan.num_tokens)
            raise error
        return run(self, plan)

    monkeypatch.setattr(Runner, "run", short)
    return failed


def tokens(answers: list[Answer | EngineError]) -> list[object]:
    return [a.token_ids if isinstance(a, Answer) else a for a in answers]


@pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
def test_a_step_without_room_is_done_in_parts_and_nobody_fails(
    rig: Rig, quiet: list[Answer], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failed = plant(monkeypatch, lambda plan: len(plan.chunks) > 1, error)
    assert tokens(asyncio.run(outcomes(rig))) == [answer.token_ids for answer in quiet]
    assert failed
    assert StepRetried(0, "OutOfMemory") in rig.recorder.events


def test_steps_stay_small_after_one_that_found_no_room(
    rig: Rig, quiet: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = plant(monkeypatch, lambda plan: len(plan.chunks) > 1)
    asyncio.run(outcomes(rig))
    num_decodes = sum(len(answer.token_ids) for answer in quiet)
    assert len(failed) < num_decodes / len(ASKS)  # far from one failed attempt a step


def test_a_piece_that_does_not_fit_alone_is_halved(
    rig: Rig, quiet: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = plant(monkeypatch, lambda plan: plan.num_tokens > 24)
    assert tokens(asyncio.run(outcomes(rig))) == [answer.token_ids for answer in quiet]
    assert failed


def test_a_halved_prompt_keeps_its_log_probabilities(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scored() -> list[float]:
        from dataclasses import replace

        request = replace(rig.request(ASKS[3]), prompt_logprobs=0)
        found: list[float] = []
        async for item in rig.engine.submit(request):
            found += [p.logprob for p in getattr(item, "prompt_logprobs", None) or () if p is not None]
        return found

    whole = asyncio.run(scored())
    plant(monkeypatch, lambda plan: plan.num_tokens > 24)
    halved = asyncio.run(scored())
    assert len(whole) == len(rig.prompt(ASKS[3]).ids) - 1
    assert halved == pytest.approx(whole, abs=0.25)  # bf16, at logits up to 20


def test_images_that_do_not_fit_together_are_encoded_one_by_one(
    rig: Rig, quiet: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, counts = BaseModel.embed_images, []

    def short(self: BaseModel, pixels: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        counts.append(len(grids))
        if len(grids) > 1:
            raise torch.OutOfMemoryError("planted")
        return embed(self, pixels, grids)

    asyncio.run(rig.alone(ASKS))
    monkeypatch.setattr(BaseModel, "embed_images", short)
    rig.core._executor._runner.free_memory()  # the pictures of a quiet day are in the cache
    assert asyncio.run(rig.alone([ASKS[1]]))[0].token_ids == quiet[1].token_ids
    assert counts == [2, 1, 1]


def test_only_what_does_not_fit_alone_fails_and_says_so(
    rig: Rig, quiet: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    culprit = rig.prompt(ASKS[2]).ids
    plant(monkeypatch, lambda plan: any(c.sequence.request.prompt.ids == culprit for c in plan.chunks))
    got = asyncio.run(outcomes(rig))
    assert isinstance(got[2], OutOfMemory)
    for i in (0, 1, 3):
        assert tokens(got)[i] == quiet[i].token_ids


def test_other_errors_are_no_shortage() -> None:
    assert all(is_out_of_memory(error) for error in KINDS)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


# ---- the ceiling ------------------------------------------------------------------------------------------------


def plan_of(*sizes: int) -> StepPlan:
    sequence = SimpleNamespace(num_prompt_tokens=0, images_between=lambda start, end: ())
    return StepPlan(tuple(Chunk(sequence, 0, size) for size in sizes), ())  # type: ignore[arg-type]


def sizes_of(ceiling: Ceiling, *sizes: int) -> list[list[int]]:
    return [[chunk.num_tokens for chunk in part.chunks] for part in ceiling.parts(plan_of(*sizes))]


def test_a_plan_is_cut_between_chunks_and_never_inside_one() -> None:
    ceiling = Ceiling()
    assert sizes_of(ceiling, 1, 1, 200, 3) == [[1, 1, 200, 3]]
    ceiling.lower(8)
    assert sizes_of(ceiling, 1, 1, 200, 3) == [[1, 1], [200], [3]]
    assert sizes_of(ceiling, 2, 2) == [[2, 2]]


def test_a_ceiling_grows_back_and_goes() -> None:
    ceiling = Ceiling()
    ceiling.lower(8)
    ceiling.lower(4)
    assert ceiling.num_tokens == 2
    for expected in (4, None, None):
        for _ in range(RECOVERY_STEPS):
            ceiling.note_success()
        assert ceiling.num_tokens == expected
