"""kill -9 at random moments of registry writes, 200 times: every acknowledged change is there, and nothing half done.

One process imports the registry once and forks a worker for each round; the worker does random acts and acknowledges
each. After the kill the ledger must mean what a model means after the acknowledged acts, or after the one act more that
was under way; and the store must hold the bytes of every version, and no others.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from adapters.package import package_digest
from adapters.registry import Registry
from adapters.validation import Limits
from tests.support.packages import make_package, tiny_sites
from tests.support.pointer_model import (
    ACTS_ON_ALIASES,
    ACTS_ON_NAMES,
    ALIAS_OF,
    NAMES,
    Act,
    Model,
    picture_of,
)

SITES = tiny_sites()
NUM_KILLS = 200
NUM_PACKAGES = 3
MAX_ACTS = 400
"""More than a worker does in its time."""
LONGEST_LIFE_S = 0.06

_WORKER = """
import gc, json, os, sys
from pathlib import Path
from adapters.registry import Registry
from adapters.sites import Site
from adapters.validation import Limits
from tests.support.pointer_model import apply_to
assert "torch" not in sys.modules
root, sites, packages = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
sites = {site["name"]: Site(**site) for site in sites}
for line in sys.stdin:
    acts = json.loads(line)
    pid = os.fork()
    if pid == 0:
        registry = Registry(Path(root), sites, Limits(), [])
        os.write(1, b"begun %d\\n" % os.getpid())
        for act in acts:
            apply_to(registry, packages, act)
            os.write(1, b"done\\n")
        os._exit(0)
    os.waitpid(pid, 0)
    os.write(1, b"over\\n")
"""


class Workers:
    """Workers over one registry, one after the other, each killed in the middle of its acts."""

    def __init__(self, process: subprocess.Popen[str], chance: random.Random) -> None:
        self._process = process
        self._chance = chance

    def run_and_kill(self, acts: list[Act]) -> int:
        """How many acts were acknowledged."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(acts) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline().split()[1])
        time.sleep(self._chance.random() * LONGEST_LIFE_S)
        os.kill(pid, signal.SIGKILL)
        num_done = 0
        while (line := self._process.stdout.readline()) == "done\n":
            num_done += 1
        assert line == "over\n"
        return num_done


@contextmanager
def workers(root: Path, packages: list[Path], chance: random.Random) -> Iterator[Workers]:
    sites = json.dumps([asdict(site) for site in SITES.values()])
    command = [sys.executable, "-c", _WORKER, str(root), sites, *map(str, packages)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    with process:
        yield Workers(process, chance)
        assert process.stdin is not None
        process.stdin.close()
    assert process.returncode == 0


def random_act(chance: random.Random) -> Act:
    if chance.random() < 0.3:
        return (
            chance.choice(ACTS_ON_ALIASES),
            chance.choice(sorted(ALIAS_OF)),
            chance.randint(1, NUM_PACKAGES),
        )
    what = chance.choice(("register", "register", "promote", *ACTS_ON_NAMES))  # more is made than removed
    number = chance.randrange(NUM_PACKAGES) + (what not in ("register", "stage"))
    return what, chance.choice(NAMES), number


def stored(root: Path) -> set[str]:
    return {entry.name for entry in os.scandir(root / "packages") if entry.name != ".lock"}


@pytest.mark.slow
def test_every_acknowledged_change_survives_kill_9_at_200_random_moments(tmp_path: Path) -> None:
    chance = random.Random(11)
    packages = [make_package(tmp_path / str(seed), seed=seed) for seed in range(NUM_PACKAGES)]
    root, model = tmp_path / "registry", Model([package_digest(package) for package in packages])
    num_acts = num_unacknowledged = 0
    with workers(root, packages, chance) as killed:
        for turn in range(NUM_KILLS):
            acts = [random_act(chance) for _ in range(MAX_ACTS)]
            num_done = killed.run_and_kill(acts)
            for act in acts[:num_done]:
                model.apply(act)
            one_more = model.copy()
            one_more.apply(acts[num_done])
            registry = Registry(root, SITES, Limits(), [])
            found = picture_of(registry)
            assert found in (model.picture(), one_more.picture()), f"turn {turn} after {num_done} acts"
            if found != model.picture():
                num_unacknowledged += 1
                model = one_more
            entries = registry.entries(has_candidates=True)
            meant = {v.ref.digest for entry in entries for v in registry.versions(entry.ref.name)}
            assert stored(root) == meant, "no version without its bytes, no bytes without a version"
            for entry in registry.entries() if turn % 20 == 0 else []:
                assert registry.load(entry.ref).digest == entry.ref.digest
            registry.close()
            num_acts += num_done
    assert num_acts > NUM_KILLS / 2, "the workers lived too short to do anything"
    figure = (
        f"{NUM_KILLS} kills, {num_acts} acknowledged acts, none lost; {num_unacknowledged} done and not told"
    )
    print(figure)  # noqa: T201
