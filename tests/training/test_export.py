"""Export: the merged model is base and adapter, in the source's layout, whole or not there."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.weights import SiteWeights
from base.config import BaseConfig
from base.loader import load_base
from base.pocket import CHECKPOINT
from tests.support.checkpoints import Layout
from tests.support.packages import LAYOUTS
from tests.support.zoo import zoo
from tests.training.finished import (
    adapted,
    answers,
    leftovers,
    made_by_peft,
    relative,
    rewrite,
    small_checkpoint,
    stock,
    tensors_of,
)
from training.tools.base_files import BaseFiles
from training.tools.export import export
from training.tools.merge import figure, merged_weight
from training.tools.refusals import ExportRefused, FolderRefused
from training.tools.shards import Stored

SAMPLES = Path(__file__).parents[2] / "adapters" / "samples"
KINDS = ("rslora", "patterns", "everything", "dora_vision")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {"today": small_checkpoint(root / "today"), "old": small_checkpoint(root / "old", "old")}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_answers_as_base_and_adapter(
    kind: str, checkpoints: dict[Layout, Path], tmp_path: Path
) -> None:
    layout: Layout = "old" if KINDS.index(kind) % 2 else "today"
    checkpoint = checkpoints[layout]
    package = made_by_peft(checkpoint, tmp_path / "adapter", zoo()[kind])
    report = export(package, tmp_path / "merged", base=str(checkpoint), check_logits=False)
    wanted, base = adapted(checkpoint, package), answers(stock(checkpoint), checkpoint)
    made = answers(stock(tmp_path / "merged"), tmp_path / "merged")
    assert relative(made, wanted) < 0.03  # bf16 keeps 8 bits of each merged weight
    assert relative(made - base, wanted - base) < 0.05
    assert all(each.error <= 2**-8 * 1.01 and each.kept > 0.99 for each in report.sites)
    assert {path.name for path in checkpoint.iterdir()} <= {path.name for path in report.folder.iterdir()}


def test_wider_type_leaves_only_the_arithmetic_of_fp32(
    checkpoints: dict[Layout, Path], tmp_path: Path
) -> None:
    package = made_by_peft(checkpoints["old"], tmp_path / "adapter", zoo()["dora_vision"])
    export(
        package, tmp_path / "merged", base=str(checkpoints["old"]), dtype=torch.float32, check_logits=False
    )
    made = answers(stock(tmp_path / "merged"), tmp_path / "merged")
    assert relative(made, adapted(checkpoints["old"], package)) < 1e-5
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.float32
    }


def test_layout_and_untouched_tensors_stay_the_sources(
    checkpoints: dict[Layout, Path], tmp_path: Path
) -> None:
    package = made_by_peft(checkpoints["old"], tmp_path / "adapter", zoo()["rank16"])
    report = export(package, tmp_path / "merged", base=str(checkpoints["old"]), check_logits=False)
    before = load_file(checkpoints["old"] / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert list(before) == list(after)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {
        f"{each.site.replace('model.language_model', 'model')}.weight" for each in report.sites
    }
    assert report.num_untouched == len(before) - len(changed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapter_in_any_key_layout_is_merged_alike(
    layout: str, checkpoints: dict[Layout, Path], tmp_path: Path
) -> None:
    package = made_by_peft(checkpoints["today"], tmp_path / "adapter", zoo()["everything"])
    prefix = "base_model.model."
    named = {
        LAYOUTS[layout](name.removeprefix(prefix)): tensor for name, tensor in tensors_of(package).items()
    }
    plain = export(package, tmp_path / "plain", base=str(checkpoints["today"]), check_logits=False)
    rewrite(package, tensors=named)
    other = export(package, tmp_path / "other", base=str(checkpoints["today"]), check_logits=False)
    assert [each.site for each in other.sites] == [each.site for each in plain.sites]
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (
        tmp_path / "other/model.safetensors"
    ).read_bytes()


def test_large_models_are_cut_into_shards_with_an_index(
    checkpoints: dict[Layout, Path], tmp_path: Path
) -> None:
    package = made_by_peft(checkpoints["today"], tmp_path / "adapter", zoo()["rank4"])
    out = tmp_path / "merged"
    report = export(package, out, base=str(checkpoints["today"]), check_logits=False, max_shard_bytes=100_000)
    assert len(report.files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {name: path.name for path in sorted(out.glob("*.safetensors")) for name in load_file(path)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == report.num_bytes
    assert relative(answers(stock(out), out), adapted(checkpoints["today"], package)) < 0.03


def test_one_tensor_is_held_at_a_time(
    checkpoints: dict[Layout, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = BaseFiles.read

    def watched(self: BaseFiles, stored: Stored) -> Tensor:
        nonlocal most
        most = max(most, sum(each() is not None for each in alive))
        tensor = read(self, stored)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(BaseFiles, "read", watched)
    package = made_by_peft(checkpoints["today"], tmp_path / "adapter", zoo()["rank4"])
    export(package, tmp_path / "merged", base=str(checkpoints["today"]), check_logits=False)
    assert len(alive) > 100
    assert most <= 1


def test_sample_merges_into_the_pocket_base_and_the_server_loads_it(tmp_path: Path) -> None:
    report = export(SAMPLES / "patterns", tmp_path / "merged")
    assert report.logits is not None
    assert report.logits.of_spread < 0.01
    assert report.logits.of_effect < 0.01
    assert report.logits.effect > 1
    base = load_base(BaseConfig(source=str(tmp_path / "merged")))
    assert base.spec.quantization == "nf4"
    saved = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert saved["logits"]["error"] == report.logits.error
    assert (tmp_path / "merged/chat_template.jinja").read_bytes() == (
        CHECKPOINT / "chat_template.jinja"
    ).read_bytes()


def test_over_tolerance_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ExportRefused, match=r"the merged model is not base and adapter.*--dtype float32"):
        export(SAMPLES / "french", tmp_path / "merged", tolerance=1e-5)
    assert leftovers(tmp_path) == []


def test_adapter_that_rounding_would_lose_is_refused_and_fp32_keeps_it(
    checkpoints: dict[Layout, Path], tmp_path: Path
) -> None:
    package = made_by_peft(checkpoints["today"], tmp_path / "adapter", zoo()["rank4"])
    faint = {name: tensor * (1e-3 if "lora_B" in name else 1) for name, tensor in tensors_of(package).items()}
    rewrite(package, tensors=faint)
    base = str(checkpoints["today"])
    with pytest.raises(ExportRefused, match=r"rounding loses the adapter.*--dtype float32"):
        export(package, tmp_path / "merged", base=base)
    report = export(package, tmp_path / "merged", base=base, dtype=torch.float32)
    assert report.logits is not None
    assert report.logits.of_effect < 0.01
    assert json.loads((tmp_path / "merged/config.json").read_text()).get("dtype") == "float32"


def test_base_in_four_bits_is_refused_with_what_to_do(
    checkpoints: dict[Layout, Path], tmp_path: Path
) -> None:
    quantised = small_checkpoint(tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    package = made_by_peft(checkpoints["today"], tmp_path / "adapter", zoo()["rank4"])
    with pytest.raises(ExportRefused, match=r"in 4 bits.*cosine of 0.02 to 0.05.*--base"):
        export(package, tmp_path / "merged", base=str(quantised))
    assert not (tmp_path / "merged").exists()


def test_small_change_is_lost_in_nf4_and_kept_in_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(512, 512, generator=generator)).bfloat16()
    quantised, state = bnb.quantize_4bit(weight, quant_type="nf4")
    base = bnb.dequantize_4bit(quantised, state)
    a, b = torch.randn(8, 512, generator=generator), torch.randn(512, 8, generator=generator)
    scale = 0.005 * float(base.float().norm()) / float((b @ a).norm())
    merged = merged_weight(base, SiteWeights(a, b * scale, None))
    again = bnb.dequantize_4bit(*bnb.quantize_4bit(merged.bfloat16(), quant_type="nf4"))
    assert figure("site", base, merged, again).kept < 0.1
    assert figure("site", base, merged, merged.bfloat16()).kept > 0.9


def test_base_without_a_targeted_weight_is_refused(checkpoints: dict[Layout, Path], tmp_path: Path) -> None:
    package = made_by_peft(checkpoints["today"], tmp_path / "adapter", zoo()["rank4"])
    poor = small_checkpoint(tmp_path / "poor")
    tensors = load_file(poor / "model.safetensors")
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, poor / "model.safetensors")
    with pytest.raises(ExportRefused, match=r"no weight for model\.language_model\.layers\.1\.mlp\.up_proj"):
        export(package, tmp_path / "merged", base=str(poor))


def test_magnitude_that_the_type_cannot_hold_is_refused(
    checkpoints: dict[Layout, Path], tmp_path: Path
) -> None:
    package = made_by_peft(checkpoints["today"], tmp_path / "adapter", zoo()["dora"])
    large = {
        name: tensor * (1e6 if "magnitude" in name else 1) for name, tensor in tensors_of(package).items()
    }
    rewrite(package, tensors=large)
    with pytest.raises(ExportRefused, match="do not fit float16"):
        export(package, tmp_path / "merged", base=str(checkpoints["today"]), dtype=torch.float16)
    assert leftovers(tmp_path) == ["adapter"]


def test_a_folder_with_files_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(FolderRefused, match="holds files already"):
        export(SAMPLES / "french", tmp_path / "merged")
    assert leftovers(tmp_path / "merged") == ["mine.txt"]
