"""A package: whole or absent, what it says is what is in it, and every other path computes as the engine serves it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from adapters.profile import BaseFacts, GateFacts, ProcessorFacts, read_profile
from adapters.validation import Limits, check_package
from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from base.pocket import CHECKPOINT
from base.probes import probe_prompts
from engine.offline import OfflineEngine
from tests.support.oracle import Oracle, same_where_certain
from tests.support.packages import make_package, tiny_sites
from tests.training.learnable import batch_of, make_base, pictured, texts
from training.model.model import AdaptedBase
from training.package.package import (
    PackageFacts,
    agreement,
    base_facts,
    processor_facts,
    record_probes,
    trainer_logits,
    write_package,
)
from training.recipe.recipe import Recipe
from training.targets.targets import resolve_targets
from training.tools.refusals import FolderRefused


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return make_base()


def learnt(base: BaseModel, **fields: object) -> AdaptedBase:
    """After a few steps on every part."""
    recipe = Recipe(**{"preset": ("all",), "r": 4, "dropout": 0.0, **fields})  # type: ignore[arg-type]
    model = AdaptedBase(base, resolve_targets(recipe, base.module), recipe)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=3e-3)
    batch = batch_of(base, [*pictured(2), *texts()])
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(batch)
        (loss.total / loss.num_labels).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("fields", [{}, {"rslora": True, "alpha": 12.0}, {"dora": True}], ids=str)
def test_served_logits_are_the_trainer_s_and_training_goes_on(
    base: BaseModel, tmp_path: Path, fields: dict[str, object]
) -> None:
    model = learnt(base, **fields)
    batch = batch_of(base, texts())
    model.save(tmp_path / "adapter")
    expected = [trainer_logits(model)(prompt) for prompt in probe_prompts(base.processor)]
    before = model.label_losses(batch)
    # the compiled kernel sums in another order than PEFT
    with model.bare(), OfflineEngine(base, cpu_adapters="torch") as engine:
        found = agreement(expected, engine, base.processor, tmp_path / "adapter")
        untouched = engine.last_logits(probe_prompts(base.processor)[0], None)
    assert not torch.equal(untouched, expected[0])  # the adapter acts, or equality would say nothing
    assert torch.equal(model.label_losses(batch), before)
    model.train()(batch).total.backward()
    assert all(
        parameter.grad is not None for parameter in model.trainable().values() if parameter.requires_grad
    )
    model.detach()
    assert found.max_difference == 0
    assert found.is_exact


@dataclass(frozen=True)
class Made:
    folder: Path
    served: BaseModel
    engine: OfflineEngine


@pytest.fixture(scope="module")
def made(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A package as a run makes it: trained in fp32, probed on the base that serves."""
    root = tmp_path_factory.mktemp("run")
    model = learnt(base, r=8, lora_plus=None)
    model.save(root / "adapter")
    model.detach()
    served = load_base(BaseConfig(device="cpu"))
    with OfflineEngine(served) as engine:
        facts = PackageFacts(
            name="colors",
            base=base_facts(served),
            processor=processor_facts(served.processor),
            recipe={"r": 8, "preset": ["all"], "lr": 3e-3},
            data={"digest": "d" * 64, "rows": 4, "labels": 40},
            scores={"loss": 0.25, "exact_match": 0.5},
            base_scores={"loss": 2.5, "exact_match": 0.0},
            gate=GateFacts(True, ("loss 0.25 <= base 2.5: holds",)),
            environment={"torch": torch.__version__, "device": "cpu"},
            probes=record_probes(engine, served.processor, root / "adapter"),
        )
        (root / "loss.png").write_bytes(b"\x89PNG")
        (root / "samples.jsonl").write_text("{}\n")
        folder = write_package(
            root / "colors", root / "adapter", facts, beside=[root / "loss.png", root / "samples.jsonl"]
        )
        yield Made(folder, served, engine)


def test_the_package_holds_what_it_says(made: Made) -> None:
    profile = read_profile(made.folder)
    assert profile is not None
    assert profile.base.fingerprint == made.served.spec.fingerprint
    assert (profile.profile["kind"], profile.profile["rank"], profile.profile["weights_dtype"]) == (
        "lora",
        8,
        "float32",
    )
    assert profile.profile["parts"] == {"language": 28, "merger": 2, "vision": 20}
    assert profile.profile["num_modules"] == 50
    assert len(profile.probes) == 2
    assert {path.name for path in made.folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lorikeet.json", "README.md", "loss.png", "samples.jsonl",
    }  # fmt: skip


