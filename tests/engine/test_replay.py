"""A package's own probes, asked again before the adapter is shown to anyone."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterRejected, RejectReason
from adapters.package import file_sha256
from adapters.profile import PackageProfile, RecordedProbe, parse_profile, profile_json
from adapters.ref import AdapterRef
from base.pocket import CHECKPOINT
from engine.observer import AdapterProven
from engine.offline import OfflineEngine
from engine.replay import compare
from engine.runner import Runner
from tests.support.serving import Rig
from training.package.package import (
    PackageFacts,
    base_facts,
    processor_facts,
    record_probes,
    write_package,
)

SAMPLES = Path(__file__).resolve().parents[2] / "adapters" / "samples"
Change = Callable[[PackageProfile], PackageProfile]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    made = Rig(str(CHECKPOINT), tmp_path_factory.mktemp("state"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as training makes it: on another copy of the base, through an engine of its own."""
    from base.config import BaseConfig
    from base.loader import load_base

    base = load_base(BaseConfig(device="cpu"))
    with OfflineEngine(base) as engine:
        probes = record_probes(engine, base.processor, SAMPLES / "french")
    facts = PackageFacts("french", base_facts(base), processor_facts(base.processor), probes=probes)
    return write_package(tmp_path_factory.mktemp("made") / "french", SAMPLES / "french", facts)


def load(rig: Rig, folder: Path, name: str) -> AdapterProven | None:
    """What was seen of its probes; None where nothing was."""
    rig.registry.register(name, folder)
    rig.recorder.events.clear()
    asyncio.run(rig.engine.load_adapter(rig.registry.resolve(name)))
    return next((event for event in rig.recorder.events if isinstance(event, AdapterProven)), None)


