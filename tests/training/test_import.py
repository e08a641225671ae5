"""Import: foreign adapters become plain packages that act as they did, or are refused with every reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from adapters.sites import discover_sites
from adapters.validation import Limits, check_package
from tests.support.oracle import load_stock
from tests.support.packages import LAYOUTS
from tests.support.zoo import ATTENTION, EVERYTHING, LANGUAGE, zoo
from tests.training.finished import (
    adapted,
    answers,
    config_of,
    leftovers,
    made_by_peft,
    relative,
    rewrite,
    small_checkpoint,
    stock,
    tensors_of,
    trained_from,
)
from training.tools.importing import import_adapter
from training.tools.refusals import ImportRefused

PREFIX = "base_model.model."
Rename = Callable[[str], str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="module")
def packages(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packages")
    kinds = ("everything", "rslora", "patterns", "dora_vision", "rank4")
    return {kind: made_by_peft(checkpoint, root / kind, zoo()[kind]) for kind in kinds}


def copied(source: Path, folder: Path, rename: Rename = lambda name: name, **config: object) -> Path:
    """A package with its tensors renamed and its configuration changed."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    rewrite(
        folder, tensors={rename(name): tensor for name, tensor in tensors_of(source).items()}, config=config
    )
    return folder


def serves(folder: Path, checkpoint: Path) -> str:
    """What a server over this base says of it: its kind, or the refusal as an error."""
    return check_package(folder, discover_sites(stock(checkpoint)), Limits(), ()).kind


