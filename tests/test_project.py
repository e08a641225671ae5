"""What is said once must agree wherever it is said again: pins, container, make, continuous integration.

No container engine is needed: the Dockerfile is parsed, and its install steps are the ones that `make` takes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): number for name, number in pairs}


def requirements() -> list[Requirement]:
    table = project()["project"]
    texts = [*table["dependencies"], *table["optional-dependencies"]["dev"]]
    return [Requirement(text) for text in texts]


# ---- pins


TORCHS_TRITON = {"2.13.0": "3.7.1"}
"""The one Triton that PyPI's torch demands, by torch's version (its metadata, on Linux)."""


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    number = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(number, prereleases=True)


def test_tritons_pin_is_the_one_that_torch_demands() -> None:
    """Another would leave a machine with a GPU nothing to install; none lets the tests run whatever came out last."""
    assert pins()["triton"] == TORCHS_TRITON[pins()["torch"]]
    if version("torch").partition("+")[0] == pins()["torch"]:
        wanted = [one for one in map(Requirement, requires("torch") or []) if one.name == "triton"]
        assert all(one.specifier.contains(pins()["triton"]) for one in wanted)  # the CPU build demands none


def test_everything_that_the_requirements_pull_in_is_pinned() -> None:
    """Walks the installed packages' own requirements from ours down."""
    todo = [canonicalize_name(requirement.name) for requirement in requirements()]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            wanted = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue  # for another platform or Python
        todo += [
            canonicalize_name(one.name)
            for one in wanted
            if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
    by_torch = {name for name in seen if name.startswith(("nvidia-", "cuda-"))}
    assert seen - by_torch - set(pins()) == set()


def test_the_pin_of_torch_fits_both_its_builds() -> None:
    assert pins()["torch"] == "2.13.0"


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "bitsandbytes", "fastapi", "tokenizers"])
def test_the_suite_runs_on_the_pinned_versions(name: str) -> None:
    if version("transformers") != pins()["transformers"]:
        pytest.skip("another set of versions is being tried")
    assert version(name).partition("+")[0] == pins()[name]


@pytest.mark.parametrize("name", ["fastapi", "transformers", "peft", "bitsandbytes"])
def test_libraries_that_broke_a_seam_before_have_an_upper_bound(name: str) -> None:
    (requirement,) = [one for one in requirements() if one.name == name]
    assert any(one.operator == "<" for one in requirement.specifier)


def test_every_package_of_ours_is_installed_by_the_project() -> None:
    find = project()["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert {pattern.rstrip("*") for pattern in find} == folders


# ---- the container


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continuation lines joined, comments dropped."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


KNOWN = {
    "ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
    "ENTRYPOINT", "CMD",
}  # fmt: skip


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    starts = [index for index, (word, _) in enumerate(found) if word == "FROM"]
    return found[starts[-1] :]


def test_the_dockerfile_holds_only_known_instructions() -> None:
    assert {word for word, _ in instructions()} <= KNOWN


def test_the_image_is_made_in_two_stages_and_the_last_has_no_compiler() -> None:
    assert [word for word, _ in instructions()].count("FROM") == 2
    installs = " ".join(rest for word, rest in last_stage() if word == "RUN")
    assert not re.search(r"\b(gcc|g\+\+|clang|build-essential|make|pip install)\b", installs)


def test_the_image_runs_as_a_user_without_rights_and_stops_on_sigterm() -> None:
    stage = last_stage()
    assert ("USER", "lorikeet") in stage
    assert ("STOPSIGNAL", "SIGTERM") in stage
    assert stage.index(("USER", "lorikeet")) > max(
        i for i, (word, _) in enumerate(stage) if word in ("RUN", "COPY")
    )


def test_what_the_server_writes_lies_on_volumes() -> None:
    stage = last_stage()
    (volumes,) = [json.loads(rest) for word, rest in stage if word == "VOLUME"]
    environment = dict(pair.split("=", 1) for word, rest in stage if word == "ENV" for pair in rest.split())
    for name in ("HF_HOME", "LORIKEET_STATE_DIR", "LORIKEET_ADAPTER_ROOT"):
        assert environment[name] in volumes


def test_every_environment_name_of_the_image_is_a_setting() -> None:
    from server.sources import describe

    words = {word for _, rest in last_stage() for word in re.findall(r"LORIKEET_[A-Z_]+", rest)}
    assert words <= {doc.environment for doc in describe()}


def test_the_health_check_is_a_program_that_fails_when_nothing_answers() -> None:
    ((_, rest),) = [(word, rest) for word, rest in last_stage() if word == "HEALTHCHECK"]
    command = json.loads(rest[rest.index("[") :])
    assert "/health" in command[-1]
    done = subprocess.run(
        [sys.executable, *command[1:]], env={"LORIKEET_PORT": "9"}, capture_output=True, check=False
    )
    assert done.returncode != 0


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")
    }
    for word, rest in instructions():
        if word == "COPY" and "--from" not in rest and rest != ". .":
            for source in [part for part in rest.split() if not part.startswith("--")][:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in kept, source


# ---- make


@pytest.mark.parametrize("target", ["serve", "test", "lint", "clean", "help"])
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_make_serve_passes_host_port_and_base_on() -> None:
    command = ["make", "--dry-run", "serve", "HOST=::1", "PORT=9", "BASE=some/base", "ARGS=--num-slots 2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'serve --base "some/base" --host "::1" --port "9" --num-slots 2' in done.stdout


def test_a_python_that_is_too_old_is_named_before_anything_is_made(tmp_path: Path) -> None:
    command = ["make", "serve", "PYTHON=", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_runs_lint_and_the_test_command_of_the_readme() -> None:
    text = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "set -euo pipefail" in text
    assert "make lint" in text
    assert "make test" in text
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
