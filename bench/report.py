"""The report: tables and plots of results. Refuses to compare unlike devices. Reads results, measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.claim_tables import claims_table, floors_table
from bench.results import Cell, Result, claims_of, label_of
from bench.table import Table

COLUMNS: Mapping[str, tuple[str, str]] = {
    "output_tokens_per_s": ("tokens/s", ".1f"),
    "first_token_ms_p50": ("first token p50 ms", ".0f"),
    "first_token_ms_p99": ("p99", ".0f"),
    "between_tokens_ms_p50": ("between tokens p50 ms", ".1f"),
    "between_tokens_ms_p99": ("p99", ".1f"),
    "total_ms_p50": ("end to end p50 ms", ".0f"),
    "worst_stall_ms": ("worst stall ms", ".0f"),
    "rare_first_token_ms_p99": ("rare adapters' first token p99 ms", ".0f"),
    "goodput_share": ("goodput", ".0%"),
}


PAIRS_OF_A_CLAIM = 5


class UnlikeDevices(ValueError):
    """Results of different machines: a table of both would compare the machines."""


def require_one_device(results: Sequence[Result]) -> str:
    """The device that all were taken on. Raises UnlikeDevices, and ValueError for no results."""
    if not results:
        raise ValueError("no results to report")
    devices = sorted({result.device for result in results})
    if len(devices) > 1:
        raise UnlikeDevices(
            f"results of {len(devices)} devices cannot be compared: {'; '.join(devices)}. Report each by itself"
        )
    return devices[0]


def tables(results: Sequence[Result]) -> tuple[Table, ...]:
    """Everything that the results hold, a table for each kind. Raises UnlikeDevices."""
    require_one_device(results)
    cells = [cell for result in results for cell in result.cells]
    makers: tuple[Callable[[Sequence[Cell]], Table | None], ...] = (
        claims_table,
        _throughput,
        _ratios,
        floors_table,
        _scenarios,
        _sweeps,
        _profiles,
        _kernels,
    )
    return tuple(table for maker in makers if (table := maker(cells)) is not None)


def render(results: Sequence[Result], *, is_markdown: bool) -> str:
    """The whole report: device, commits, warnings, tables."""
    device = require_one_device(results)
    commits = sorted({_commit(result) for result in results})
    versions = sorted({_versions(result) for result in results})
    head = [f"Device: {device}", f"Commit: {', '.join(commits)}", *(f"Versions: {each}" for each in versions)]
    head += [warning for result in results for warning in warnings(result)]
    parts = [table.markdown() if is_markdown else table.text() for table in tables(results)]
    separator = "\n" if not is_markdown else "  \n"
    return "\n\n".join([separator.join(head), *parts]) + "\n"


def warnings(result: Result) -> tuple[str, ...]:
    """Why a result is no claim."""
    found = []
    name = result.path.name if result.path else result.kind
    if result.provenance.get("is_contended"):
        found.append(f"Warning: {name} was taken on a busy machine: its figures are no claims")
    if result.provenance.get("is_dirty"):
        found.append(f"Warning: {name} was taken with uncommitted changes")
    if any(int(str(claim["num_pairs"])) < PAIRS_OF_A_CLAIM for claim in claims_of(result.cells)):
        found.append(f"Warning: {name} has fewer than {PAIRS_OF_A_CLAIM} pairs: its figures are no claims")
    return tuple(found)


def _commit(result: Result) -> str:
    return str(result.provenance.get("commit"))[:12] or "unknown"


def _versions(result: Result) -> str:
    found = result.provenance.get("versions")
    return ", ".join(f"{name} {number}" for name, number in found.items()) if isinstance(found, dict) else ""


# ---- the tables


def _throughput(cells: Sequence[Cell]) -> Table | None:
    rows = []
    for cell in cells:
        median, spread = _numbers(cell, "median"), _numbers(cell, "spread")
        if "output_tokens_per_s" not in median:
            continue
        figures = tuple(
            format(median[key], form) if key in median else "" for key, (_, form) in COLUMNS.items()
        )
        failed = f"{median.get('num_failed', 0):g}"
        half = f"±{spread.get('output_tokens_per_s', 0) / 2:.0%}"
        rows.append((label_of(cell), str(cell["workload"]), *figures, _memory(cell), half, failed))
    titles = (title for title, _ in COLUMNS.values())
    head = ("server", "workload", *titles, "peak GiB", "spread", "failed")
    return Table("Medians over the repeats", head, tuple(rows)) if rows else None


def _memory(cell: Cell) -> str:
    """Of the server, or of a peer's worker; empty where nobody knows."""
    endpoint = cell.get("endpoint")
    kept = endpoint.get("peak_bytes") if isinstance(endpoint, dict) else None
    num_bytes = cell.get("server_peak_bytes") or kept
    return f"{num_bytes / 2**30:.2f}" if isinstance(num_bytes, int) else ""


