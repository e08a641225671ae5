"""`lorikeet doctor`: what hardware and versions are here, which fast paths are on, what would fit, and what to mend.

Owns the findings and how they are shown. It changes nothing and loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.commands.columns import columns

if TYPE_CHECKING:
    from server.commands.fit import Fit
    from server.commands.hardware import FastPath, Machine

MIN_MEMORY_BYTES = 3 * 10**9
"""The embedded base's server takes under 2 GB with torch; below this the machine swaps."""


@dataclass(frozen=True, slots=True)
class Problem:
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class Findings:
    machine: Machine
    versions: dict[str, str]
    fast_paths: list[FastPath]
    device: str
    fits: list[Fit]
    problems: list[Problem]


def command(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Look at this machine: hardware, versions, fast paths, what fits, and what to mend (status 1 if anything)."""
    found = examine()
    if as_json:
        import orjson

        fits = [{**asdict(fit), "does_fit": fit.does_fit} for fit in found.fits]
        typer.echo(orjson.dumps({**asdict(found), "fits": fits}).decode())
    else:
        typer.echo("\n".join(report(found)))
    raise typer.Exit(1 if found.problems else 0)


def examine() -> Findings:
    """Everything that the report shows. Takes seconds: it imports torch."""
    from server.commands.fit import HALF, SHAPES, fit
    from server.commands.hardware import read_fast_paths, read_machine
    from server.commands.versions import installed_versions

    machine = read_machine()
    paths = read_fast_paths(machine)
    gpu = machine.gpus[0] if machine.gpus else None
    memory, number_bytes = (gpu.num_bytes, HALF) if gpu else (machine.memory_bytes, 4)
    return Findings(
        machine=machine,
        versions=installed_versions(),
        fast_paths=paths,
        device=gpu.name if gpu else "cpu",
        fits=[fit(shape, memory, number_bytes=number_bytes) for shape in SHAPES],
        problems=problems(machine, {path.name: path.is_on for path in paths}),
    )


def problems(machine: Machine, is_on: dict[str, bool]) -> list[Problem]:
    """What keeps the server from working, or from the speed that the hardware has."""
    found = [*_wrong_packages()]
    if machine.memory_bytes and machine.memory_bytes < MIN_MEMORY_BYTES:
        found.append(Problem(f"only {_size(machine.memory_bytes)} of memory", "give it 3 GB at least"))
    if not is_on["bitsandbytes native"]:
        fix = "reinstall bitsandbytes for this platform, or serve with --quantization none"
        found.append(Problem("bitsandbytes has no native library here, so nothing can be quantised", fix))
    if _has_driver() and not is_on["cuda"]:
        fix = "install PyPI's torch: make clean, then make serve TORCH_INDEX=none"
        found.append(Problem("there is an NVIDIA driver, but this torch cannot use it", fix))
    if is_on["cuda"] and not is_on["triton"]:
        found.append(
            Problem("no Triton kernels", "install gcc (Triton compiles its launcher) and the triton package")
        )
    return found


def _wrong_packages() -> list[Problem]:
    """Requirements of ours that the environment does not meet, and a stranger in our place on the import path."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    import adapters

    found = []
    try:
        wanted = [Requirement(text) for text in requires("lorikeet") or []]
    except PackageNotFoundError:
        return [Problem("lorikeet itself is not installed", "pip install -e . (make serve does it)")]
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            number = version(one.name)
        except PackageNotFoundError:
            number = ""
        if not number or not one.specifier.contains(number, prereleases=True):
            what = f"{one.name} {number or 'is missing'}, wanted {one.specifier}"
            found.append(Problem(what, "pip install -c constraints.txt -e ."))
    if Path(adapters.__file__ or "").resolve().parent != Path(__file__).resolve().parents[2] / "adapters":
        found.append(Problem("another project's `adapters` package shadows ours", "pip uninstall adapters"))
    return found


def _has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def report(found: Findings) -> Iterator[str]:
    """The findings as lines."""
    machine = found.machine
    memory = f"{_size(machine.memory_bytes)} of memory, {_size(machine.available_bytes)} available"
    cores = "1 core" if machine.num_cores == 1 else f"{machine.num_cores} cores"
    yield "Machine"
    yield f"  {machine.system}; {machine.processor}; {cores}"
    yield f"  {memory}; instructions: {', '.join(machine.flags) or 'none that matter'}"
    for gpu in machine.gpus:
        free = f"{_size(gpu.num_free_bytes)} of {_size(gpu.num_bytes)} free"
        yield f"  GPU: {gpu.name}, {free}, compute capability {gpu.capability}"
    yield "Versions"
    yield from (f"  {line}" for line in columns(list(found.versions.items())))
    yield "Fast paths"
    paths = [("on" if path.is_on else "off", path.name, path.note) for path in found.fast_paths]
    yield from (f"  {line}" for line in columns(paths))
    yield from _fits(found)
    yield "Problems" if found.problems else "No problems found."
    for problem in found.problems:
        yield f"  {problem.what}"
        yield f"    fix: {problem.fix}"


def _fits(found: Findings) -> Iterator[str]:
    yield f"What fits on {found.device}, with 8 slots of rank-16 adapters on all language linears"
    rows = [("base", "weights", "8 adapters", "KV a token", "context that fits")]
    for fit in found.fits:
        context = f"{fit.kv_tokens:,} tokens" if fit.does_fit else "does not fit"
        rows.append((fit.name, _size(fit.weights), _size(fit.adapters), f"{fit.kv_per_token:,} B", context))
    yield from (f"  {line}" for line in columns(rows))
    yield "  --kv-memory is what a server sets aside for context: 256 MiB unless told"
    yield "  the embedded base (pocket) takes under 100 MB and runs anywhere"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