@pytest.mark.parametrize("kind", ["everything", "rslora", "patterns", "dora_vision"])
def test_adapter_of_stock_peft_answers_the_same_and_is_served(
    kind: str, checkpoint: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    report = import_adapter(packages[kind], tmp_path / "plain", check_logits=kind == "everything")
    assert relative(adapted(checkpoint, tmp_path / "plain"), adapted(checkpoint, packages[kind])) < 1e-5
    assert serves(tmp_path / "plain", checkpoint) == ("dora" if "dora" in kind else "lora")
    assert report.num_silent == 0
    assert (report.logits is not None) == (kind == "everything")
    assert report.logits is None or report.logits.effect > 0.1


@pytest.mark.parametrize("infix", ["", ".default"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout_gives_the_same_package(
    layout: str, infix: str, packages: dict[str, Path], tmp_path: Path
) -> None:
    def rename(name: str) -> str:
        stem, weight = (name[:-7], ".weight") if name.endswith(".weight") else (name, "")
        return LAYOUTS[layout](stem.removeprefix(PREFIX)) + infix + weight

    foreign = copied(packages["everything"], tmp_path / "foreign", rename)
    report = import_adapter(foreign, tmp_path / "plain", check_logits=False)
    made, wanted = tensors_of(tmp_path / "plain"), tensors_of(packages["everything"])
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())
    assert all(delta > 0 for delta in report.deltas.values())


def test_old_layout_with_patterns_of_its_own_spelling(
    checkpoint: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    """Patterns are expressions over the names that the adapter's own transformers had."""
    foreign = copied(
        packages["patterns"],
        tmp_path / "foreign",
        lambda name: PREFIX + LAYOUTS["bare_before_4_52"](name.removeprefix(PREFIX)),
        target_modules=r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        rank_pattern={r"model\.layers\.\d+\.self_attn\.q_proj": 3, "layers.1.mlp.down_proj": 20},
        alpha_pattern={r"^model\.layers\.[01]\.self_attn\.v_proj": 60, "layers.0.self_attn.o_proj": 6},
    )
    import_adapter(foreign, tmp_path / "plain", check_logits=False)
    assert relative(adapted(checkpoint, tmp_path / "plain"), adapted(checkpoint, packages["patterns"])) < 1e-5


def kohya(package: Path, *, dots: bool = False, alpha: float = 24.0) -> dict[str, Tensor]:
    """The same numbers as kohya's trainers name them; a rank of 8 and this alpha."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors_of(package).items():
        module, _, role = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        old = LAYOUTS["bare_before_4_52"](module)
        stem = old if dots else "lora_unet_" + old.replace(".", "_")
        named[f"{stem}.lora_{'down' if role == 'A' else 'up'}.weight"] = tensor
        named[f"{stem}.alpha"] = torch.tensor(alpha)
    return named


@pytest.mark.parametrize("dots", [False, True])
def test_kohyas_names_without_a_configuration(
    dots: bool, checkpoint: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    save_file(kohya(packages["everything"], dots=dots), tmp_path / "style.safetensors")
    report = import_adapter(
        tmp_path / "style.safetensors", tmp_path / "plain", base=str(checkpoint), check_logits=False
    )
    assert (
        relative(adapted(checkpoint, tmp_path / "plain"), adapted(checkpoint, packages["everything"])) < 1e-5
    )
    assert "no adapter_config.json" in report.text


def test_factors_stored_the_other_way_round(
    checkpoint: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    turned = {
        name.removeprefix(PREFIX)
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): tensor.T
        for name, tensor in tensors_of(packages["everything"]).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in turned.items()}, tmp_path / "turned.safetensors")
    import_adapter(
        tmp_path / "turned.safetensors",
        tmp_path / "plain",
        base=str(checkpoint),
        alpha=24,
        check_logits=False,
    )
    assert (
        relative(adapted(checkpoint, tmp_path / "plain"), adapted(checkpoint, packages["everything"])) < 1e-5
    )


def test_alpha_that_no_file_says_is_asked_for(
    checkpoint: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    save_file(tensors_of(packages["rank4"]), tmp_path / "bare.safetensors")
    with pytest.raises(ImportRefused, match="--alpha"):
        import_adapter(tmp_path / "bare.safetensors", tmp_path / "plain", base=str(checkpoint))


def test_fan_in_fan_out_is_set_right_and_noted(
    checkpoint: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    foreign = copied(packages["rank4"], tmp_path / "foreign", fan_in_fan_out=True)
    report = import_adapter(foreign, tmp_path / "plain", check_logits=False)
    assert config_of(tmp_path / "plain")["fan_in_fan_out"] is False
    assert any("fan_in_fan_out" in note for note in report.notes)
    assert relative(adapted(checkpoint, tmp_path / "plain"), adapted(checkpoint, foreign)) < 1e-5


def test_one_of_several_adapters_in_a_file_is_chosen_by_name(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    both = {
        name.replace(".weight", f".{adapter}.weight"): tensor * factor
        for adapter, factor in (("old", 1.0), ("new", 2.0))
        for name, tensor in tensors_of(packages["rank4"]).items()
    }
    foreign = copied(packages["rank4"], tmp_path / "foreign")
    rewrite(foreign, tensors=both)
    with pytest.raises(ImportRefused, match=r"several adapters \(new, old\).*--adapter-name"):
        import_adapter(foreign, tmp_path / "plain", check_logits=False)
    import_adapter(foreign, tmp_path / "plain", adapter_name="new", check_logits=False)
    wanted = tensors_of(packages["rank4"])
    assert all(
        torch.equal(tensor, 2 * wanted[name]) for name, tensor in tensors_of(tmp_path / "plain").items()
    )


@pytest.mark.parametrize(
    ("init", "settings"),
    [
        ("pissa", {}),
        ("olora", {}),
        ("pissa", {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 10}}),
        ("pissa", {"use_dora": True}),
        ("pissa_niter_4", {}),
    ],
    ids=["pissa", "olora", "pissa rslora patterns", "pissa dora", "pissa_niter"],
)
def test_initialisation_that_changed_the_base_is_made_plain(
    init: str, settings: dict[str, object], checkpoint: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=8, lora_alpha=8, target_modules=LANGUAGE, init_lora_weights=init, **settings)  # type: ignore[arg-type]
    initial, trained, wanted = trained_from(checkpoint, tmp_path, config)
    base = answers(stock(checkpoint), checkpoint)
    if init != "pissa_niter_4":
        report = import_adapter(trained, tmp_path / "by_base", check_logits=False)
        made = adapted(checkpoint, tmp_path / "by_base")
        assert relative(made - base, wanted - base) < 1e-3
        assert report.package.rank == 16
    import_adapter(trained, tmp_path / "by_initial", initial=initial, check_logits=False)
    made = adapted(checkpoint, tmp_path / "by_initial")
    assert relative(made - base, wanted - base) < 1e-3
    assert config_of(tmp_path / "by_initial")["init_lora_weights"] is True


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("pissa_niter_4", "randomised.*--initial"),
        ("corda", "covariance.*--initial"),
        ("lora_ga", "gradients.*--initial"),
        ("loftq", "full rank.*retrain"),
    ],
)
def test_initialisation_that_cannot_be_had_again_is_refused_with_why(
    init: str, reason: str, packages: dict[str, Path], tmp_path: Path
) -> None:
    foreign = copied(packages["rank4"], tmp_path / "foreign", init_lora_weights=init)
    with pytest.raises(ImportRefused, match=reason):
        import_adapter(foreign, tmp_path / "plain")


def test_pissa_of_another_base_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION, init_lora_weights="pissa")
    _, trained, _ = trained_from(checkpoint, tmp_path, config)
    from tests.support.checkpoints import make_checkpoint
    from tests.training.finished import SMALL

    other = make_checkpoint(tmp_path / "other", seed=1, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ImportRefused, match="not those that the adapter set out from"):
        import_adapter(trained, tmp_path / "plain", base=str(other))


def test_pissa_without_its_base_is_refused(packages: dict[str, Path], tmp_path: Path) -> None:
    foreign = copied(
        packages["rank4"],
        tmp_path / "foreign",
        init_lora_weights="pissa",
        base_model_name_or_path="nobody/has-it",
    )
    with pytest.raises(ImportRefused, match=r"name the 16-bit base.*--base"):
        import_adapter(foreign, tmp_path / "plain")


def test_everything_that_changes_the_shared_base_is_named_at_once(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    foreign = copied(
        packages["rank4"],
        tmp_path / "foreign",
        bias="lora_only",
        modules_to_save=["lm_head"],
        trainable_token_indices=[3],
    )
    extra = {
        "base_model.model.model.language_model.embed_tokens.weight": torch.ones(4, 4),
        "base_model.model.lm_head.modules_to_save.weight": torch.ones(4, 4),
    }
    rewrite(foreign, tensors=tensors_of(packages["rank4"]) | extra)
    with pytest.raises(ImportRefused) as refusal:
        import_adapter(foreign, tmp_path / "plain")
    for named in ("'bias'", "'modules_to_save'", "'trainable_token_indices'", "embed_tokens", "lm_head"):
        assert named in str(refusal.value)
    assert len(refusal.value.reasons) == 4
    assert leftovers(tmp_path) == ["foreign"]


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "lora.ckpt"])
def test_pickles_are_refused_by_name_with_how_to_convert(name: str, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / name).write_bytes(b"\x80\x02never read")
    for source in (tmp_path / "foreign", tmp_path / "foreign" / name):
        with pytest.raises(ImportRefused, match=rf"{re.escape(name)} is a pickle.*save_file"):
            import_adapter(source, tmp_path / "plain")


def test_adapter_without_effect_is_refused(packages: dict[str, Path], tmp_path: Path) -> None:
    foreign = copied(packages["rank4"], tmp_path / "foreign")
    zeroed = {name: tensor * ("lora_A" in name) for name, tensor in tensors_of(packages["rank4"]).items()}
    rewrite(foreign, tensors=zeroed)
    with pytest.raises(ImportRefused, match="changes nothing"):
        import_adapter(foreign, tmp_path / "plain")


def test_silent_modules_are_counted_and_left_out(packages: dict[str, Path], tmp_path: Path) -> None:
    foreign = copied(packages["rank4"], tmp_path / "foreign")
    some = {
        name: tensor * (0 if "layers.0." in name and "lora_B" in name else 1)
        for name, tensor in tensors_of(packages["rank4"]).items()
    }
    rewrite(foreign, tensors=some)
    report = import_adapter(foreign, tmp_path / "plain", check_logits=False)
    assert (report.num_silent, len(report.deltas)) == (7, 7)


def test_tensors_that_peft_would_drop_are_not_imported(packages: dict[str, Path], tmp_path: Path) -> None:
    foreign = copied(packages["rank4"], tmp_path / "foreign", target_modules=["q_proj", "v_proj"])
    with pytest.raises(ImportRefused, match="10 modules are not among"):
        import_adapter(foreign, tmp_path / "plain", check_logits=False)


def test_adapter_of_other_widths_is_refused(packages: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="made for another base"):
        import_adapter(packages["rank4"], tmp_path / "plain", base="pocket")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"r": 7}, "rank 4, and adapter_config.json says 7"),
        ({"use_dora": True}, "DoRA magnitude"),
        ({"lora_bias": True}, "'lora_bias'"),
        ({"option_of_tomorrow": 3}, "'option_of_tomorrow'"),
    ],
)
def test_configurations_that_cannot_be_served_are_refused(
    config: dict[str, object], reason: str, packages: dict[str, Path], tmp_path: Path
) -> None:
    foreign = copied(packages["rank4"], tmp_path / "foreign")
    rewrite(foreign, config=config)
    with pytest.raises(ImportRefused, match=reason):
        import_adapter(foreign, tmp_path / "plain", check_logits=False)


def test_without_the_base_names_and_shapes_decide_and_it_says_so(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    foreign = copied(packages["everything"], tmp_path / "foreign", base_model_name_or_path="nobody/has-it")
    report = import_adapter(foreign, tmp_path / "plain")
    assert report.logits is None
    assert "not here" in report.text
    assert config_of(tmp_path / "plain")["base_model_name_or_path"] == "nobody/has-it"


def test_provenance_is_written(packages: dict[str, Path], tmp_path: Path) -> None:
    report = import_adapter(packages["rslora"], tmp_path / "plain", name="invoice", check_logits=False)
    profile = json.loads((tmp_path / "plain" / "lorikeet.json").read_text())
    assert profile["format"] == 1
    assert profile["name"] == "invoice"
    assert profile["import"]["weights_sha256"] == report.source_sha256
    assert profile["import"]["config"]["use_rslora"] is True
    assert "fingerprint" not in profile["base"]


def test_names_of_no_linear_are_listed(packages: dict[str, Path], tmp_path: Path) -> None:
    foreign = copied(
        packages["rank4"], tmp_path / "foreign", lambda name: name.replace("self_attn", "attention")
    )
    with pytest.raises(ImportRefused, match="16 tensors are no LoRA weights"):
        import_adapter(foreign, tmp_path / "plain", check_logits=False)


def test_target_everything_is_one_expression(packages: dict[str, Path]) -> None:
    assert config_of(packages["everything"])["target_modules"] == EVERYTHING


def test_base_stored_in_4_bits_proves_an_effect_and_gives_no_pissa_back(
    checkpoint: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    load_stock(checkpoint).save_pretrained(tmp_path / "quantised")
    for path in checkpoint.iterdir():
        if not (tmp_path / "quantised" / path.name).exists():
            shutil.copy(path, tmp_path / "quantised")
    base = str(tmp_path / "quantised")
    report = import_adapter(packages["everything"], tmp_path / "plain", base=base)
    assert report.logits is not None and report.logits.effect > 0.1
    assert "taken for" in report.text
    foreign = copied(packages["rank4"], tmp_path / "foreign", init_lora_weights="pissa")
    with pytest.raises(ImportRefused, match="name the 16-bit base"):
        import_adapter(foreign, tmp_path / "other", base=base)