def _equal_texts(cell: Cell, other: str) -> str:
    found = cell.get("parity")
    each = found.get(other) if isinstance(found, dict) else None
    return f"{each['num_equal']} of {each['num_compared']}" if isinstance(each, dict) else ""


def _ratios(cells: Sequence[Cell]) -> Table | None:
    rows = []
    for cell in cells:
        found = cell.get("ratios")
        for other, ratio in found.items() if isinstance(found, dict) else ():
            extra = cell.get("efficiency") if "base only" in other else None
            shown = f"{extra['efficiency']:.2f}" if isinstance(extra, dict) else ""
            possible = f"{extra['possible_ratio']:.2f}" if isinstance(extra, dict) else ""
            span = f"{ratio['lowest']:.2f} to {ratio['highest']:.2f}"
            pairs = f"{ratio['num_pairs']}"
            rows.append(
                (
                    f"{label_of(cell)} / {other}",
                    str(cell["workload"]),
                    f"{ratio['median']:.2f}",
                    span,
                    pairs,
                    possible,
                    shown,
                    _equal_texts(cell, other),
                )
            )
    head = (
        "throughput of",
        "workload",
        "ratio",
        "from",
        "pairs",
        "possible",
        "LoRA efficiency",
        "equal texts",
    )
    return Table("Ratios, pair by pair", head, tuple(rows)) if rows else None


def _scenarios(cells: Sequence[Cell]) -> Table | None:
    rows = [
        (label_of(cell), str(cell["workload"]), name, f"{value:.3g}")
        for cell in cells
        for name, value in _numbers(cell, "median").items()
        if "output_tokens_per_s" not in _numbers(cell, "median")
    ]
    return Table("Scenarios", ("server", "scenario", "figure", "median"), tuple(rows)) if rows else None


def _sweeps(cells: Sequence[Cell]) -> Table | None:
    rows = []
    for cell in cells:
        steps = cell.get("sweep")
        for step in steps if isinstance(steps, list) else ():
            mark = "knee" if step["rate"] == cell.get("knee") else ""
            figures = step["figures"]
            shown = (
                f"{step['rate']:.2f}",
                f"{figures['goodput_share']:.0%}",
                f"{figures['calls_per_s']:.2f}",
            )
            rows.append((label_of(cell), str(cell["workload"]), *shown, mark))
    head = ("server", "workload", "calls/s offered", "goodput", "calls/s answered", "")
    return Table("Rate sweep", head, tuple(rows)) if rows else None


def _profiles(cells: Sequence[Cell]) -> Table | None:
    rows = []
    for cell in cells:
        found = _numbers(cell, "profile")
        for name, value in found.items():
            if name.endswith("_ms"):
                share = f"{value / found['step_ms']:.1%}"
                part = name.removesuffix("_ms").replace("_", " ")
                rows.append((label_of(cell), str(cell["workload"]), part, f"{value:.3f}", share))
    head = ("server", "workload", "part", "ms a step", "share")
    return Table("A step, part by part", head, tuple(rows)) if rows else None


def _kernels(cells: Sequence[Cell]) -> Table | None:
    rows = []
    for cell in cells:
        timings = cell.get("timings")
        for each in timings if isinstance(timings, list) else ():
            shown = (f"{each['us']:.0f}", f"{each['floor_us']:.0f}", f"{each['share']:.0%}")
            rows.append((f"{each['kernel']} {each['variant']}", each["site"], str(each["rows"]), *shown))
    head = ("kernel", "site", "rows", "us", "floor us", "of the floor's speed")
    return Table("Kernels", head, tuple(rows)) if rows else None


def _numbers(cell: Cell, key: str) -> Mapping[str, float]:
    found = cell.get(key)
    return found if isinstance(found, dict) else {}


# ---- plots


def plot(results: Sequence[Result], folder: Path, stem: str = "bench") -> tuple[Path, ...]:
    """Write PNG and SVG of every plot that the results have figures for. Raises UnlikeDevices."""
    from bench.claim_plots import claims_plot, floors_plot
    from bench.plots import latency_plot, sweep_plot, throughput_plot

    device = require_one_device(results)
    cells = [cell for result in results for cell in result.cells]
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    plots = {
        "throughput": throughput_plot,
        "latency": latency_plot,
        "sweep": sweep_plot,
        "claims": claims_plot,
        "floors": floors_plot,
    }
    for name, draw in plots.items():
        paths = [folder / f"{stem}-{name}.{kind}" for kind in ("png", "svg")]
        made += paths if draw(cells, device, paths) else []
    return tuple(made)
