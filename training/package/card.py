"""card: a package's README, from its profile alone, so that it cannot say more than ``lorikeet.json`` does.

Owns the words. Place in a training run: inside ``package.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapters.profile import Json, PackageProfile

_PICTURES = (".png", ".jpg", ".jpeg")
_SHOWN = (
    "preset", "targets", "r", "alpha", "dropout", "rslora", "dora", "lora_plus", "lr", "epochs", "max_steps",
    "scheduler", "optimizer", "micro_batch", "accumulation", "max_length", "augment", "seed", "precision",
)  # fmt: skip
"""Keys of the recipe that a reader wants first; lorikeet.json has them all."""


def card(profile: PackageProfile, beside: Sequence[str] = ()) -> str:
    """Markdown with a hub's front matter. ``beside`` names the files that lie next to it."""
    parts = [
        _front(profile),
        f"# {profile.name}",
        _what(profile),
        _scores(profile),
        _section("Data", _table(profile.data)),
        _section("Recipe", _table({key: profile.recipe[key] for key in _SHOWN if key in profile.recipe})),
        _use(profile),
        _section("Made with", _table(profile.environment)),
        _beside(beside),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(profile: PackageProfile) -> str:
    return (
        f"---\nlibrary_name: peft\nbase_model: {profile.base.name}\ntags: [lora, qwen2_5_vl, lorikeet]\n---"
    )


def _what(profile: PackageProfile) -> str:
    serving = profile.profile
    parts = serving.get("parts")
    where = " and ".join(parts) if isinstance(parts, Mapping) else "its base"
    megabytes = f"{_number(serving.get('num_bytes')) / 1e6:.2f} MB in {serving.get('weights_dtype')}"
    quantised = (
        "" if profile.base.quantization in ("", "none") else f" in {profile.base.quantization.upper()}"
    )
    revision = f" at revision `{profile.base.revision}`" if profile.base.revision else ""
    return (
        f"An adapter ({serving.get('kind')}, rank {serving.get('rank')}, {serving.get('num_parameters'):,} parameters, "
        f"{megabytes}) of `{profile.base.name}`{revision}, on {where}: {serving.get('num_modules')} modules. "
        f"It was judged on the base as it is served{quantised}, {profile.base.dtype}."
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _scores(profile: PackageProfile) -> str:
    if not profile.scores:
        return "## Scores\n\nNone: it was not judged on held-out rows."
    lines = [
        "## Scores",
        "",
        "On held-out rows, the base beside it on the same rows.",
        "",
        "| | adapter | base |",
        "|---|---:|---:|",
    ]
    for name, value in profile.scores.items():
        base = profile.base_scores.get(name)
        lines.append(f"| {name} | {value:.4g} | {'-' if base is None else f'{base:.4g}'} |")
    if profile.gate is not None:
        lines += ["", "The gate was " + ("passed:" if profile.gate.passed else "NOT passed:"), ""]
        lines += [f"- {rule}" for rule in profile.gate.rules] or ["- no rules"]
    return "\n".join(lines)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(values: Json) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""


def _cell(value: object) -> str:
    """One line of a table; a list or object in short."""
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {item}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
    else:
        text = str(value)
    return " ".join(text.replace("|", "\\|").split())[:200]


def _use(profile: PackageProfile) -> str:
    base = profile.base.name if "/" in profile.base.name else f"path/to/{profile.base.name}"
    return f"""## Use

With PEFT:

```python
from peft import PeftModel
from transformers import Qwen2_5_VLForConditionalGeneration

base = Qwen2_5_VLForConditionalGeneration.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

With Lorikeet, on a running server that has the same base and may read the folder:

```bash
curl localhost:8000/v1/adapters -H 'content-type: application/json' \\
  -d '{{"name": "{profile.name}", "source": "path/to/this/folder"}}'
```

`lorikeet.json` tells all of the recipe, and what the two probe prompts were answered when it was made: a server asks
them again and refuses the package when the answers differ."""


def _beside(names: Sequence[str]) -> str:
    lines = [
        f"![{name}]({name})" if name.lower().endswith(_PICTURES) else f"- [{name}]({name})" for name in names
    ]
    return _section("Beside it", "\n".join(lines))
