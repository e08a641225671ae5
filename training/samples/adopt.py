"""adopt: a run's package becomes the sample adapter that ships, with its figures beside it.

Owns: adapters/samples/ and its scores.json. Knows the run folder's and the package's files; knows no model. Place in a
training run: after it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

SAMPLES: Final = Path(__file__).parents[2] / "adapters" / "samples"
SHIPPED: Final = ("french", "json", "patterns")
PACKAGE: Final = ("adapter_config.json", "adapter_model.safetensors", "lorikeet.json", "README.md")


def adopt(name: str, run: Path, samples: Path = SAMPLES) -> str:
    """Copy the package of ``run`` to ``samples``/``name`` and write its figures down; one line about them.

    Raises FileNotFoundError for a run without a package: one that did not end, or did not pass its gate.
    """
    verdict = json.loads((run / "scores.json").read_text("utf-8"))
    package = run / "package"
    if not package.is_dir():
        raise FileNotFoundError(f"{run} holds no package that passed its gate: nothing is adopted")
    folder = samples / name
    folder.mkdir(parents=True, exist_ok=True)
    for entry in PACKAGE:
        shutil.copyfile(package / entry, folder / entry)
    path = samples / "scores.json"
    figures = json.loads(path.read_text("utf-8")) if path.exists() else {}
    figures[name] = figures_of(verdict)
    path.write_text(json.dumps(dict(sorted(figures.items())), indent=1) + "\n", encoding="utf-8")
    return f"{name}: {json.dumps(figures[name])}"


def figures_of(verdict: Mapping[str, Any]) -> dict[str, float]:
    """Shares of exact answers to held-out questions: by the base, by the adapter, and by the adapter when it is shown a
    blank or somebody else's picture."""
    scores = verdict["scores"]
    views = verdict["vision"]["adapter"]["views"]["vision_dependence_exact"]
    return {
        "base": scores["base"]["exact_match"],
        "adapter": scores["adapter"]["exact_match"],
        "blank": views["blank"],
        "swapped": views["swapped"],
    }
