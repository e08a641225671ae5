"""The rooms may import only what the house allows, and nothing anywhere turns data into code.

Every module is read as a syntax tree; nothing is imported. Each rule has a positive control: a planted breach that must
be found, so that a check which has gone blind fails here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("base", "adapters", "engine", "server", "training", "bench")

MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "base": (),
    "adapters": (),
    "engine": ("base", "adapters"),
    "server": ("engine", "adapters", "base.processor"),
    "training": ("base", "adapters"),
    "bench": (),
    # The composition root of the command line: hands training the engine by which adapters are judged.
    "lorikeet": ("server", "training", "bench.cli", "engine.offline", "base.model"),
}
"""What a room may import of ours, besides itself; a dotted name allows that module only."""

EXCEPTIONS: Mapping[str, tuple[str, ...]] = {
    # It times the kernels of both by themselves.
    "bench.kernels": ("adapters", "base.native_linear", "base.ops.native_library"),
    # What the processor takes and gives back, what it raises, and the frozen facts about the base: plain values.
    "server": ("base.decode", "base.prompt", "base.errors", "base.config", "base.spec"),
    # Offline: builds the base's modules on the meta device to know its linears; no request passes here.
    "server.commands.check": ("base.pocket",),
    # The composition root: it shows the embedded base's pictures.
    "server.serve": ("base.pocket",),
    # The one file of the server that loads the base and hands it to the engine, here or in the engine's process.
    "server.housing": ("base",),
}
"""Further allowances by module or room, each with its reason."""

NEVER_IMPORT: Mapping[str, tuple[str, ...]] = {
    "base": ("fastapi", "starlette", "uvicorn"),
    "adapters": ("fastapi", "starlette", "uvicorn"),
    "engine": ("fastapi", "starlette", "uvicorn"),
}
READS_ENVIRONMENT = ("server.settings", "server.sources")
FORBIDDEN_CALLS = (
    "eval",
    "exec",
    "compile_command",
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "os.system",
)
PICKLES = ("engine.pipe",)
"""Between our two processes, over a socket that nobody else can open, and through a reader that builds our values and
nothing else: tests/engine/test_pipe.py plants what it must refuse."""


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: its dotted name, whether it is a package's __init__, and its tree."""

    name: str
    is_package: bool
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.split(".")[0]


def module_of(path: Path) -> Module:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    return Module(".".join(parts), relative.name == "__init__", ast.parse(path.read_text("utf-8")))


def planted(name: str, source: str) -> Module:
    return Module(name, False, ast.parse(source))


def all_modules() -> list[Module]:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [module_of(path) for path in [*paths, ROOT / "lorikeet.py"]]


