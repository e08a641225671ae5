"""What ``accelerate launch`` starts in the tests: one run, its weights written by the first process alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.training.loops import Listener, mixed, run, tiny_recipe, words
from training.loop.feed import UnevenProcesses
from training.loop.ranks import ranks_now
from training.recipe.recipe import Stage


def main(folder: Path) -> None:
    index = os.environ.get("RANK", "0")
    # texts reach neither merger nor tower; eleven rows leave a step with fewer micro-batches than the others
    recipe = tiny_recipe(
        preset=("merger", "vision"), micro_batch=1, accumulation=4, max_grad_norm=0.1, save_steps=2, eval_steps=2,
        stages=(Stage(("merger",), max_steps=2), Stage(("merger", "vision"), max_steps=3)),
    )  # fmt: skip
    heard = Listener()
    hooked: list[int] = []

    def hook(step: int) -> dict[str, float]:
        hooked.append(step)
        return {"hooked": float(len(hooked))}

    rows = [*words(5), *mixed(6)]
    made = run(folder, recipe, rows, [*mixed(4), *words(3)], listener=heard, hook=hook)
    facts = {
        "losses": [step.loss for step in heard.steps],
        "norms": [step.grad_norm for step in heard.steps],
        "labels": [step.num_labels for step in heard.steps],
        "evals": [[report.loss, report.scores] for report in heard.evals],
        "hooked": hooked,
    }
    if ranks_now().count == 2:
        facts["uneven"] = _uneven(folder)
    (folder / f"heard-{index}.json").write_text(json.dumps(facts))
    save_file(dict(made.state), folder / f"adapter-{index}.safetensors")  # type: ignore[arg-type]


def _uneven(folder: Path) -> str:
    try:
        run(folder / "uneven", tiny_recipe(accumulation=3))
    except UnevenProcesses as error:
        return str(error)
    return "accepted"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
