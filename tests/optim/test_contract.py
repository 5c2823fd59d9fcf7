"""What torch and its users expect of an optimiser: one table of optimisers, one of cases, every pair tried.

A pair that does not apply is not skipped in silence: the table of rows has the reason, and where an optimiser refuses,
the error is what is tested.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from optim.cases_state import STATE
from optim.cases_steps import STEPS
from optim.cases_surroundings import SURROUNDINGS
from optim.contract import REASONS, ROWS

CASES = {**STEPS, **SURROUNDINGS, **STATE}
PAIRS = [(case, row) for case, (_, asks) in CASES.items() for row in ROWS if asks <= ROWS[row].offers]


def applies(case: str, row: str) -> bool:
    differs = ROWS[row].differs.get(case)
    return differs is None or differs.error is not None


@pytest.mark.parametrize(
    ("case", "row"), [pair for pair in PAIRS if applies(*pair)], ids=lambda word: word.replace(" ", "_")
)
def test_contract(case: str, row: str, tmp_path: Path) -> None:
    run, _ = CASES[case]
    more: dict[str, Any] = {"tmp_path": tmp_path} if "tmp_path" in inspect.signature(run).parameters else {}
    differs = ROWS[row].differs.get(case)
    if differs is None:
        run(ROWS[row], **more)
        return
    assert differs.error is not None
    with pytest.raises(differs.error, match=differs.match):
        run(ROWS[row], **more)


def test_every_exception_has_a_case_and_a_reason() -> None:
    for row in ROWS.values():
        assert row.differs.keys() <= CASES.keys()
        assert all(differs.reason for differs in row.differs.values())
        assert row.offers <= REASONS.keys()
    assert all(asks <= REASONS.keys() for _, asks in CASES.values())
    assert set(CASES) == {case for case, _ in PAIRS}