def imports_of(module: Module) -> Iterator[str]:
    """Every dotted name that the module imports, at the top or inside a function, relative ones resolved."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(module, node)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif _is_import_call(node):
            assert isinstance(node, ast.Call)
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
    stem = package[: len(package) - (node.level - 1)]
    return ".".join([*stem, *([node.module] if node.module else [])])


def _is_import_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and dotted(node.func) in (
        "__import__",
        "importlib.import_module",
        "import_module",
    )


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a name or an attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        stem = dotted(node.value)
        return f"{stem}.{node.attr}" if stem else ""
    return ""


def is_within(name: str, scopes: tuple[str, ...]) -> bool:
    return any(name == scope or name.startswith(scope + ".") for scope in scopes)


def layer_breaches(module: Module) -> list[str]:
    allowed = (module.room, *MAY_IMPORT[module.room])
    allowed += EXCEPTIONS.get(module.room, ()) + EXCEPTIONS.get(module.name, ())
    ours = [name for name in imports_of(module) if name.split(".")[0] in (*ROOMS, "lorikeet", "tests")]
    foreign = [name for name in imports_of(module) if is_within(name, NEVER_IMPORT.get(module.room, ()))]
    return [
        f"{module.name} imports {name}"
        for name in [*(n for n in ours if not is_within(n, allowed)), *foreign]
    ]


def environment_reads(module: Module) -> list[str]:
    if module.name in READS_ENVIRONMENT:
        return []
    names = [
        name for name in imports_of(module) if name in ("os.environ", "os.getenv", "os.environb", "os.putenv")
    ]
    attributes = [dotted(node) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    names += [name for name in attributes if name in ("os.environ", "os.getenv", "os.environb", "os.putenv")]
    return [f"{module.name} uses {name}" for name in names]


def code_from_data(module: Module) -> list[str]:
    """Calls and arguments by which a file or a string could become code."""
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            found += [name] if name in FORBIDDEN_CALLS else []
            found += [f"{word.arg}=" for word in node.keywords if _is_dangerous(word)]
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += ["from torch import load" for alias in node.names if alias.name == "load"]
    found += [
        f"import {name}"
        for name in imports_of(module)
        if is_within(name, ("pickle", "dill", "marshal", "shelve")) and module.name not in PICKLES
    ]
    return [f"{module.name} uses {what}" for what in found]


def _is_dangerous(word: ast.keyword) -> bool:
    is_off = isinstance(word.value, ast.Constant) and word.value.value is False
    return word.arg in ("trust_remote_code", "shell") and not is_off


def import_cycle(modules: list[Module]) -> list[str]:
    """One import cycle among the modules, or nothing. Imports inside functions count: a lazy cycle is a cycle."""
    names = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        targets = {target for name in imports_of(module) if (target := _nearest(name, names))}
        graph[module.name] = targets - {module.name} - _ancestors(module.name)
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def _nearest(name: str, names: set[str]) -> str:
    """The longest prefix of a dotted name that is one of our modules."""
    parts = name.split(".")
    return next((stem for size in range(len(parts), 0, -1) if (stem := ".".join(parts[:size])) in names), "")


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:size]) for size in range(1, len(parts))}


MODULES = all_modules()


def test_every_room_imports_only_what_the_house_allows() -> None:
    assert [breach for module in MODULES for breach in layer_breaches(module)] == []


def test_only_the_settings_read_the_environment() -> None:
    assert [breach for module in MODULES for breach in environment_reads(module)] == []


def test_nothing_turns_data_into_code() -> None:
    assert [breach for module in MODULES for breach in code_from_data(module)] == []


@pytest.mark.parametrize("room", ROOMS)
def test_imports_within_a_room_run_one_way(room: str) -> None:
    assert import_cycle([module for module in MODULES if module.room == room]) == []


def test_our_adapters_package_is_the_one_imported() -> None:
    """`adapters` is also the import name of another project on PyPI; were both installed, ours must win."""
    import adapters
    import adapters.ref

    assert Path(adapters.__file__ or "").resolve() == ROOT / "adapters" / "__init__.py"
    assert adapters.ref.AdapterRef.__module__ == "adapters.ref"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("base.planted", "import adapters.ref"),
        ("base.planted", "def f():\n    from adapters import sites"),
        ("adapters.planted", "from base.model import BaseModel"),
        ("adapters.sources.planted", "import importlib\nimportlib.import_module('engine.engine')"),
        ("engine.planted", "import server.settings"),
        ("engine.planted", "from fastapi import FastAPI"),
        ("server.planted", "from base.loader import load_base"),
        ("server.planted", "import training"),
        ("training.planted", "from engine import client"),
        ("bench.planted", "import adapters"),
    ],
)
def test_a_planted_breach_of_the_layers_is_found(name: str, source: str) -> None:
    assert layer_breaches(planted(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("engine.planted", "from base.model import BaseModel\nfrom adapters import slots"),
        ("engine.planted", "from .blocks import BlockPool"),
        ("server.planted", "from base.processor import Processor"),
        ("bench.kernels", "import adapters.ops.reference"),
    ],
)
def test_what_the_house_allows_is_not_reported(name: str, source: str) -> None:
    assert layer_breaches(planted(name, source)) == []


@pytest.mark.parametrize(
    "source", ["import os\nos.environ['A']", "import os\nx = os.getenv('A')", "from os import environ"]
)
def test_a_planted_read_of_the_environment_is_found(source: str) -> None:
    assert environment_reads(planted("engine.planted", source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('a.pt')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import pickle",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_planted_code_from_data_is_found(source: str) -> None:
    assert code_from_data(planted("engine.planted", source))


def test_a_planted_import_cycle_is_found() -> None:
    first = planted("engine.first", "from engine.second import Second")
    second = planted("engine.second", "def f():\n    import engine.first")
    assert set(import_cycle([first, second])) == {"engine.first", "engine.second"}
