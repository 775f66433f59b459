"""Megatron-LM's layout string, against its documentation and layouts written out by hand."""

from __future__ import annotations

import random
import re

import pytest
from torch import nn

from pipex import split_model
from pipex.errors import PlanError, PlanSyntaxError
from pipex.plan.interop import Layout
from pipex.plan.interop.megatron_layout import LayerKind
from pipex.plan.placement import Placement

DEEPSEEK_V3 = "Et*3|(tt|)*29,m|L"


def test_the_layout_of_megatron_s_guide() -> None:
    layout = Layout.from_text(DEEPSEEK_V3, ranks=16)
    assert layout.placement == Placement("loop", 16, 2)
    assert layout.stages == (
        ("embedding", "transformer", "transformer", "transformer"),
        *[("transformer", "transformer")] * 29,
        ("mtp",),
        ("loss",),
    )
    assert layout.counts == [4] + [2] * 29 + [1, 1]
    assert [layout.placement.rank_of(30), layout.placement.rank_of(31)] == [14, 15]
    assert layout.to_text() == DEEPSEEK_V3


WRITTEN_OUT = {
    "EtL": "EtL",
    "E|t|L": "E|t|L",
    "E||t|L": "E||t|L",
    "Ettt|(tt|)*29,m|L": "Ettt|" + "tt|" * 29 + "m|L",
    "E,t,|,,t,L,": "Et|tL",
    "Et*12|L": "Etttttttttttt|L",
    "Et|*3,tL": "Et|||tL",
    "E(t|t)*3L": "Et|tt|tt|tL",
    "Et*2(|t*3)*2|L": "Ett|ttt|ttt|L",
    "E(t*1,|)*1L": "Et|L",
    "Et(|)*2m*2|L|": "Et||mm|L|",
}


@pytest.mark.parametrize(("text", "written_out"), WRITTEN_OUT.items())
def test_repetitions_are_what_is_written_out(text: str, written_out: str) -> None:
    stages = len(written_out.split("|"))
    layout = Layout.from_text(text, stages)
    letters = {"embedding": "E", "transformer": "t", "mtp": "m", "loss": "L"}
    assert "|".join("".join(letters[kind] for kind in stage) for stage in layout.stages) == written_out
    assert layout == Layout.from_text(written_out, stages)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("EtL", "EtL"),
        ("Ett|ttt|ttt|L", "Ett|(t*3|)*2,L"),
        ("E|||t|L", "E|(|)*2,t|L"),
        ("E|tttL||", "E|t*3,L||"),
        ("E|tL||||", "E|tL|(|)*3"),
        ("Et|tt|tt|t|t|tmmm|L", "Et|(tt|)*2,(t|)*2,tm*3|L"),
    ],
)
def test_the_text_is_short(layout: str, text: str) -> None:
    read = Layout.from_text(layout, layout.count("|") + 1)
    assert read.to_text() == text
    assert Layout.from_text(text, read.ranks) == read


def test_every_layout_comes_back_from_its_text() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        stages: list[list[LayerKind]] = [
            ["transformer"] * rng.choice((0, 1, 2, 2, 2, 3, 12)) for _ in range(rng.randint(1, 12))
        ]
        stages[rng.choice([i for i in range(len(stages)) if not any(stages[:i])])].insert(0, "embedding")
        end = rng.choice([i for i in range(len(stages)) if not any(stages[i + 1 :])])
        stages[end] += ["mtp"] * rng.randint(0, 4)
        stages[rng.randint(end, len(stages) - 1)].append("loss")
        ranks = len(stages)
        layout = Layout(ranks, tuple(map(tuple, stages)))
        assert Layout.from_text(layout.to_text(), ranks) == layout


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("EtxL", 3),
        (" EtL", 1),
        ("EtL\n", 4),
        ("etL", 1),
        ("E*", 2),
        ("Et*L", 3),
        ("Et*0L", 3),
        ("Et*03L", 3),
        ("Et*-3L", 3),
        ("Et*٣L", 3),
        ("Et,*3L", 4),
        ("*3EtL", 1),
        ("Et*2*3L", 5),
        ("Et*2,9L", 6),
        ("Et*1234567890L", 3),
        ("E(ttL", 2),
        ("E(tt)L", 6),
        ("E(tt)*L", 6),
        ("E()*3L", 3),
        ("Ett)*3L", 4),
        ("E((t)*2|)*3L", 3),
        ("E\x00L", 2),
        ("﻿EtL", 1),
    ],
)
def test_text_that_is_no_layout_is_refused_at_its_first_wrong_character(text: str, column: int) -> None:
    with pytest.raises(PlanSyntaxError, match=f"cannot read the layout at column {column};"):
        Layout.from_text(text, 1)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("E(t)*999999999L", 5),
        ("Et*999999999L", 3),
        ("E|*999999999L", 3),
        ("E(t*99999|)*2L", 12),
        ("Et*60000,t*60000L", 11),
    ],
)
def test_layouts_larger_than_any_model_are_refused_before_they_are_built(text: str, column: int) -> None:
    with pytest.raises(PlanSyntaxError, match=f"at column {column}; .* at most 100000 layers and stages in all"):
        Layout.from_text(text, 1)


