"""Plans that recompute and offload: their text, their proof, their course and their memory, against a judge that shares
no code with them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from step_judge import Judge

from pipex.errors import InputError, PlanError, PlanSyntaxError
from pipex.plan import interop
from pipex.plan.actions import NONE, Action, Kind
from pipex.plan.costs import INPUT_SHARE, Costs, RankCosts
from pipex.plan.critical_path import critical_path
from pipex.plan.families import FAMILIES, build
from pipex.plan.fit import fit
from pipex.plan.layer_costs import Layer, LayerCosts
from pipex.plan.measured import measured_costs
from pipex.plan.memory import with_promise
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.simulator import simulate
from pipex.plan.validator import validate
from pipex.plan.view.chrome import chrome_trace
from pipex.plan.view.course import memory_curve
from pipex.plan.view.html import html_page
from pipex.plan.view.text import simulation_view

# --- the text --------------------------------------------------------------------------------------------------------

TEXT = """\
# pipex plan 1: family=1f1b placement=loop ranks=2 chunks=1 microbatches=2 update=step peak_activations=1,1 \
recomputed=0 offloaded=1
0F0,0F1,0B0,0B1
1F0,1B0,1F1,1B1
"""


def spared(plan: Plan, recomputed: tuple[int, ...] = (), offloaded: tuple[int, ...] = ()) -> Plan:
    return dataclasses.replace(plan, recomputed=recomputed, offloaded=offloaded)


def test_the_first_line_says_which_stages_are_spared() -> None:
    plan = dataclasses.replace(spared(build("1f1b", 2, 2), (0,), (1,)), peak_activations=(1, 1))
    assert plan.to_text() == TEXT
    assert Plan.from_text(TEXT) == plan
    validate(plan)
    for recomputed, offloaded in (((0, 1), ()), ((), (0, 1)), ((1,), (0,)), ((), ())):
        other = spared(plan, recomputed, offloaded)
        assert Plan.from_text(other.to_text()) == other
        assert other.digest != plan.digest


@pytest.mark.parametrize(
    ("family", "ranks", "microbatches", "digest"),
    [
        ("1f1b", 4, 8, "d5759d0bce3fbd0d0fe06a85f377661d"),
        ("zbv", 3, 6, "6ed6de37201719f8e815b60abfa9555b"),
        ("gpipe", 2, 3, "c03421baf28a64f4d334adef31bc88f0"),
    ],
)
def test_a_plan_that_spares_nothing_has_the_digest_that_it_had_before_any_could(
    family: str, ranks: int, microbatches: int, digest: str
) -> None:
    assert build(family, ranks, microbatches).digest.hex() == digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("recomputed=0", "recomputed="),
        ("recomputed=0", "recomputed=00"),
        ("recomputed=0", "recomputed=0,"),
        ("recomputed=0", "recomputed=-1"),
        ("recomputed=0", "recomputed=all"),
        (" recomputed=0 offloaded=1", " offloaded=1 recomputed=0"),
        (" recomputed=0", "  recomputed=0"),
        (" recomputed=0", " recomputed=0 recomputed=0"),
        ("offloaded=1", "offloaded=1 "),
    ],
)
def test_a_first_line_that_says_it_in_another_way_is_refused(old: str, new: str) -> None:
    changed = TEXT.replace(old, new)
    assert changed != TEXT
    with pytest.raises(PlanSyntaxError, match="line 1, column 1;"):
        Plan.from_text(changed)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("recomputed=0", "recomputed=2", "a stage that is not there is recomputed; got 2; needed 0 to 1"),
        ("offloaded=1", "offloaded=7", "a stage that is not there is offloaded; got 7; needed 0 to 1"),
        ("recomputed=0", "recomputed=0,0", "stage 0 comes twice or late among the stages recomputed; got 0,0"),
        (
            "recomputed=0 offloaded=1",
            "offloaded=1,0",
            "stage 0 comes twice or late among the stages offloaded; got 1,0",
        ),
        ("offloaded=1", "offloaded=0", "stage 0 is recomputed and offloaded; needed one of them"),
        ("update=step", "update=never", "stage 0 is recomputed or offloaded in a plan with update=never"),
        ("update=step", "update=microbatch", "stage 0 is recomputed or offloaded in a plan with update=microbatch"),
    ],
)
def test_stages_that_cannot_be_spared_are_refused_by_name(old: str, new: str, problem: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_text(TEXT.replace(old, new))
    assert problem in str(caught.value)


@pytest.mark.parametrize("stages", [("0",), (True,), (0.0,), [0], 0, None, "0"])
def test_what_is_no_tuple_of_numbers_is_refused(stages: Any) -> None:
    for name in ("recomputed", "offloaded"):
        with pytest.raises(PlanError, match=f"bad list of stages {name}; got .* needed a tuple of their numbers"):
            dataclasses.replace(build("1f1b", 2, 4), **{name: stages})


def test_torch_s_csv_cannot_say_it() -> None:
    for plan, what in (
        (spared(build("1f1b", 2, 2), (1,)), "stage 1 recomputed"),
        (Plan.from_text(TEXT), "stage 0 rec"),
    ):
        with pytest.raises(PlanError, match=f"holds every activation from F to its backward; got {what}"):
            interop.to_torch_csv(plan)
    with pytest.raises(PlanError, match="got stage 0 offloaded"):
        interop.to_torch_csv(spared(build("1f1b", 2, 2), (), (0, 1)))


# --- every plan, replayed by the judge -------------------------------------------------------------------------------


def fused() -> Plan:
    """1F1B of 3 ranks, some of whose pairs run as one."""
    plan = build("1f1b", 3, 6)
    first = plan.orders[0]
    pairs = [Action(NONE, Kind.OVERLAP_F_B, NONE, first[at : at + 2]) for at in range(2, 10, 2)]
    return dataclasses.replace(plan, orders=((*first[:2], *pairs, *first[10:]), *plan.orders[1:]))


def two_at_once() -> Plan:
    """Two forwards and two backwards in one action each."""
    f, b = ([Action(0, kind, m) for m in range(4)] for kind in (Kind.F, Kind.B))
    joined = (Action(NONE, Kind.OVERLAP_F_B, NONE, parts) for parts in ((f[1], f[2], b[0]), (f[3], b[1], b[2])))
    return Plan("by-hand", Placement("loop", 1), 4, ((f[0], *joined, b[3]),), (4,))


def cases(random_plans: list[Plan]) -> Iterator[tuple[Plan, Costs]]:
    """Plans with any of their stages spared, under whole-numbered costs and any promise from the smallest on."""
    rng = random.Random(0)
    families = [name for name in FAMILIES if build(name, 4, 8).update in ("step", "delayed")]
    plans = [
        *random_plans[:150],
        fused(),
        *[two_at_once()] * 6,
        *(build(family, 4, 8) for family in families for _ in range(3)),
    ]
    for plan in plans:
        stages = range(plan.placement.stages)
        what = [rng.choice(("held", "recomputed", "offloaded", "offloaded")) for _ in stages]
        plan = spared(plan, *(tuple(s for s in stages if what[s] == name) for name in ("recomputed", "offloaded")))
        f, i, w, activation, deferred, inputs, recompute, offload = (
            [float(rng.randint(1, 9)) for _ in stages] for _ in range(8)
        )
        hop = {edge: float(rng.randint(0, 9)) for edge in plan.edges}
        costs = Costs(f, i, w, hop, activation, deferred, rng.choice((1.0, 0.5)), inputs)
        costs = dataclasses.replace(
            costs,
            recompute=rng.choice((None, recompute)),
            offload=rng.choice((None, offload, [9 * x for x in offload])),
        )
        least = with_promise(plan).peak_activations
        yield (
            dataclasses.replace(plan, peak_activations=tuple(most + rng.choice((0, 0, 1, 2, 9)) for most in least)),
            costs,
        )


def test_every_course_is_the_judge_s(random_plans: list[Plan]) -> None:
    copied = 0
    for plan, costs in cases(random_plans):
        judge, simulation = Judge(plan, costs), simulate(plan, costs)
        assert {part: t.end for row in simulation.timeline for t in row for part in t.action.each} == judge.end
        assert simulation.makespan == max(judge.end.values()) - min(judge.start.values())
        copies = {(c.stage, c.microbatch): c[2:] for row in simulation.copies for c in row}
        assert copies == {key: judge.out[key] + judge.back[key] for key in judge.back}
        copied += len(copies)
        useful = sum(costs.forward[s] + costs.input_gradient[s] + costs.weight_gradient[s] for s, _ in judge.held_keys)
        if costs.overlap == 1:
            whole = plan.placement.ranks * simulation.makespan
            assert simulation.lost == pytest.approx(1 - useful / whole, abs=1e-12)
            assert simulation.lost == simulation.bubble_makespan + simulation.recomputation
        for before, after in zip(simulation.timeline, plan.orders, strict=True):
            assert [timed.action for timed in before] == list(after)
    assert copied > 500


def test_a_promise_is_refused_exactly_where_the_judge_counts_more(random_plans: list[Plan]) -> None:
    for plan, costs in cases(random_plans):
        judge = Judge(plan, costs)
        most = [judge.most_held(rank) for rank in judge.ranks]
        assert all(held <= promised for held, promised in zip(most, plan.peak_activations, strict=True))
        validate(plan)
        smallest = with_promise(plan)
        validate(smallest)
        tight = Judge(smallest, costs)
        assert [tight.most_held(rank) for rank in tight.ranks] == list(smallest.peak_activations)
        rank = max(judge.ranks, key=lambda rank: smallest.peak_activations[rank])
        if (peak := smallest.peak_activations[rank]) > 0:
            promise = (*smallest.peak_activations[:rank], peak - 1, *smallest.peak_activations[rank + 1 :])
            with pytest.raises(PlanError, match=f"rank {rank} holds more activations than promised; got {peak} at"):
                validate(dataclasses.replace(plan, peak_activations=promise))


def test_no_clock_makes_a_rank_hold_more_than_its_order_says(random_plans: list[Plan]) -> None:
    for plan, costs in cases(random_plans):
        judge, simulation = Judge(plan, costs), simulate(plan, costs)
        for rank in judge.ranks:
            assert judge.most_held_by_the_clock(rank) <= plan.peak_activations[rank]
            if not any(action.parts for action in plan.orders[rank]):
                assert simulation.peak_memory[rank] == judge.peak(rank)
            curve = memory_curve(plan, costs, simulation, rank)
            assert max(held for _, held in curve) <= simulation.peak_memory[rank]
            assert curve[-1][1] == 0
            assert [time for time, _ in curve] == sorted(time for time, _ in curve)
            if not simulation.copies[rank]:
                assert max(held for _, held in curve) == simulation.peak_memory[rank]


def test_a_critical_path_leads_through_copies_without_a_gap(random_plans: list[Plan]) -> None:
    through_copies = 0
    for plan, costs in cases(random_plans):
        simulation = simulate(plan, costs)
        path = critical_path(plan, costs, simulation)
        timed = [simulation.timeline[rank][position] for rank, position in path]
        assert (timed[0].start, timed[-1].end) == (0, simulation.makespan)
        for (rank, position), before, (next_rank, next_position), after in zip(
            path, timed, path[1:], timed[1:], strict=False
        ):
            assert before.end <= after.start
            if rank == next_rank and before.end < after.start:
                through_copies += 1
                spans = {span for c in simulation.copies[rank] for span in (c[2:4], c[4:6])}
                reached = {before.end}
                while more := {end for start, end in spans if start in reached} - reached:
                    reached |= more
                assert after.start in reached
                assert position < next_position
    assert through_copies > 20


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 4), (4, 4), (4, 12), (8, 24)])
def test_recomputing_everything_costs_what_a_longer_i_costs(p: int, m: int) -> None:
    """The closed forms with I + F in the place of I."""
    for f, i, w, hop in ((1, 1, 1, 0), (7, 11, 5, 2), (100, 100, 65, 50)):
        for family, hops in (("gpipe", 2 * (p - 1)), ("1f1b", 2 * (p - 1) * m // p + 2 * p - 4 if p > 1 else 0)):
            plan = with_promise(spared(build(family, p, m), tuple(range(p))))
            simulation = simulate(plan, Costs.uniform(plan, f, i, w, hop))
            assert simulation.makespan == (m + p - 1) * (f + i + f + w) + hops * hop
            assert simulation.recomputation == pytest.approx(m * f / simulation.makespan, abs=1e-12)
            assert simulation.lost == pytest.approx(1 - m * (f + i + w) / simulation.makespan, abs=1e-12)
            assert plan.peak_activations == (1,) * p
        plan = with_promise(spared(build("zb-h1", p, m), tuple(range(p))))
        assert simulate(plan, Costs.uniform(plan, f, i, w)).makespan == m * (2 * f + i + w) + (p - 1) * (2 * f + i - w)


def test_recomputation_has_its_own_time_and_what_stays_its_own_memory() -> None:
    """One rank: F0 F1 F2, then B0 to B2, each the longer by the recomputation and holding 10 beside the inputs left."""
    plan = with_promise(spared(build("gpipe", 1, 3), (0,)))
    costs = dataclasses.replace(Costs.uniform(plan, 4, 5, 6, activation=10), inputs=[2.0], recompute=[3.0])
    simulation = simulate(plan, costs)
    assert [(t.start, t.end) for t in simulation.timeline[0]] == [(0, 4), (4, 8), (8, 12), (12, 26), (26, 40), (40, 54)]
    assert simulation.bubble_makespan == 0
    assert simulation.recomputation == simulation.lost == pytest.approx(9 / 54)
    assert simulation.peak_memory == (14,)
    assert plan.peak_activations == (1,)
    assert memory_curve(plan, costs, simulation, 0) == [
        (0, 0), (0, 2), (4, 4), (8, 6), (12, 14), (26, 4), (26, 12), (40, 2), (40, 10), (54, 0),
    ]  # fmt: skip


def test_a_fused_pair_recomputes_at_its_share() -> None:
    pair = Action(NONE, Kind.OVERLAP_F_B, NONE, (Action(0, Kind.F, 1), Action(0, Kind.B, 0)))
    plan = Plan(
        "pair", Placement("loop", 1), 2, ((Action(0, Kind.F, 0), pair, Action(0, Kind.B, 1)),), (1,), recomputed=(0,)
    )
    validate(plan)
    simulation = simulate(plan, dataclasses.replace(Costs.uniform(plan, 2, 3, 1), overlap=0.5))
    assert [(t.start, t.end) for t in simulation.timeline[0]] == [(0, 2), (2, 6), (6, 12)]
    assert simulation.recomputation == pytest.approx((0.5 * 2 + 2) / 12)


@pytest.mark.parametrize(
    ("promise", "held", "starts"),
    [
        # Each F waits for the copy of the one before it, the first B for the last of them, and each B for its own.
        (1, 1, [0, 13, 26, 39, 55, 78, 101, 124]),
        # One copy out beside the next F; the copies for B0 and B1 find no room but before these.
        (2, 2, [0, 10, 20, 30, 43, 66, 86, 106]),
        # All that is needed.
        (4, 4, [0, 10, 20, 30, 40, 60, 80, 100]),
    ],
)
def test_copies_take_as_long_as_the_promise_lets_them(promise: int, held: int, starts: list[float]) -> None:
    """One rank, gpipe with 4 micro-batches: F takes 10, B 20, a copy 3."""
    plan = dataclasses.replace(spared(build("gpipe", 1, 4), (), (0,)), peak_activations=(promise,))
    validate(plan)
    costs = dataclasses.replace(Costs.uniform(plan, 10, 12, 8), offload=[3.0])
    simulation = simulate(plan, costs)
    assert [t.start for t in simulation.timeline[0]] == starts
    assert simulation.peak_memory == (held,)
    assert simulation.recomputation == 0


def test_memory_falls_when_a_copy_out_has_ended_and_rises_when_a_copy_back_starts() -> None:
    """F0 F1 B0 B1 of 10 and 20 with copies of 3 and room for one activation: nothing runs while a copy is under way."""
    plan = dataclasses.replace(spared(build("gpipe", 1, 2), (), (0,)), peak_activations=(1,))
    costs = dataclasses.replace(Costs.uniform(plan, 10, 12, 8, activation=5), offload=[3.0])
    assert memory_curve(plan, costs, simulate(plan, costs), 0) == [
        (0, 0), (0, 5), (13, 0), (13, 5), (26, 0), (26, 5), (49, 0), (49, 5), (72, 0),
    ]  # fmt: skip
    beside = dataclasses.replace(plan, microbatches=3, orders=build("gpipe", 1, 3).orders, peak_activations=(2,))
    assert memory_curve(beside, costs, simulate(beside, costs), 0)[:6] == [
        (0, 0), (0, 5), (10, 10), (13, 5), (20, 10), (23, 5),
    ]  # fmt: skip


def test_one_copy_at_a_time_goes_in_each_direction() -> None:
    """Copies that take 25 beside an F of 10: each begins when the one before it has ended."""
    plan = dataclasses.replace(spared(build("gpipe", 1, 4), (), (0,)), peak_activations=(1,))
    costs = dataclasses.replace(Costs.uniform(plan, 10, 12, 8), offload=[25.0])
    (copies,) = simulate(plan, costs).copies
    assert [copy[:4] for copy in copies] == [(0, 0, 10, 35), (0, 1, 45, 70), (0, 2, 80, 105), (0, 3, 115, 140)]
    assert [copy[4:] for copy in copies] == [(140, 165), (185, 210), (230, 255), (275, 300)]
    roomy = dataclasses.replace(plan, peak_activations=(3,))
    (copies,) = simulate(roomy, costs).copies
    assert all(a.out_end <= b.out_start and a.back_end <= b.back_start for a, b in pairwise(copies))
    assert all(copy.out_end <= copy.back_start for copy in copies)


def test_what_there_is_room_for_is_not_copied() -> None:
    plan = spared(build("1f1b", 4, 8), (), (0, 1, 2, 3))
    costs = dataclasses.replace(Costs.uniform(plan), offload=[1.0] * 4)
    assert not any(simulate(plan, costs).copies)
    assert simulate(plan, costs).timeline == simulate(spared(plan), costs).timeline


# --- costs -----------------------------------------------------------------------------------------------------------


def test_what_sparing_costs_lands_on_the_stages() -> None:
    model = RankCosts.of(2, (4, 6), activation=(34, 68), recompute=(2, 4), offload=8)
    costs = model.on(Placement("v", 2, 2))
    assert costs.recompute == costs.recomputation == [1, 2, 2, 1]
    assert costs.offload == [4, 4, 4, 4]
    assert costs.inputs == [1, 2, 2, 1]  # a stage's input is as large in how many chunks soever a rank's share is cut
    assert RankCosts.of(2, activation=34, inputs=5).on(Placement("loop", 2, 2)).inputs == [5] * 4
    plain = RankCosts.of(2, (4, 6)).on(Placement("loop", 2))
    assert (plain.recompute, plain.offload, plain.recomputation) == (None, None, [4, 6])
    assert plain.inputs == [INPUT_SHARE] * 2
    for name in ("inputs", "recompute", "offload"):
        with pytest.raises(InputError, match=f"bad cost: {name}, number 0; got -1"):
            RankCosts.of(2, **{name: -1})  # type: ignore[arg-type]
        plan = build("1f1b", 2, 2)
        with pytest.raises(InputError, match=f"wrong number of costs {name}; got 1; needed 2, one per stage"):
            simulate(plan, dataclasses.replace(Costs.uniform(plan), **{name: [1.0]}))  # type: ignore[arg-type]


def test_measured_backwards_contain_their_recomputation() -> None:
    plan = spared(build("zb-h1", 1, 1), (0,))
    costs = measured_costs(plan, {("F", 0): 1.0, ("I", 0): 5.0, ("W", 0): 4.0}, hop=0.0)
    assert simulate(plan, costs).makespan == 10


def test_a_cut_for_a_plan_that_spares_is_judged_by_the_same_memory() -> None:
    rng = random.Random(1)
    layers = [Layer(f"layer {n}", 1, 1, 1, *(rng.randint(1, 9) for _ in range(4))) for n in range(10)]
    costs = LayerCosts(tuple(layers))
    for recomputed, offloaded in (((0, 1), ()), ((), (0, 2)), ((1,), (0, 3))):
        for family in ("interleaved", "zbv"):
            plan = with_promise(spared(build(family, 2, 4, chunks=2), recomputed, offloaded))
            found = fit(costs, plan, state=1.0)
            parameters = [0.0, 0.0]
            begin = 0
            for stage, count in enumerate(found.counts):
                parameters[plan.placement.rank_of(stage)] += sum(x.parameters for x in layers[begin : begin + count])
                begin += count
            stages = costs.of(plan.placement, found.counts)
            judge = Judge(plan, stages)
            assert found.memory == tuple(judge.peak(rank) + parameters[rank] for rank in judge.ranks)
            first = [0, *(sum(found.counts[: s + 1]) for s in range(3))]
            assert stages.inputs == [layers[0].activation, *(layers[n - 1].output for n in first[1:])]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_show_copies_and_recomputation() -> None:
    plan = with_promise(spared(build("gpipe", 2, 4), (1,), (0,)))
    costs = dataclasses.replace(Costs.uniform(plan, 1, 1, 1), offload=[0.25, 0.25])
    simulation = simulate(plan, costs)
    rows = chrome_trace(plan, costs)["traceEvents"]
    copies = [row for row in rows if row.get("cat") == "copy"]
    assert {(row["pid"], row["tid"]) for row in copies} == {(0, 1), (0, 2)}
    assert sorted(row["name"] for row in copies) == sorted(
        f"copy {way} 0 {m}" for way in ("out", "back") for m in range(4)
    )
    assert {row["dur"] for row in copies} == {250_000}
    assert [row["ts"] for row in copies[:4]] == [copy.out_start * 1e6 for copy in simulation.copies[0]]
    share = f"{simulation.recomputation:.1%}"
    assert f"recomputation {share}" in simulation_view(simulation)
    assert "recomputation" not in simulation_view(simulate(spared(plan), costs))
    page = html_page(plan, costs)
    assert f"{simulation.recomputation:.2%}" in page
    assert f"{simulation.lost:.2%}" in page
