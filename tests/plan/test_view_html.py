"""The page for a browser: its data, its head, and that nothing in it reaches out or breaks out.

What the page draws from its data was looked at in headless Chromium; these tests need no browser.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from pipex.errors import InputError
from pipex.observe import Event
from pipex.plan.actions import parse_action
from pipex.plan.costs import Costs
from pipex.plan.critical_path import critical_path
from pipex.plan.families import FAMILIES, build
from pipex.plan.simulator import simulate
from pipex.plan.view.html import html_page

VOID = {"meta"}


class Page(HTMLParser):
    """Reads a page as a browser does: elements with their text, and whether they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        (index,) = [k for k, (_, a) in enumerate(e for e in self.elements if e[0] == "script") if a.get("id") == "data"]
        return json.loads(self.texts["script"][index])  # type: ignore[no-any-return]

    @property
    def figures(self) -> list[list[str]]:
        """The head's table, row by row."""
        cells = [tag for tag, _ in self.elements if tag in ("tr", "th", "td")]
        texts = {tag: iter(self.texts.get(tag, [])) for tag in ("th", "td")}
        rows: list[list[str]] = []
        for tag in cells:
            if tag == "tr":
                rows.append([])
            else:
                rows[-1].append(next(texts[tag]))
        return rows


def test_the_data_of_a_small_plan() -> None:
    plan = build("1f1b", 2, 1)
    costs = Costs.uniform(plan, 1, 2, 1, hop=0.5)
    assert Page(html_page(plan, costs)).data == {
        "stages": [[0], [1]],
        "seconds": False,
        "bound": None,
        "limit": None,
        "peak": [1, 1],
        "memory": [{"time": [0, 0, 9], "held": [0, 1, 0]}, {"time": [0, 1.5, 5.5], "held": [0, 1, 0]}],
        "planned": [
            {"actions": "0F0,0B0", "start": [0, 6], "end": [1, 9]},
            {"actions": "1F0,1B0", "start": [1.5, 2.5], "end": [2.5, 5.5]},
        ],
        "measured": None,
        "waits": [{"1": [1, 1]}, {"0": [0, 0]}],
        "critical": [[0, 0], [1, 0], [1, 1], [0, 1]],
    }


def test_the_head_says_the_figures_and_what_they_mean() -> None:
    plan = build("1f1b", 2, 1)
    page = Page(html_page(plan, Costs.uniform(plan, 1, 2, 1, hop=0.5), bound=(8, "because"), limit=[3, 4]))
    assert page.texts["h1"] == ["1f1b"]
    assert "2 ranks · 1 chunk per rank (placement loop) · 1 micro-batch" in page.texts["p"]
    assert [row[:2] for row in page.figures] == [
        ["makespan", "9"],
        ["span", "9"],
        ["bubble of the makespan", "55.56%"],
        ["bubble of the span", "55.56%"],
        ["peak memory", "1"],
        ["distance to the bound", "12.50% above"],
    ]
    assert all(len(row) == 3 and row[2] for row in page.figures)
    assert page.figures[-2][2] == "The most that a rank holds at once: rank 0 (limit there 3)."
    assert page.figures[-1][2] == "Lower bound 8: because"
    assert (page.data["bound"], page.data["limit"]) == (8, [3, 4])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_holds_the_simulated_step_of_every_family(family: str) -> None:
    plan = build(family, 4, 8)
    costs = Costs.uniform(plan, 1 / 3, 0.7, 0.5, hop=0.1, activation=1 / 7)
    simulation = simulate(plan, costs)
    data = Page(html_page(plan, costs)).data
    for row, timed in zip(data["planned"], simulation.timeline, strict=True):
        assert list(map(parse_action, row["actions"].split(","))) == [each.action for each in timed]
        assert row["start"] == pytest.approx([each.start for each in timed], rel=1e-8)
        assert row["end"] == pytest.approx([each.end for each in timed], rel=1e-8)
    assert data["critical"] == list(map(list, critical_path(plan, costs, simulation)))
    assert data["stages"] == [list(plan.placement.stages_of(rank)) for rank in range(4)]
    assert data["peak"] == pytest.approx(simulation.peak_memory, rel=1e-8)
    assert [max(curve["held"]) for curve in data["memory"]] == data["peak"]


