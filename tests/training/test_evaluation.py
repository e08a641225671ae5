"""An adapter is judged beside its base on the same rows, by the server's own prompts, in the order the base needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from base.processor import Processor
from tests.training.judged import ADAPTER, ScriptedGenerator, always, color_rows, read, seeing, text_rows
from tests.training.learnable import make_base
from tests.training.rows import ROWS, put_pictures
from training.data.formats import Conversation
from training.data.labels import Labeller
from training.evaluation import (
    AnswerMemory,
    EvaluationError,
    GateError,
    HeldOutLoss,
    Judging,
    SampleBook,
    Verdict,
    answers,
    check_judging,
    evaluate,
    unaugmented,
)
from training.evaluation.general import PLAIN_PROMPTS, POCKET, POCKET_PROMPTS, general_prompts
from training.evaluation.questions import questions_of
from training.evaluation.sheet import MAX_LINES, Panel, draw_sheet
from training.model.batch import Batch
from training.model.model import AdaptedBase
from training.recipe.recipe import Recipe
from training.targets.targets import resolve_targets

NO_GENERAL = Judging(general=())


def judge(
    processor: Processor, rows: Sequence[Conversation], generator: ScriptedGenerator, judging: Judging
) -> Verdict:
    return evaluate(generator.opened, processor, rows, ADAPTER, judging)


# ---- what is asked, and what is wanted


@pytest.mark.parametrize("name", [name for name in ROWS if name != "alpaca"])
def test_a_row_s_prompt_is_the_server_s_and_its_gold_is_what_is_trained(
    tmp_path: Path, processor: Processor, name: str
) -> None:
    put_pictures(tmp_path)
    (row,) = read(tmp_path, [ROWS[name][1]], processor)
    (question,) = questions_of([row], processor)
    last = max(index for index, turn in enumerate(row.turns) if turn.is_trained)
    served = processor.prepare_chat(row.messages()[:last], tools=row.tools)
    prompt = question.prompt(processor)
    assert prompt.ids == served.ids
    assert [image.digest for image in prompt.images] == [image.digest for image in served.images]
    learnt = Labeller(processor).examples(row)[-1].ids.tolist()
    assert learnt == [*prompt.ids, *processor.encode(question.gold), learnt[-1]]
    assert question.gold == row.turns[last].text


def test_tool_calls_are_wanted_as_the_model_writes_them(tmp_path: Path, processor: Processor) -> None:
    _, tools = ROWS["openai_tools"]
    messages = tools["messages"]
    assert isinstance(messages, list)
    (row,) = read(tmp_path, [{**tools, "messages": messages[:2]}], processor)
    (question,) = questions_of([row], processor)
    assert '"name": "look_up"' in question.gold and "kite" in question.gold
    assert [turn.role for turn in question.row.turns] == ["user"]


def test_the_rows_that_are_judged_depend_on_their_content_alone(tmp_path: Path, processor: Processor) -> None:
    rows = text_rows(tmp_path, processor, 20)
    chosen = {question.digest for question in questions_of(rows, processor, 5)}
    assert len(chosen) == 5
    assert {question.digest for question in questions_of(rows[::-1], processor, 5)} == chosen
    in_order = [question.origin.line for question in questions_of(rows, processor, 5)]
    assert in_order == sorted(in_order)


# ---- the verdict


def test_scores_stand_beside_the_base_s_on_the_same_rows(tmp_path: Path, processor: Processor) -> None:
    rows = text_rows(tmp_path, processor, 6)
    half = {f"say {number}": f"number {number}" for number in range(3)}
    generator = ScriptedGenerator(
        processor,
        base=always("number 5"),
        adapter=lambda prompt: next((half[q] for q in half if q in processor.decode(prompt.ids)), "no"),
    )
    verdict = judge(processor, rows, generator, replace(NO_GENERAL, gate=("exact_match >= base + 0.3",)))
    assert verdict.adapter["exact_match"] == pytest.approx(1 / 2)
    assert verdict.base["exact_match"] == pytest.approx(1 / 6)
    assert verdict.base["token_f1"] == pytest.approx((5 * 0.5 + 1) / 6)
    assert verdict.passed
    assert {"vision_dependence", "loss", "general_kl", "json_valid"} & set(verdict.adapter) == set()
    assert [answer.adapter_scores["exact_match"] for answer in verdict.answers] == [1, 1, 1, 0, 0, 0]
    assert [answer.gold for answer in verdict.answers] == [f"number {number}" for number in range(6)]


def test_an_adapter_worse_than_its_base_does_not_pass(tmp_path: Path, processor: Processor) -> None:
    rows = text_rows(tmp_path, processor)
    generator = ScriptedGenerator(processor, base=always("number 0"), adapter=always("what"))
    verdict = judge(processor, rows, generator, replace(NO_GENERAL, gate=("token_f1 >= base",)))
    assert not verdict.passed
    assert "FAILS  token_f1 >= base: 0.000 against 0.583 (base 0.583)" in verdict.text()


def test_the_verdict_is_written_as_text_markdown_and_json(tmp_path: Path, processor: Processor) -> None:
    rows = color_rows(tmp_path, processor)
    generator = ScriptedGenerator(processor, base=always("It is red."), adapter=seeing(rows, processor))
    verdict = judge(processor, rows, generator, Judging(gate=("exact_match >= 0.9",)))
    verdict.write(tmp_path / "run")
    content = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert content["scores"]["adapter"]["exact_match"] == 1.0
    assert content["scores"]["base"]["exact_match"] == 0.25
    assert content["gate"]["rules"][0]["value"] == 1.0
    assert content["vision"]["adapter"]["views"]["vision_dependence"]["true"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [line["pictures"] for line in lines] == [[f"{number}.png"] for number in range(8)]
    assert lines[1]["adapter"] == lines[1]["gold"] == "It is green." and lines[1]["base"] == "It is red."
    markdown = (tmp_path / "run" / "scores.md").read_text()
    assert "| exact match | 1.000 | 0.250 | +0.750 | 0..1 |" in markdown
    assert "| general ability: agreement with the base |" in markdown
    assert "gate: passed" in verdict.text()
    assert "8 of 8 held-out rows answered by both, 8 of them with blank and with swapped pictures" in markdown
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "scores.json",
        "scores.md",
        "answers.jsonl",
    }


def test_numbers_that_are_none_are_null_in_json(tmp_path: Path, processor: Processor) -> None:
    rows = text_rows(tmp_path, processor, 1)
    generator = ScriptedGenerator(processor, always("a"), always("a"))
    judging = replace(NO_GENERAL, gate=("loss <= base",))
    verdict = evaluate(
        generator.opened, processor, rows, ADAPTER, judging, losses=lambda _, with_adapter: float("nan")
    )
    content = verdict.as_json()
    json.dumps(content, allow_nan=False)
    assert not verdict.passed


# ---- order, memory, progress


def test_losses_come_before_the_generator_takes_the_base(tmp_path: Path, processor: Processor) -> None:
    rows = text_rows(tmp_path, processor)
    generator = ScriptedGenerator(processor, always("a"), always("b"))
    seen: list[tuple[int, bool, bool]] = []

    def losses(asked: Sequence[Conversation], with_adapter: bool) -> float:
        seen.append((len(asked), with_adapter, generator.is_open))
        return 0.5 if with_adapter else 1.0

    judging = replace(NO_GENERAL, gate=("loss <= base * 0.9",), max_rows=2)
    verdict = evaluate(generator.opened, processor, rows, ADAPTER, judging, losses=losses)
    assert seen == [(6, True, False), (6, False, False)]  # all rows, though only two are answered
    assert verdict.passed and (verdict.adapter["loss"], verdict.base["loss"]) == (0.5, 1.0)
    assert len(verdict.answers) == 2 and verdict.num_rows == 6
    assert generator.num_closed == 1


def test_the_generator_is_closed_when_judging_fails(tmp_path: Path, processor: Processor) -> None:
    def fail(_: object) -> str:
        raise RuntimeError("the device is gone")

    generator = ScriptedGenerator(processor, always("a"), fail)
    with pytest.raises(RuntimeError, match="gone"):
        judge(processor, text_rows(tmp_path, processor), generator, NO_GENERAL)
    assert generator.num_closed == 1


def test_the_base_answers_each_prompt_once(tmp_path: Path, processor: Processor) -> None:
    rows = color_rows(tmp_path, processor)
    generator = ScriptedGenerator(processor, always("x"), seeing(rows, processor))
    memory = AnswerMemory()
    for _ in range(2):
        evaluate(generator.opened, processor, rows, ADAPTER, NO_GENERAL, memory=memory)
    assert generator.num_asked(with_adapter=False) == 3 * len(rows)  # true, blank, swapped
    assert generator.num_asked(with_adapter=True) == 2 * 3 * len(rows)  # it may be another adapter


def test_prompts_are_made_in_portions_that_fit_into_memory(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = color_rows(tmp_path, processor)
    one = questions_of(rows, processor)[0].prompt(processor).images[0].pixels.nbytes
    for name, value, expected in (
        ("PORTION_PROMPTS", 3, [3, 3, 2]),
        ("PORTION_BYTES", 2 * one, [2, 2, 2, 2]),
    ):
        generator = ScriptedGenerator(processor, always("x"), always("y"))
        with monkeypatch.context() as patch:
            patch.setattr(answers, name, value)
            verdict = judge(processor, rows, generator, replace(NO_GENERAL, vision_rows=0))
        assert [count for count, of_adapter in generator.asked if of_adapter] == expected
        assert len(verdict.answers) == len(rows)


def test_progress_counts_every_answer(tmp_path: Path, processor: Processor) -> None:
    class Counter:
        def __init__(self) -> None:
            self.phases: list[list[object]] = []

        def begin(self, phase: str, total: int) -> None:
            self.phases.append([phase, total, 0])

        def advance(self) -> None:
            self.phases[-1][2] = int(str(self.phases[-1][2])) + 1

    rows, counter = color_rows(tmp_path, processor), Counter()
    generator = ScriptedGenerator(processor, always("x"), always("y"))
    evaluate(generator.opened, processor, rows, ADAPTER, Judging(), progress=counter)
    assert len(counter.phases) == 10
    assert [phase for phase in counter.phases if phase[1] != phase[2]] == []
    assert max(generator.max_tokens) == 256 and generator.max_tokens[-1] == 48


# ---- looking


def test_an_adapter_that_looks_depends_on_its_pictures(tmp_path: Path, processor: Processor) -> None:
    rows = color_rows(tmp_path, processor)
    generator = ScriptedGenerator(processor, base=always("It is red."), adapter=seeing(rows, processor))
    verdict = judge(processor, rows, generator, replace(NO_GENERAL, gate=("vision_dependence >= 0.1",)))
    views = verdict.vision["adapter"].views
    assert views["vision_dependence_exact"] == {"true": 1.0, "blank": 0.0, "swapped": 0.0}
    assert views["vision_dependence"] == {"true": 1.0, "blank": 0.0, "swapped": pytest.approx(2 / 3)}
    assert verdict.adapter["vision_dependence"] == pytest.approx(1 / 3)
    assert verdict.adapter["vision_dependence_exact"] == 1.0
    assert verdict.base["vision_dependence_exact"] == verdict.base["vision_dependence"] == 0.0
    assert verdict.passed


def test_an_adapter_that_only_guesses_depends_on_nothing(tmp_path: Path, processor: Processor) -> None:
    rows = color_rows(tmp_path, processor)
    generator = ScriptedGenerator(processor, base=always("no"), adapter=always("It is red."))
    verdict = judge(processor, rows, generator, replace(NO_GENERAL, gate=("vision_dependence >= 0.1",)))
    assert verdict.adapter["exact_match"] == 0.25  # a score it has without looking
    assert verdict.adapter["vision_dependence"] == 0.0
    assert not verdict.passed


def test_pictures_that_mislead_count_against_the_adapter(tmp_path: Path, processor: Processor) -> None:
    rows = color_rows(tmp_path, processor, 1)
    look = seeing(rows, processor)
    generator = ScriptedGenerator(
        processor, always(""), lambda prompt: "no" if look(prompt) != "nothing" else "It is red."
    )
    verdict = judge(processor, rows, generator, NO_GENERAL)
    assert verdict.adapter["vision_dependence_exact"] == -1.0
    assert set(verdict.vision["adapter"].views["vision_dependence"]) == {
        "true",
        "blank",
    }  # nothing to swap with


def test_a_swapped_picture_is_another_answer_s_and_of_like_size(tmp_path: Path, processor: Processor) -> None:
    from training.evaluation.vision import _Gallery

    rows = color_rows(tmp_path, processor)  # 0 and 4 red, 56 and 60 wide; 1 green, 57 wide; ...
    questions = questions_of(rows, processor)
    swap = _Gallery(questions).swapped(questions[0])
    assert swap is not None
    assert swap(questions[0].pictures[0]).image.getpixel((0, 0)) == (0, 128, 0)  # green: nearest in size
    swap = _Gallery([questions[0], questions[4]]).swapped(questions[0])
    assert swap is not None  # only the same answer is left: still another picture
    assert swap(questions[0].pictures[0]).image.size == (60, 56)
    assert _Gallery(questions[:1]).swapped(questions[0]) is None


def test_text_has_no_vision_dependence_and_a_rule_on_it_stops_the_run_at_once(
    tmp_path: Path, processor: Processor
) -> None:
    rows = text_rows(tmp_path, processor)
    generator = ScriptedGenerator(processor, always("a"), always("b"))
    judging = Judging(gate=("vision_dependence >= 0.1",))
    with pytest.raises(GateError, match="needs held-out rows with pictures"):
        check_judging(judging, rows, has_loss=True)
    with pytest.raises(GateError, match="needs held-out rows with pictures"):
        judge(processor, rows, generator, judging)
    assert generator.asked == []


def test_what_the_check_promises_is_what_is_computed(tmp_path: Path, processor: Processor) -> None:
    rows = color_rows(tmp_path, processor)
    generator = ScriptedGenerator(processor, always("a"), always("b"))
    promised = ("loss", "exact_match", "json_valid", "vision_dependence", "vision_dependence_exact",
                "general_agreement", "general_identical", "general_kl")  # fmt: skip
    judging = Judging(metrics=("json_valid", "exact_match"), gate=tuple(f"{name} <= 1" for name in promised))
    assert len(check_judging(judging, rows, has_loss=True)) == len(promised)
    verdict = evaluate(generator.opened, processor, rows, ADAPTER, judging, losses=lambda *_: 0.5)
    assert set(verdict.adapter) == set(promised)
    assert verdict.gate.passed


# ---- general ability


def test_general_ability_needs_no_right_answers(tmp_path: Path, processor: Processor) -> None:
    rows = text_rows(tmp_path, processor)
    judging = Judging(general=("Hello!", "Who are you?"))
    generator = ScriptedGenerator(
        processor,
        base=always("red kite"),
        adapter=lambda prompt: "red kite" if "Hello" in processor.decode(prompt.ids) else "red boat",
    )
    verdict = judge(processor, rows, generator, judging)
    assert verdict.adapter["general_identical"] == 0.5
    assert verdict.adapter["general_agreement"] == pytest.approx(0.75)
    even, leaning = torch.zeros(3).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    p, q = leaning.softmax(0), even.softmax(0)
    assert verdict.adapter["general_kl"] == pytest.approx(float((p * (p / q).log()).sum()))
    assert verdict.passed and "general_agreement" not in verdict.base


def test_prompts_are_of_the_base_s_own_world() -> None:
    assert general_prompts(POCKET) == POCKET_PROMPTS and general_prompts("Qwen/x") == PLAIN_PROMPTS
    for prompts in (POCKET_PROMPTS, PLAIN_PROMPTS):
        assert len(set(prompts)) == 20
    assert Judging.of(Recipe(eval_rows=7, max_new_tokens=9, gate=()), POCKET) == Judging(
        gate=(), max_rows=7, max_tokens=9, general=POCKET_PROMPTS
    )


# ---- loss


class CountedModel:
    """Labels cost 1 each, or 2 without the adapter."""

    def __init__(self) -> None:
        self._cost = 1.0

    def label_losses(self, batch: Batch) -> Tensor:
        return torch.full((batch.num_labels,), self._cost) + torch.arange(batch.num_labels)

    @contextmanager
    def disabled(self):  # type: ignore[no-untyped-def]
        self._cost = 2.0
        yield
        self._cost = 1.0


def batch_of(num_labels: int) -> Batch:
    ids = torch.arange(num_labels)
    return Batch(ids, ids, ids.expand(3, -1), (0, num_labels), torch.zeros(0, 4), (), (), ())


def test_the_held_out_loss_is_a_mean_over_labels() -> None:
    model = CountedModel()
    loss = HeldOutLoss(model, lambda _: [batch_of(3), batch_of(1)])
    assert loss([], True) == pytest.approx((1 + 2 + 3 + 1) / 4)
    assert loss([], False) == pytest.approx((2 + 3 + 4 + 2) / 4)
    assert loss([], True) == pytest.approx((1 + 2 + 3 + 1) / 4)


def test_without_rows_there_is_nothing_to_judge(processor: Processor) -> None:
    with pytest.raises(EvaluationError, match="no labels"):
        HeldOutLoss(CountedModel(), lambda _: [])([], True)
    generator = ScriptedGenerator(processor, always("a"), always("b"))
    with pytest.raises(EvaluationError, match="no held-out rows"):
        evaluate(lambda: nullcontext(generator), processor, [], ADAPTER, Judging())


def test_the_adapted_base_gives_the_loss_of_both_whatever_the_batches(
    tmp_path: Path, processor: Processor
) -> None:
    base = make_base()
    recipe = Recipe(preset=("language",), r=4, dropout=0.0)
    model = AdaptedBase(base, resolve_targets(recipe, base.module), recipe)
    rows, labeller = color_rows(tmp_path, base.processor, 5), Labeller(base.processor)
    before = HeldOutLoss(model, unaugmented(labeller, 2))(rows, True)
    for name, weight in model.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapter, again, plain = (
        HeldOutLoss(model, unaugmented(labeller, micro_batch))(rows, with_adapter)
        for micro_batch, with_adapter in ((2, True), (5, True), (3, False))
    )
    assert adapter == pytest.approx(again, rel=1e-5)
    assert plain == pytest.approx(before, rel=1e-5)  # untrained, it is the base
    assert abs(adapter - plain) > 1e-3


# ---- samples


def test_samples_show_the_same_prompts_at_each_step(tmp_path: Path, processor: Processor) -> None:
    rows = [*color_rows(tmp_path, processor, 3)]
    book = SampleBook(tmp_path / "samples", rows, processor, num_rows=2, max_tokens=8)
    generator = ScriptedGenerator(processor, always("no"), seeing(rows, processor))
    for step in (10, 20, 30):
        book.take(step, generator, ADAPTER)
    book.take(20, generator, ADAPTER)  # went on from a checkpoint at 10
    lines = [json.loads(line) for line in book.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 10, 20, 20]
    assert lines[0]["question"] == lines[2]["question"]
    assert all(line["base"] == "no" and line["adapter"] == line["gold"] for line in lines)
    assert generator.num_asked(with_adapter=False) == 2  # the base's are kept
    with Image.open(book.sheet(20)) as sheet:
        assert sheet.format == "PNG" and sheet.width == 960 and sheet.height > 2 * 200


def test_a_sheet_takes_any_text(tmp_path: Path) -> None:
    panel = Panel(None, "long " * 900, "", "x" * 5000, "a\n\n\tb\n" * 40, is_right=False)
    draw_sheet([panel, panel], "step 1", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height <= 2 * (4 * MAX_LINES * 19 + 32) + 60
        assert len(sheet.convert("L").getcolors(300) or []) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
