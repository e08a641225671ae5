"""Write what the documentation repeats from the code: `make docs`. Tests fail when a page is stale.

Owns docs/settings.md (from the settings' names, units, defaults and reasons) and two parts of README.md between marks:
the tree (from each file's first sentence) and the figures (from the scores that the recipes wrote).
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from server.sources import SettingDoc, describe

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "docs" / "settings.md"
README = ROOT / "README.md"
ROOMS = ("base", "adapters", "engine", "server", "training", "bench", "deploy")
WIDTH = 128

HEAD = """# Settings

<!-- Made by `make docs` from server/settings.py; change it there. -->

Each setting has one home, one default and a reason. It is a flag of `lorikeet serve`, an environment name, and a key
of the TOML file that `--config` (or `LORIKEET_CONFIG`) names. The flag wins, then the environment, then the file.
Sizes take units (`512MiB`, `2GB`); lists are separated by commas; a yes-or-no flag is switched off by `--no-...`. At
start the server prints every value with its origin.

    # lorikeet.toml
    base = "Qwen/Qwen2.5-VL-3B-Instruct"
    adapter_root = ["/srv/adapters"]
    kv_memory = "8GiB"

| setting, flag, environment | default | unit | why |
|---|---|---|---|
"""


def settings_page() -> str:
    """The whole of docs/settings.md."""
    return HEAD + "".join(_setting(doc) for doc in describe())


def _setting(doc: SettingDoc) -> str:
    reason = doc.reason.replace("|", "\\|")
    return f"| `{doc.name}` `{doc.flag}` `{doc.environment}` | {doc.default} | {doc.unit} | {reason} |\n"


# ---- the tree


def tree() -> str:
    """Every Python file of the rooms with its first sentence, folder by folder."""
    lines = [_line("lorikeet.py", 0, ROOT / "lorikeet.py")]
    for room in ROOMS:
        lines += _folder(ROOT / room, 0)
    lines += [
        "tests/                 The rooms again, a folder each; parity/ compares the engine with transformers and PEFT"
    ]
    return "\n".join(lines)


def _folder(folder: Path, depth: int) -> Iterator[str]:
    yield _line(folder.name + "/", depth, folder / "__init__.py")
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield _line(path.name, depth + 1, path)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and any(path.rglob("*.py")):
            yield from _folder(path, depth + 1)


def _line(name: str, depth: int, path: Path) -> str:
    pad = "  " * depth
    about = _about(path).replace("``", "`") if path.exists() else ""
    return f"{pad}{name:<{22 - len(pad)}} {textwrap.shorten(about, WIDTH - 23, placeholder=' …')}".rstrip()


def _about(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split())
    return re.split(r"(?<=[^.])\.(?:\s|$)|(?<=:) (?=`)", text)[0].rstrip(":. ")


# ---- the figures


def figures() -> str:
    """What the embedded base and its sample adapters score, as a table."""
    base = json.loads((ROOT / "base" / "pocket" / "scores.json").read_text("utf-8"))
    samples = json.loads((ROOT / "adapters" / "samples" / "scores.json").read_text("utf-8"))
    rows = [
        "| exact answers to held-out questions, in NF4 | with it | without it |",
        "|---|---|---|",
        f"| the embedded base, all questions | {_share(base['real']['exact'])} | |",
        f"| about pictures: the picture, a blank one | {_sight(base, 'real')} | {_sight(base, 'blank')} |",
        f"| about pictures: the picture, somebody else's | {_sight(base, 'real')} | {_sight(base, 'swapped')} |",
    ]
    for name, scores in samples.items():
        with_it = _share(scores["adapter"])
        rows.append(f"| adapter `{name}`, what it learnt | {with_it} | {_share(scores['base'])} |")
        if "blank" in scores:
            rows.append(
                f"| adapter `{name}`: the picture, a blank one | {with_it} | {_share(scores['blank'])} |"
            )
    return "\n".join(rows)


def _sight(scores: dict[str, dict[str, float]], sight: str) -> str:
    return _share(scores[sight]["exact_about_pictures"])


def _share(value: float) -> str:
    return f"{value:.1%}"


# ---- between marks


def marked(text: str, name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- /name -->`."""
    return text.split(f"<!-- {name} -->\n", 1)[1].split(f"\n<!-- /{name} -->", 1)[0]


def with_marked(text: str, name: str, content: str) -> str:
    """The text with other content between the marks."""
    return text.replace(marked(text, name), content, 1)


def main() -> None:
    SETTINGS.write_text(settings_page(), encoding="utf-8")
    text = README.read_text("utf-8")
    text = with_marked(text, "tree", f"```\n{tree()}\n```")
    if (ROOT / "adapters" / "samples" / "scores.json").exists():
        text = with_marked(text, "figures", figures())
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