def test_the_package_passes_the_engine_s_own_door(made: Made) -> None:
    """Fingerprint, digest and probes: all that a server holds against it."""
    prompt = probe_prompts(made.served.processor)[0]
    logits = made.engine.last_logits(prompt, made.folder)
    profile = read_profile(made.folder)
    assert profile is not None
    assert all(float(logits[number]) == logit for number, logit in profile.probes[0].top)


def test_no_path_of_this_machine_is_in_it(made: Made) -> None:
    for path in made.folder.iterdir():
        content = path.read_bytes()
        assert str(made.folder.parent).encode() not in content, path.name
        assert str(CHECKPOINT).encode() not in content, path.name
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == made.served.spec.name


def test_stock_peft_and_transformers_answer_as_the_engine_does(made: Made) -> None:
    oracle = Oracle(CHECKPOINT, adapters={"colors": made.folder})
    for prompt in probe_prompts(made.served.processor):
        reference = oracle.generate(prompt, 12, "colors")
        assert reference.tokens != oracle.generate(prompt, 12).tokens
        answer = made.engine.generate([prompt], made.folder, max_tokens=12)[0]
        end = min(
            (reference.tokens.index(e) for e in made.served.spec.eos_token_ids if e in reference.tokens),
            default=12,
        )
        cut = replace(reference, tokens=reference.tokens[:end], margins=reference.margins[:end])
        assert cut.num_certain() >= 1
        assert same_where_certain(answer, cut)


def test_the_card_tells_the_scores_beside_the_base_s(made: Made) -> None:
    text = (made.folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: peft\n")
    for line in ("| exact_match | 0.5 | 0 |", "The gate was passed:", "| rows | 4 |", "PeftModel.from_pretrained",
                 "/v1/adapters", "![loss.png](loss.png)", "NF4"):  # fmt: skip
        assert line in text, line


# ---- writing


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_package(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))


FACTS = PackageFacts("tiny", BaseFacts("org/tiny", None, "", "nf4", "bfloat16"), ProcessorFacts())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_without_scores_the_card_says_so_and_the_server_takes_it(adapter: Path, tmp_path: Path) -> None:
    folder = write_package(tmp_path / "out" / "tiny", adapter, FACTS)
    assert "it was not judged" in (folder / "README.md").read_text()
    assert check_package(folder, tiny_sites(), Limits(), []).num_sites == 4
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()


def test_an_existing_folder_is_refused_and_left_alone(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(FolderRefused):
        write_package(tmp_path / "out", adapter, FACTS)
    assert names(tmp_path / "out") == {"notes"}


@pytest.mark.parametrize("is_there", [False, True])
def test_what_fails_half_way_leaves_nothing(adapter: Path, tmp_path: Path, is_there: bool) -> None:
    folder = tmp_path / "out" / "tiny"
    if is_there:
        write_package(folder, adapter, FACTS)
    before = names(folder) if is_there else None
    for wrong in (replace(FACTS, scores={"loss": float("nan")}), replace(FACTS, name="x" * 5000)):
        with pytest.raises(ValueError, match=r"lorikeet\.json"):
            write_package(folder, adapter, wrong, replace=True)
    with pytest.raises(FileNotFoundError):
        write_package(folder, adapter, FACTS, beside=[tmp_path / "absent.png"], replace=True)
    assert names(tmp_path / "out" if folder.parent.exists() else tmp_path) - {"adapter", "out"} <= {"tiny"}
    assert (names(folder) if folder.exists() else None) == before


def test_a_file_beside_may_not_take_a_package_s_own_name(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name is taken"):
        write_package(tmp_path / "out", adapter, FACTS, beside=[adapter / "adapter_config.json"])


def test_a_reader_never_sees_a_partial_package_while_it_is_replaced(adapter: Path, tmp_path: Path) -> None:
    folder = write_package(tmp_path / "tiny", adapter, FACTS)
    faults: list[str] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            try:
                if len(names(folder)) != 4:
                    faults.append("partial")
            except FileNotFoundError:
                faults.append("absent")

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(10):
        write_package(folder, adapter, replace(FACTS, name=f"tiny-{i}"), replace=True)
    is_over.set()
    reader.join()
    profile = read_profile(folder)
    assert profile is not None
    assert profile.name == "tiny-9"
    assert names(tmp_path) == {"adapter", "tiny"}
    # a listing that began before an exchange may end in the old folder's deletion; never a mix in the new one
    assert "absent" not in faults