@pytest.mark.parametrize("text", ["Et*0L", "E*", "E(tt)L"])
def test_a_bad_number_is_called_one(text: str) -> None:
    with pytest.raises(PlanSyntaxError, match=r"needed '\*' and a number, at least 1"):
        Layout.from_text(text, 1)


def test_every_layer_and_stage_counts_once_for_the_limit() -> None:
    layers = "t" * 30_000
    assert Layout.from_text(f"E({layers})*3|*9997L", 1).counts == [90_001, *[0] * 9996, 1]  # 99,999 in all
    with pytest.raises(PlanSyntaxError, match=f"at column {len(layers) + 4}; .* at most 100000 layers"):
        Layout.from_text(f"E({layers})*4L", 1)


@pytest.mark.parametrize("text", ["t" * 100_001, "," * 100_001, "(" * 10**7])
def test_a_text_longer_than_any_layout_is_refused_unread(text: str) -> None:
    with pytest.raises(
        PlanSyntaxError, match=f"the layout is too long; got {len(text)} characters; needed 100000 at most"
    ):
        Layout.from_text(text, 1)


@pytest.mark.parametrize(
    ("text", "ranks", "problem"),
    [
        ("Et|tt|L", 2, "the layout does not fit 2 ranks; got 3 stages; needed 2 or 4 stages"),
        ("Et|tt|L", 4, "the layout does not fit 4 ranks; got 3 stages; needed 4 stages"),
        ("EtL", 0, "too few ranks for the layout; got 0; needed at least 1"),
        ("", 1, "bad embedding in the layout; got 0 of them; needed one, first of all layers"),
        ("|||", 1, "bad embedding in the layout; got 0 of them"),
        ("ttL", 1, "bad embedding in the layout; got 0 of them"),
        ("tEL", 1, "bad embedding in the layout; got it as layer 1 of 3; needed one, first of all layers"),
        ("EEtL", 1, "bad embedding in the layout; got 2 of them"),
        ("Ett", 1, "bad loss in the layout; got 0 of them; needed one, last of all layers"),
        ("ELt", 1, "bad loss in the layout; got it as layer 1 of 3"),
        ("EtLL", 1, "bad loss in the layout; got 2 of them"),
        ("EtmtL", 1, "bad mtp in the layout; got a transformer layer after it; needed it after all of them"),
        ("Et|m|mL", 3, "bad mtp in the layout; got it in 2 stages; needed all in one stage"),
        ("Et|m|L|", 2, "bad mtp in the layout; got it in stage 1; needed it in one of the stages 2 to 3, the last"),
    ],
)  # fmt: skip
def test_layers_that_break_a_rule_of_megatron_are_refused(text: str, ranks: int, problem: str) -> None:
    with pytest.raises(PlanError, match=re.escape(problem)):
        Layout.from_text(text, ranks)


def test_the_counts_cut_a_model() -> None:
    layout = Layout.from_text("Et|t*3|tL", ranks=3)
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(7)))
    stages = split_model(model, layout.placement.stages, balance=layout.counts)
    assert [len(stage.layers) for stage in stages] == [2, 3, 2]
