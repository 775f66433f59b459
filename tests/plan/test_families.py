"""The four families: literal tables, the constraints they have (none) and the memory they promise."""

from __future__ import annotations

import importlib
import re

import pytest

from pipex.errors import PlanError
from pipex.plan.families import FAMILIES, build
from pipex.plan.memory import peak_memory
from pipex.plan.validator import validate
from pipex.plan.view import plan_view

TABLES = {
    ("naive", 3, 2): """
        F0 B0 F1 B1
        F0 B0 F1 B1
        F0 B0 F1 B1
    """,
    ("gpipe", 3, 4): """
        F0 F1 F2 F3 B0 B1 B2 B3
        F0 F1 F2 F3 B0 B1 B2 B3
        F0 F1 F2 F3 B0 B1 B2 B3
    """,
    ("1f1b", 4, 6): """
        F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5
        F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5
        F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5
        F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5
    """,
    ("1f1b", 4, 2): """
        F0 F1 B0 B1
        F0 F1 B0 B1
        F0 F1 B0 B1
        F0 B0 F1 B1
    """,
    ("zb-h1", 4, 6): """
        F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5
        F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 I4 W3 I5 W4 W5
        F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5
        F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5
    """,
    ("zb-h1", 4, 2): """
        F0 F1 I0 W0 I1 W1
        F0 F1 I0 I1 W0 W1
        F0 F1 I0 I1 W0 W1
        F0 I0 F1 I1 W0 W1
    """,
}


@pytest.mark.parametrize(("family", "ranks", "microbatches"), TABLES)
def test_orders_equal_the_table(family: str, ranks: int, microbatches: int) -> None:
    rows = TABLES[family, ranks, microbatches].strip().splitlines()
    expected = [[f"{rank}{cell}" for cell in row.split()] for rank, row in enumerate(rows)]
    assert [[str(action) for action in order] for order in build(family, ranks, microbatches).orders] == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_size_is_valid_and_holds_exactly_what_it_promises(family: str, ranks: int) -> None:
    for microbatches in range(1, 17):
        plan = build(family, ranks, microbatches)
        validate(plan)
        promised = {
            "naive": [1] * ranks,
            "gpipe": [microbatches] * ranks,
            "1f1b": [min(ranks - rank, microbatches) for rank in range(ranks)],
            "zb-h1": [min(ranks, microbatches)] * ranks,
        }[family]
        assert list(plan.peak_activations) == promised
        assert list(peak_memory(plan, [1] * ranks, [1] * ranks)) == promised


@pytest.mark.parametrize("rank", range(8))
def test_zb_h1_memory_is_that_of_the_paper(rank: int) -> None:
    """arXiv 2401.10241: worker i (from 1) holds (P-i+1) M_B + (i-1) M_W."""
    held = peak_memory(build("zb-h1", 8, 24), activation=[100.0] * 8, deferred=[41.0] * 8)
    assert held[rank] == (8 - rank) * 100 + rank * 41


@pytest.mark.parametrize("module", ["naive", "gpipe", "one_f_one_b", "zb_h1"])
def test_the_picture_in_the_docstring_is_the_plan(module: str) -> None:
    doc = importlib.import_module(f"pipex.plan.families.{module}").__doc__
    assert doc is not None
    picture = [line.strip() for line in doc.splitlines() if line.startswith("    rank ")]
    plan = build(doc.partition(":")[0], len(picture), 1 + max(map(int, re.findall("F([0-9]+)", doc))))
    assert picture == [line.rstrip() for line in plan_view(plan).splitlines()[:-1]]


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(PlanError, match="unknown schedule; got '2f2b'; needed one of naive, gpipe, 1f1b, zb-h1"):
        build("2f2b", 2, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ranks", "microbatches", "what"), [(0, 4, "ranks"), (-1, 4, "ranks"), (4, 0, "micro-batches")]
)
def test_sizes_below_one_are_refused_with_the_number(family: str, ranks: int, microbatches: int, what: str) -> None:
    got = min(ranks, microbatches)
    with pytest.raises(PlanError, match=f"too few {what} for {family}; got {got}; needed at least 1"):
        build(family, ranks, microbatches)