def variant(package: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(package, folder)
    profile = parse_profile((folder / "lorikeet.json").read_bytes())
    (folder / "lorikeet.json").write_bytes(profile_json(change(profile)))
    return folder


def probes_with(**fields: object) -> Change:
    return lambda profile: replace(
        profile,
        probes=tuple(replace(probe, **fields) for probe in profile.probes),  # type: ignore[arg-type]
    )


def shifted(field: str, by: float) -> Change:
    """Every other recorded logit moved, so that no constant explains it."""

    def change(profile: PackageProfile) -> PackageProfile:
        probes = []
        for probe in profile.probes:
            top: tuple[tuple[int, float], ...] = getattr(probe, field)
            moved = tuple((number, logit + by * (i % 2)) for i, (number, logit) in enumerate(top))
            probes.append(replace(probe, **{field: moved}))  # type: ignore[arg-type]
        return replace(profile, probes=tuple(probes))

    return change


def test_on_the_path_that_recorded_them_not_one_bit_differs(rig: Rig, package: Path) -> None:
    proven = load(rig, package, "exact")
    assert proven is not None
    assert proven.difference == 0
    assert proven.is_exact


def test_an_adapter_that_has_not_arrived_is_beyond_the_limit(rig: Rig, package: Path, tmp_path: Path) -> None:
    """So that no tolerance hides what it is for: here what was recorded is the base's own answer."""

    def change(profile: PackageProfile) -> PackageProfile:
        return replace(profile, probes=tuple(replace(p, top=p.base_top) for p in profile.probes))

    with pytest.raises(AdapterRejected) as caught:
        load(rig, variant(package, tmp_path / "absent", change), "absent")
    assert caught.value.reason is RejectReason.PROBE_MISMATCH


def test_a_difference_that_rounding_explains_is_told_and_allowed(
    rig: Rig, package: Path, tmp_path: Path
) -> None:
    proven = load(rig, variant(package, tmp_path / "near", shifted("top", 0.01)), "near")
    assert proven is not None
    assert proven.difference == pytest.approx(0.01, abs=1e-4)
    assert proven.is_exact  # by the digest of all logits, which was left as it was


REFUSED = {
    "the adapter answered otherwise": (shifted("top", 5.0), RejectReason.PROBE_MISMATCH, "package it again"),
    "the base answered otherwise": (shifted("base_top", 2.0), RejectReason.PROBE_MISMATCH, "proven on a base"),
    "the prompts were others": (
        probes_with(ids_sha256="0" * 64), RejectReason.PROBE_MISMATCH, "this base's processor differs"),
    "a token that the base lacks": (
        probes_with(top=((1 << 20, 1.0),)), RejectReason.BAD_CONFIG, "this base has 1024"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_rounding_does_not_explain_is_refused(
    rig: Rig, package: Path, tmp_path: Path, kind: str
) -> None:
    change, reason, words = REFUSED[kind]
    with pytest.raises(AdapterRejected, match=words) as caught:
        load(rig, variant(package, tmp_path / "changed", change), f"refused-{len(kind)}")
    assert caught.value.reason is reason


def test_the_part_of_the_processor_that_differs_is_named(rig: Rig, package: Path, tmp_path: Path) -> None:
    def change(profile: PackageProfile) -> PackageProfile:
        other = replace(profile.processor, template_sha256="1" * 64)
        return probes_with(ids_sha256="0" * 64)(replace(profile, processor=other))

    with pytest.raises(AdapterRejected, match="chat template differs"):
        load(rig, variant(package, tmp_path / "template", change), "template")


def test_another_scale_than_it_was_made_with_is_noticed(rig: Rig, package: Path, tmp_path: Path) -> None:
    """The classic silent fault: the same weights, another alpha. All about the package is sound but its answers."""
    folder = shutil.copytree(package, tmp_path / "scaled")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] = config["lora_alpha"] / 2
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterRejected, match="does not answer as when it was made") as caught:
        load(rig, folder, "scaled")
    assert caught.value.reason is RejectReason.PROBE_MISMATCH


def test_weights_that_were_changed_are_noticed_with_and_without_their_digest(
    rig: Rig, package: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(package, tmp_path / "weights")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k: v * 1.5 if "lora_B" in k else v for k, v in weights.items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterRejected) as caught:
        rig.registry.register("weights", folder)
    assert caught.value.reason is RejectReason.DIGEST_MISMATCH
    with open(folder / "adapter_model.safetensors", "rb") as file:
        digest = file_sha256(file)
    profile = parse_profile((folder / "lorikeet.json").read_bytes())
    (folder / "lorikeet.json").write_bytes(profile_json(replace(profile, weights_sha256=digest)))
    with pytest.raises(AdapterRejected) as caught:
        load(rig, folder, "weights")
    assert caught.value.reason is RejectReason.PROBE_MISMATCH


def test_a_package_cannot_make_the_server_ask_more_than_its_two_prompts(
    rig: Rig, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flood(profile: PackageProfile) -> PackageProfile:
        strange = [
            replace(profile.probes[0], text=f"Write a book, volume {i}.", picture_side=4096) for i in range(6)
        ]
        return replace(profile, name="flood", probes=(*profile.probes, *strange))

    folder = variant(package, tmp_path / "flood", flood)
    rows: list[int] = []
    run = Runner.run

    def counted(self: Runner, plan: object) -> object:
        rows.append(plan.num_tokens)  # type: ignore[attr-defined]
        return run(self, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "run", counted)
    assert load(rig, folder, "flood") is not None
    longest = max(len(prompt.ids) for prompt in rig.core._swaps._proving._probe._prompts.values())
    assert len(rows) <= 3
    assert max(rows) <= longest


def test_probes_of_other_prompts_alone_prove_nothing_and_refuse_nothing(
    rig: Rig, package: Path, tmp_path: Path
) -> None:
    folder = variant(package, tmp_path / "strange", probes_with(text="Who are you?"))
    assert load(rig, folder, "strange") is None


def test_a_package_without_a_word_of_itself_loads_as_before(rig: Rig, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(SAMPLES / "json" / name, tmp_path / name)
    assert load(rig, tmp_path, "plain") is None


def test_logits_that_are_no_numbers_are_beyond_every_tolerance() -> None:
    """``NaN <= limit`` is false, and so must be the way in which it is asked."""
    probe = RecordedProbe("a", None, hashlib.sha256().hexdigest(), ((0, 1.0),), ((0, 1.0),))
    logits = torch.tensor([1.0, 2.0])
    ref = AdapterRef("a", 1, "d")
    assert compare(ref, probe, logits, logits).difference == 0
    for ours, base in (
        (torch.tensor([float("nan"), 2.0]), logits),
        (logits, torch.tensor([float("nan"), 2.0])),
    ):
        with pytest.raises(AdapterRejected):
            compare(ref, probe, ours, base)