def measured(*ends: int) -> list[list[Event]]:
    """1f1b of 2 ranks and 1 micro-batch in milliseconds: F 0-1 and 2-3, B 3-5 and 5-end; one step per end."""
    rows = [[("F", 0, 0, 1), ("B", 0, 5, None)], [("F", 1, 2, 3), ("B", 1, 3, 5)]]
    return [
        [
            Event(k, kind, stage, 0, (100 * k + begin) * 10**6, (100 * k + (end or last)) * 10**6)
            for k, last in enumerate(ends, start=1)
            for kind, stage, begin, end in row
        ]
        for row in rows
    ]


def test_a_measured_run_stands_beside_the_plan() -> None:
    plan = build("1f1b", 2, 1)
    page = Page(html_page(plan, Costs.uniform(plan, 1e-3, 2e-3, 1e-3), trace=measured(9, 10, 20), bound=(4e-3, "why")))
    assert page.data["seconds"] is True
    assert page.data["measured"] == [
        {"actions": "0F0,0B0", "start": [0, 0.005], "end": [0.001, 0.01]},
        {"actions": "1F0,1B0", "start": [0.002, 0.003], "end": [0.003, 0.005]},
    ]
    assert [row[:-1] for row in page.figures] == [
        ["", "planned", "measured", "difference"],
        ["makespan", "8 ms", "10 ms", "+25.0%"],
        ["span", "8 ms", "10 ms", "+25.0%"],
        ["bubble of the makespan", "50.00%", "55.00%", "+5.00 points"],
        ["bubble of the span", "50.00%", "40.00%", "-10.00 points"],
        ["peak memory", "1", "", ""],
        ["distance to the bound", "100.00% above", "", ""],
    ]
    assert page.figures[-1][-1] == "Lower bound 4 ms: why"
    assert "Measured: step 2, the one with the median makespan of 3 steps." in page.texts["p"]


def test_texts_cannot_break_out() -> None:
    plan = build("1f1b", 2, 1)
    costs = Costs.uniform(plan)
    reason = '</td></script><script>alert(1)</script><b title="\'">&amp;'
    plain, page = Page(html_page(plan, costs, bound=(1, "x"))), Page(html_page(plan, costs, bound=(1, reason)))
    assert page.elements == plain.elements
    assert page.figures[-1][2] == f"Lower bound 1: {reason}"


def test_the_page_asks_no_network() -> None:
    plan = build("1f1b", 2, 1)
    text = html_page(plan, Costs.uniform(plan))
    page = Page(text)
    for _, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "action", "srcset", "data"}
    assert set(re.findall(r"https?://[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(r"url\((?!#)|@import|\bfetch\(|XMLHttpRequest|\bimport\b", text)
    policies = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_without_scripts_there_is_a_picture_in_text() -> None:
    plan = build("1f1b", 2, 1)
    (picture,) = Page(html_page(plan, Costs.uniform(plan))).texts["pre"]
    assert picture.splitlines()[0] == "rank 0 |F0 .........B0--- "


def test_the_largest_step_stays_small_enough_to_send() -> None:
    plan = build("zb-h1", 32, 256)
    text = html_page(plan, Costs.uniform(plan, 1.037, 1.211, 0.713, hop=0.0173))
    assert sum(len(order) for order in plan.orders) == 24576
    assert len(text) < 1_500_000


def test_a_step_that_takes_no_time_has_a_page() -> None:
    plan = build("gpipe", 2, 2)
    page = Page(html_page(plan, Costs.uniform(plan, 0, 0, 0), bound=(0, "nothing to do")))
    assert page.figures[-1][1] == "none"


def test_what_does_not_fit_the_plan_is_refused() -> None:
    plan = build("1f1b", 2, 1)
    with pytest.raises(InputError, match="wrong number of memory limits; got 3; needed 2, one per rank"):
        html_page(plan, Costs.uniform(plan), limit=[1, 2, 3])
    with pytest.raises(InputError, match="another number of ranks; got 1; needed 2"):
        html_page(plan, Costs.uniform(plan), trace=measured(9)[:1])
    with pytest.raises(InputError, match="wrong number of costs"):
        html_page(plan, Costs.uniform(build("1f1b", 3, 1)))
