"""The plan as data: its text, its digest, its edges, and the cost of importing it."""

from __future__ import annotations

import dataclasses
import pkgutil
import re
import subprocess
import sys

import pytest

import pipex.plan
from pipex.errors import PlanError, PlanSyntaxError
from pipex.plan.families import FAMILIES, build
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Plan

TEXT = """\
# pipex plan 1: family=1f1b placement=loop ranks=2 chunks=1 microbatches=2 update=step peak_activations=2,1
0F0,0F1,0B0,0B1
1F0,1B0,1F1,1B1
"""


def test_the_text_is_metadata_and_one_row_per_rank() -> None:
    assert build("1f1b", 2, 2).to_text() == TEXT


def test_a_plan_of_every_family_survives_its_text(small_plans: list[Plan]) -> None:
    for plan in [*small_plans, *(build(family, 4, 12) for family in FAMILIES)]:
        again = Plan.from_text(plan.to_text())
        assert again == plan
        assert again.digest == plan.digest


def test_a_plan_with_chunks_and_a_rank_without_work_survives_its_text() -> None:
    plan = Plan("by-hand", Placement("v", 2, 2), 1, (build("naive", 1, 1).orders[0], ()), (1, 0))
    assert Plan.from_text(plan.to_text()) == plan


def test_every_field_counts_in_the_digest() -> None:
    plan = build("zb-h1", 2, 3)
    swapped = (plan.orders[0][:-2] + plan.orders[0][:-3:-1], plan.orders[1])
    others = [
        dataclasses.replace(plan, family="other"),
        dataclasses.replace(plan, placement=Placement("v", 2, 2)),
        dataclasses.replace(plan, placement=Placement("loop", 2, 2)),
        dataclasses.replace(plan, microbatches=4),
        dataclasses.replace(plan, orders=swapped),
        dataclasses.replace(plan, peak_activations=(2, 1)),
    ]
    digests = {p.digest for p in [plan, *others]}
    assert len(digests) == 7
    assert {len(digest) for digest in digests} == {16}


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("plan 1:", "plan 2:", "line 1, column 1;"),
        ("# pipex", "#pipex", "line 1, column 1;"),
        ("ranks=2", "ranks=02", "line 1, column 1;"),
        ("ranks=2", "ranks=-2", "line 1, column 1;"),
        ("loop", "ring", "line 1, column 1;"),
        ("peak_activations=2,1", "peak_activations=2,1,", "line 1, column 1;"),
        ("peak_activations=2,1", "peak_activations=2,1\r", "line 1, column 1;"),
        ("0B0,", "0B,", "line 2, column 11;"),
        ("1F1,", "1F1, ", "line 3, column 13;"),
        ("1F1,", "1F1,,", "line 3, column 13;"),
        ("1B1\n", "1B1\r\n", "line 3, column 16;"),
        ("1B1\n", "1B1", "line 3, column 16;"),
        ("0B1\n", "0B1,\n", "line 2, column 17;"),
    ],
)
def test_a_text_that_is_not_exactly_a_plan_is_refused_with_its_place(old: str, new: str, place: str) -> None:
    changed = TEXT.replace(old, new)
    assert changed != TEXT
    with pytest.raises(PlanSyntaxError, match=place):
        Plan.from_text(changed)


@pytest.mark.parametrize("text", ["", "\n", "0F0,0B0\n", "\x00\x01\x02"])
def test_something_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanSyntaxError, match="line 1, column 1;"):
        Plan.from_text(text)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("1F0,1B0,1F1,1B1\n", "", "wrong number of orders; got 1; needed 2"),
        ("1F0,1B0,1F1,1B1\n", "1F0,1B0,1F1,1B1\n\n", "wrong number of orders; got 3; needed 2"),
        ("=2,1", "=2", "wrong number of peak_activations; got 1; needed 2"),
        ("microbatches=2", "microbatches=0", "too few micro-batches; got 0; needed at least 1"),
        ("ranks=2", "ranks=0", "too few ranks; got 0; needed at least 1"),
        ("ranks=2", "ranks=999999999", "wrong number of orders; got 2; needed 999999999"),
    ],
)
def test_lines_that_do_not_fit_together_are_refused(old: str, new: str, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        Plan.from_text(TEXT.replace(old, new))


def test_a_family_name_that_the_text_cannot_hold_is_refused() -> None:
    with pytest.raises(PlanError, match=re.escape("bad family name; got 'my plan'")):
        dataclasses.replace(build("naive", 1, 1), family="my plan")


def test_edges_join_neighbouring_stages_on_different_ranks() -> None:
    plan = dataclasses.replace(build("naive", 2, 1), placement=Placement("v", 2, 2))
    assert plan.edges == (
        Edge(0, 1, "activation"), Edge(2, 3, "activation"), Edge(1, 0, "gradient"), Edge(3, 2, "gradient"),
    )  # fmt: skip
    assert build("naive", 1, 3).edges == ()


def test_plans_need_neither_torch_nor_any_other_package() -> None:
    modules = ["pipex.plan", *(m.name for m in pkgutil.walk_packages(pipex.plan.__path__, "pipex.plan."))]
    program = f"""
import importlib, sys
before = set(sys.modules)
for name in {modules}: importlib.import_module(name)
allowed = set(sys.stdlib_module_names) | {{"pipex"}}
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - allowed))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
