"""The documentation names all that exists: settings, routes, fields, errors, metrics, commands, files, figures."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adapters.errors import RejectReason
from deploy import pages
from engine.status import EngineStatus
from lorikeet import command_line
from server.app import ROUTERS
from server.metrics import Metrics
from server.schemas import ChatRequest, CompletionRequest
from server.schemas.defaults import CHAT, COMPLETION
from server.sources import describe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
API = (ROOT / "docs" / "api.md").read_text("utf-8")
METRICS = (ROOT / "docs" / "metrics.md").read_text("utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
MAKING = "".join(
    (ROOT / "docs" / name).read_text("utf-8")
    for name in (
        "cookbook.md",
        "recipes.md",
        "evaluation.md",
        "packages.md",
        "adapter-tools.md",
        "benchmarks.md",
    )
)


# ---- settings


def test_the_settings_page_is_what_the_settings_say() -> None:
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == pages.settings_page(), "run: make docs"


def test_every_setting_has_a_unit_and_a_reason() -> None:
    assert [doc.name for doc in describe() if not (doc.unit and doc.reason)] == []


def test_settings_that_the_texts_name_exist() -> None:
    known = {doc.environment for doc in describe()} | {"LORIKEET_URL", "LORIKEET_CONFIG"}
    texts = README + API + OPERATIONS + METRICS
    assert set(re.findall(r"LORIKEET_[A-Z_]+", texts)) <= known


# ---- the wire


def routes() -> Iterator[tuple[str, str]]:
    for router in ROUTERS:
        for route in router.routes:
            path = getattr(route, "path", "").replace(":path}", "}")
            for method in sorted(set(getattr(route, "methods", ())) - {"HEAD"}):
                yield method, path


@pytest.mark.parametrize(("method", "path"), sorted(routes()))
def test_every_route_is_documented(method: str, path: str) -> None:
    documented = {(verb, place) for verb, place in re.findall(r"`([A-Z]+) (/[^` ]*)`", API)}
    assert (method, path) in documented


def test_every_documented_route_exists() -> None:
    table = API.split("## Paths")[1].split("\n## ")[0]
    documented = set(re.findall(r"`([A-Z]+) (/[^` ]*)`", table))
    assert documented - set(routes()) == set()


FIELDS = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *CHAT, *COMPLETION}


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_request_field_is_documented(name: str) -> None:
    assert f"`{name}`" in API


def codes() -> set[str]:
    """The second argument of every WireError in the server."""
    found = set()
    for path in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "WireError"
                and len(node.args) > 1
            ):
                found |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    return {str(code) for code in found}


def test_every_error_code_is_documented() -> None:
    assert len(codes()) > 15  # the walk still sees them
    assert {code for code in codes() if f"`{code}`" not in API} == set()


@pytest.mark.parametrize("reason", sorted(RejectReason))
def test_every_reason_to_refuse_a_package_is_documented(reason: RejectReason) -> None:
    assert f"`{reason}`" in API


# ---- metrics


IDLE = EngineStatus(
    is_ready=True,
    is_alive=True,
    is_draining=False,
    running={},
    waiting={},
    waiting_for_adapter=0,
    kv_blocks_used=0,
    kv_blocks_total=1,
    slots=(),
    host_bytes=0,
    host_refs=frozenset(),
    slot_bank_bytes=0,
    steps=0,
    heartbeat_age_s=0.0,
)


def metric_names() -> set[str]:
    metrics = Metrics("a-base")
    metrics.watch(num_slots=1, block_size=16, status=lambda: IDLE, is_ready=lambda: True)
    return set(re.findall(r"^# TYPE (\S+)", metrics.render().decode(), flags=re.MULTILINE))


def test_every_metric_is_documented() -> None:
    assert len(metric_names()) > 30
    assert {name for name in metric_names() if f"`{name}`" not in METRICS} == set()


def test_every_documented_metric_exists() -> None:
    documented = set(re.findall(r"`((?:lorikeet_|vllm:)[a-z0-9_]+)`", METRICS))
    assert documented - metric_names() == set()


# ---- commands


def commands() -> Iterator[str]:
    root = typer.main.get_command(command_line())
    for name, command in getattr(root, "commands", {}).items():
        children = getattr(command, "commands", {})
        yield from (f"lorikeet {name} {child}" for child in children)
        if not children:
            yield f"lorikeet {name}"


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_is_documented_and_has_help(command: str) -> None:
    assert command in OPERATIONS + MAKING
    result = CliRunner().invoke(command_line(), [*command.split()[1:], "--help"])
    assert result.exit_code == 0


def test_every_command_that_the_texts_name_exists() -> None:
    known = set(commands())
    named = re.findall(r"lorikeet ((?:adapters|bench) [a-z]+|[a-z-]+)", README + OPERATIONS + API + MAKING)
    nouns = {
        "serve",
        "chat",
        "doctor",
        "version",
        "adapters",
        "top",
        "train-adapter",
        "plan",
        "sweep",
        "bench",
    }
    for words in named:
        if words.split()[0] in nouns:
            assert f"lorikeet {words}" in known or words in {"adapters", "bench"}, words


# ---- the readme


def test_every_file_of_the_rooms_is_in_the_tree() -> None:
    assert pages.marked(README, "tree") == f"```\n{pages.tree()}\n```", "run: make docs"


def test_every_file_says_what_it_is() -> None:
    lines = pages.tree().splitlines()
    assert [line for line in lines if len(line.split()) < 3 and line.strip() != "deploy/"] == []


def test_files_that_the_texts_name_exist() -> None:
    texts = README + OPERATIONS + API + MAKING + (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    named = set(
        re.findall(r"`((?:base|adapters|engine|server|tests|training|bench|docs|deploy)/[\w/.]*)`", texts)
    )
    assert len(named) > 30
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_links_lead_somewhere() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    for page in pages:
        targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8"))
        assert [target for target in targets if not (page.parent / target).exists()] == [], page.name


def test_the_figures_are_those_that_the_recipes_wrote() -> None:
    assert pages.marked(README, "figures") == pages.figures(), "run: make docs"


def test_the_embedded_base_and_its_adapters_keep_their_promises() -> None:
    base = json.loads((ROOT / "base" / "pocket" / "scores.json").read_text("utf-8"))
    samples = json.loads((ROOT / "adapters" / "samples" / "scores.json").read_text("utf-8"))
    assert base["real"]["exact"] >= 0.95
    for sight in ("blank", "swapped"):
        assert base[sight]["exact_about_pictures"] < base["real"]["exact_about_pictures"] / 2
    assert len(samples) >= 3
    for scores in samples.values():
        assert scores["adapter"] >= 0.95
        assert scores["base"] < 0.20


def test_the_request_s_life_has_twelve_steps() -> None:
    part = README.split("## A request's life")[1].split("\n## ")[0]
    assert re.findall(r"^(\d+)\. ", part, flags=re.MULTILINE) == [str(number) for number in range(1, 13)]


def test_the_readme_names_the_two_commands_first() -> None:
    head = README.split("\n## ")[0]
    assert "make serve" in head
    assert "make test" in head
