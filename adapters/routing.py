"""Routing: which rows of this step belong to which slot.

Owns the answer for one kind of rows (language tokens, vision patches, merged patches): the runner refills it in place
before each forward, layers hold it from construction, because a linear receives nothing but ``x``. Knows no weights: a
site's ``Layout`` tells it what the slots hold there, and it returns the ``RoutePlan`` of that layout, made once a step
and shared by all sites that agree (usually all of them).

A plan sorts rows by slot and pads them, so that slots side by side become one batched product. On a CPU this is where
"a request's output does not depend, to the bit, on its neighbours" is decided: with rows a multiple of ``ROW_TILE`` and
the widths of adapters.slots, fp32 BLAS gives a row the same sums in every batch; tests/adapters/test_ops.py holds it.

Place in a request's way: step 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.sites import Part
from adapters.slots import UNTOUCHED, Form, Layout

ROW_TILE = 8 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 4
"""Rows of one slot are padded to a multiple of this: MKL's fp32 kernels take 4 rows at a time with AVX2, 8 with
AVX-512, and finish what is left over with other kernels, whose sums differ in the last bit."""
SHORT_RUN = 16
"""Slots with at most as many rows are batched together, padded to the longest; longer runs (prefill) go alone."""
BASE_SLOT = -1


@dataclass(frozen=True, slots=True)
class Group:
    """Padded rows of ``num_slots`` neighbouring slots with the same form: one batched product."""

    form: Form
    first_slot: int
    num_slots: int
    rows_per_slot: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.num_slots * self.rows_per_slot


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """What layers of one layout do this step. P padded rows, N touched rows (plain LoRA first, then DoRA)."""

    num_rows: int
    groups: tuple[Group, ...]
    gather: Tensor | None  # [P] int64, the row of x of each padded row; None: x as it is
    valid: Tensor | None  # [N] int64, the padded row of each touched row; None: every one
    rows: Tensor | None  # [N] int64, the row of y of each touched row; None: all rows in order
    num_plain: int
    dora_slots: Tensor  # [N - num_plain] int64


class Routing:
    """Rows -> slots, for one kind of rows; base only until filled. The engine's thread only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._segments: tuple[tuple[int, int], ...] = ()
        self._rows: dict[int, list[int]] = {}
        self._num_rows = 0
        self._plans: dict[Layout, RoutePlan | None] = {}
        self._is_open = False

    def fill(self, segments: Sequence[tuple[int, int]], *, is_open: bool = False) -> None:
        """Say for this step, in row order, that the next ``num_rows`` rows belong to ``slot`` (-1 for the base).

        is_open: the step is recorded and will be repeated with other rows and adapters; nothing that is idle now may
        be left out.
        """
        self._is_open = is_open
        if tuple(segments) == self._segments:
            return
        self._segments = tuple(segments)
        self._plans = {}
        self._rows = {}
        self._num_rows = 0
        for num_rows, slot in self._segments:
            if num_rows < 0 or slot < BASE_SLOT:
                raise ValueError(f"a segment is (rows, slot), not ({num_rows}, {slot})")
            if slot != BASE_SLOT and num_rows:
                self._rows.setdefault(slot, []).extend(range(self._num_rows, self._num_rows + num_rows))
            self._num_rows += num_rows

    def clear(self) -> None:
        """Base only, whatever the number of rows."""
        self.fill(())

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """What it was filled with; another object after every ``fill`` that changed something."""
        return self._segments

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def is_base_only(self) -> bool:
        return not self._rows and not self._is_open

    @property
    def is_open(self) -> bool:
        """Whether others than those that it was filled with will come into the same step."""
        return self._is_open

    def plan(self, layout: Layout) -> RoutePlan | None:
        """What a layer with this layout does this step; None if none of its slots in use touches it.

        Valid until the next ``fill``. Raises ValueError if a row is routed to an empty slot.
        """
        if layout not in self._plans:
            self._plans[layout] = plan_rows(self._rows, self._num_rows, layout, self._device)
        return self._plans[layout]


@dataclass(slots=True)
class RoutingSet:
    """The routing of each part of the base; vision rows are patches, merger rows patches merged by four."""

    language: Routing
    vision: Routing
    merger: Routing

    @classmethod
    def on(cls, device: torch.device) -> RoutingSet:
        return cls(Routing(device), Routing(device), Routing(device))

    def of(self, part: Part) -> Routing:
        return {"language": self.language, "vision": self.vision, "merger": self.merger}[part]

    def clear(self) -> None:
        for routing in (self.language, self.vision, self.merger):
            routing.clear()


def plan_rows(
    rows: Mapping[int, Sequence[int]], num_rows: int, layout: Layout, device: torch.device
) -> RoutePlan | None:
    """Pure: rows by slot and a layout -> the plan, or None if there is nothing to do."""
    forms = _forms_in_use(rows, layout)
    runs = _runs({slot: len(rows[slot]) for slot in forms}, forms)
    gather: list[int] = []
    valid: list[int] = []
    touched: list[int] = []
    dora_slots: list[int] = []
    groups: list[Group] = []
    for run in runs:
        height = -(-max(len(rows[slot]) for slot in run) // ROW_TILE) * ROW_TILE
        groups.append(Group(forms[run[0]], run[0], len(run), height, len(gather)))
        for slot in run:
            own = rows[slot]
            valid += range(len(gather), len(gather) + len(own))
            touched += own
            # a padding row repeats a row of its own slot: a NaN in it never meets another request's numbers
            gather += [*own, *([own[0]] * (height - len(own)))]
            dora_slots += [slot] * len(own) if forms[slot].is_dora else []
    if not groups:
        return None
    is_in_order = touched == list(range(num_rows))
    is_padded = len(gather) > len(touched)
    return RoutePlan(
        num_rows=num_rows,
        groups=tuple(groups),
        gather=_index(gather, device) if is_padded or not is_in_order else None,
        valid=_index(valid, device) if is_padded else None,
        rows=None if is_in_order else _index(touched, device),
        num_plain=len(touched) - len(dora_slots),
        dora_slots=_index(dora_slots, device),
    )


def _forms_in_use(rows: Mapping[int, Sequence[int]], layout: Layout) -> dict[int, Form]:
    """The slots in use that touch the site, with their forms."""
    forms: dict[int, Form] = {}
    for slot in rows:
        form = layout.forms[slot] if slot < len(layout.forms) else None
        if form is None:
            raise ValueError(f"rows are routed to slot {slot}, which holds no adapter")
        if form != UNTOUCHED:
            forms[slot] = form
    return forms


def _runs(counts: Mapping[int, int], forms: Mapping[int, Form]) -> list[list[int]]:
    """Slots to be computed together: neighbours of the same form with few rows each; plain ones before DoRA."""
    runs: list[list[int]] = []
    for slot in sorted(counts, key=lambda slot: (forms[slot].is_dora, slot)):
        before = runs[-1][-1] if runs else None
        joins = (
            before is not None
            and slot == before + 1
            and forms[slot] == forms[before]
            and max(counts[slot], counts[before]) <= SHORT_RUN
        )
        if joins:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return runs


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
