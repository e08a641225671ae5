"""The commands for finished adapters: what they print, what they end with, and that judging sees the very package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from adapters.errors import AdapterRejected
from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from base.processor import Message, PromptInputs, TextPart
from base.prompt import ImagePart
from engine.offline import OfflineEngine
from tests.support.scenes import scene
from tests.support.zoo import zoo
from tests.training.finished import made_by_peft, relative, small_checkpoint
from training.commands.adapters import FAILED, GATE, REFUSED, StoredType, register
from training.data.faults import Origin
from training.data.formats import Conversation, PictureRef, Turn
from training.data.labels import Labeller
from training.generation import Generator
from training.model.collator import Collator, Examples
from training.model.loading import load_training_base
from training.model.model import AdaptedBase
from training.recipe.recipe import Recipe
from training.tools.appraisal import state_of, targets_of
from training.tools.base_files import open_base
from training.tools.plain import read_adapter

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "adapters" / "samples"
PAGE = (ROOT / "docs" / "adapter-tools.md").read_text("utf-8")
ROWS = tuple((f"Say number {number}.", f"number {number}") for number in range(4))


class Parrot:
    """Knows every answer, or none: with the adapter as ``adapter`` says, without it as ``base`` says."""

    def __init__(self, base: BaseModel, *, adapter: bool, bare: bool) -> None:
        self._processor, self._knows = base.processor, {True: adapter, False: bare}
        self.is_closed = False

    def generate(
        self,
        prompts: Sequence[PromptInputs],
        adapter: Path | None,
        *,
        max_tokens: int,
        on_answer: object = None,
    ) -> list[tuple[int, ...]]:
        answers = []
        for prompt in prompts:
            asked = re.search(r"Say number (\d)", self._processor.decode(prompt.ids))
            knows = asked is not None and self._knows[adapter is not None]
            answers.append(tuple(self._processor.encode(f"number {asked[1]}" if asked and knows else "no")))
        return answers

    def last_logits(self, prompt: PromptInputs, adapter: Path | None) -> Tensor:
        return torch.zeros(3)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by_peft(checkpoint, tmp_path_factory.mktemp("adapter") / "everything", zoo()["everything"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": asked, "completion": said}) + "\n" for asked, said in ROWS))
    return path


def call(*words: object, adapter: bool = True, bare: bool = False) -> Result:
    app = typer.Typer()

    def parrot(base: BaseModel) -> Generator:
        return Parrot(base, adapter=adapter, bare=bare)

    register(app, parrot)
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def shown(result: Result) -> dict[str, object]:
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


# ---- eval


def test_better_adapter_passes_its_gate(package: Path, rows: Path, tmp_path: Path) -> None:
    words = ("eval", package, "--data", rows, "--no-loss", "--gate", "exact_match >= base + 0.5", "--json")
    result = call(*words, "--out", tmp_path / "scores")
    assert result.exit_code == 0
    scores = shown(result)["scores"]
    assert isinstance(scores, dict)
    assert (scores["adapter"]["exact_match"], scores["base"]["exact_match"]) == (1.0, 0.0)
    assert (tmp_path / "scores" / "answers.jsonl").read_text().count("\n") == len(ROWS)


def test_adapter_worse_than_the_base_ends_with_the_gates_status(package: Path, rows: Path) -> None:
    words = ("eval", package, "--data", rows, "--no-loss", "--gate", "exact_match >= base")
    result = call(*words, adapter=False, bare=True)
    assert result.exit_code == GATE == 3
    assert "NOT passed" in result.stdout


def test_default_gate_holds_the_loss_to_the_bases(package: Path, rows: Path) -> None:
    """A random adapter knows less than the base: refused, though its answers are all right."""
    result = call("eval", package, "--data", rows, "--json")
    document = shown(result)
    scores, gate = document["scores"], document["gate"]
    assert isinstance(scores, dict) and isinstance(gate, dict)
    assert gate["rules"][0]["rule"] == "loss <= base"
    assert scores["adapter"]["loss"] > scores["base"]["loss"]
    assert scores["adapter"]["exact_match"] == 1.0
    assert result.exit_code == GATE


@pytest.mark.parametrize(
    ("line", "words", "status", "said"),
    [
        ('{"prompt": "a"}', (), REFUSED, "rows.jsonl:1"),
        ('{"prompt": "a", "completion": "b"}', ("--gate", "beauty > 1"), REFUSED, "beauty"),
        ('{"prompt": "a", "completion": "b"}', ("--base", "nobody/has-it"), REFUSED, "--base"),
        ('{"prompt": "a", "completion": "b"}', ("--columns", "x"), 2, "NAME=FIELD"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_a_model_is_loaded(
    line: str, words: tuple[str, ...], status: int, said: str, package: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    result = call("eval", package, "--data", tmp_path / "rows.jsonl", "--no-loss", *words)
    assert result.exit_code == status
    assert said in result.output


@pytest.mark.parametrize("kind", ["dora_vision", "patterns"])
def test_loss_is_of_the_very_package_that_is_served(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """The package on the training base in fp32, against the serving engine in bf16: the same logits to rounding."""
    adapter = made_by_peft(checkpoint, tmp_path / kind, zoo()[kind])
    asked = (ImagePart(scene("red", "circle")), TextPart("How many red circles?"))
    serving = load_base(BaseConfig(source=str(checkpoint)))
    prompt = serving.processor.prepare_chat([Message("user", asked)])
    with closing(OfflineEngine(serving)) as engine:
        served, plain = engine.last_logits(prompt, adapter), engine.last_logits(prompt, None)
    base = load_training_base(Recipe(base=str(checkpoint), precision="fp32"), "cpu")
    with open_base(str(checkpoint)) as files:
        read = read_adapter(adapter, files.sites)
        model = AdaptedBase(base, targets_of(read, files.sites), Recipe())
    model.load_state(state_of(read))
    made = _last_logits(model, len(prompt.ids))
    assert relative(made, served) < 0.05
    assert relative(plain, served) > 0.3


def _last_logits(model: AdaptedBase, num_prompt_tokens: int) -> Tensor:
    """[V] after the prompt, from a row that asks it."""
    import io

    buffer = io.BytesIO()
    scene("red", "circle").save(buffer, "PNG")
    picture = PictureRef("a picture", None, buffer.getvalue())
    turns = (
        Turn("user", (picture, TextPart("How many red circles?"))),
        Turn("assistant", (TextPart("One."),), True),
    )
    labeller = Labeller(model.base.processor)
    examples = Examples([Conversation(turns, origin=Origin("rows", 1))], labeller)
    logits = model.logits(Collator(labeller)([examples[0]]))
    return logits[num_prompt_tokens - 1].cpu()


# ---- the others


def test_export_writes_a_model_and_prints_its_figures(package: Path, tmp_path: Path) -> None:
    words = (
        "export",
        package,
        tmp_path / "merged",
        "--shard-gb",
        "0.001",
        "--dtype",
        "float32",
        "--no-logits",
    )
    document = shown(call(*words, "--json"))
    assert document["logits"] is None
    assert document["dtype"] == "float32"
    assert document["num_bytes"] == sum(
        path.stat().st_size for path in _weights(tmp_path / "merged")
    ) - _headers(tmp_path / "merged")
    again = call(*words)
    assert again.exit_code == REFUSED
    assert "holds files already" in again.output


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _headers(folder: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in _weights(folder))


def test_import_and_shrink_print_json_and_write_packages(package: Path, tmp_path: Path) -> None:
    made = shown(call("import", package, tmp_path / "plain", "--name", "invoice", "--no-logits", "--json"))
    assert (made["kind"], made["num_silent"]) == ("lora", 0)
    small = shown(
        call("shrink", tmp_path / "plain", tmp_path / "small", "--rank", "2", "--no-logits", "--json")
    )
    error = small["error"]
    assert isinstance(error, float) and 0 < error < 1
    assert read_adapter(tmp_path / "small").report.rank == 2


def test_inspect_prints_a_table_and_draws(package: Path, tmp_path: Path) -> None:
    result = call("inspect", package, "--plot", tmp_path / "spectrum.png")
    assert result.exit_code == 0
    assert "by layer" in result.stdout
    with Image.open(tmp_path / "spectrum.png") as image:
        assert image.format == "PNG"
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24) or []) > 100


@pytest.mark.parametrize("command", ["export", "import", "shrink", "inspect"])
def test_a_folder_without_an_adapter_is_refused_with_status_2(command: str, tmp_path: Path) -> None:
    out = () if command == "inspect" else (tmp_path / "out",)
    (tmp_path / "empty").mkdir()
    options = ("--rank", "2") if command == "shrink" else ()
    result = call(command, tmp_path / "empty", *out, *options)
    assert result.exit_code == REFUSED
    assert "lorikeet:" in result.output
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fails_is_status_1(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.tools.shrink.write_plain", full)
    result = call("shrink", package, tmp_path / "out", "--rank", "2", "--no-logits")
    assert result.exit_code == FAILED
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_rejections_name_their_details(package: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterRejected):
        read_adapter(tmp_path / "broken")
    assert call("inspect", tmp_path / "broken").exit_code == REFUSED


# ---- the page


def test_the_page_names_every_command_option_and_status() -> None:
    app = typer.Typer()
    register(app, lambda base: Parrot(base, adapter=True, bare=True))
    group = typer.main.get_command(app)
    commands = getattr(group, "commands", {})
    assert set(commands) == {"eval", "export", "import", "inspect", "shrink"}
    for name, command in commands.items():
        part = PAGE.split(f"## {name}\n")[1].split("\n## ")[0]
        assert f"lorikeet adapters {name} " in part
        options = {option for each in command.params for option in each.opts if option.startswith("--")}
        assert {option for option in options - {"--json"} if f"`{option}" not in part} == set(), name
    for status in (0, FAILED, REFUSED, GATE):
        assert f"| {status} |" in PAGE
    assert all(stored.value in PAGE for stored in StoredType)


def test_registering_imports_nothing_heavy() -> None:
    code = (
        "import sys, typer; from training.commands.adapters import register; register(typer.Typer(), print); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft', 'matplotlib', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
