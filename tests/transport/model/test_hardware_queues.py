"""No plan blocks for ever on hardware queues that streams share, whoever is fast or slow.

The theorem: if every stream wait is enqueued after the operation that satisfies it, the first unfinished operation in
the order of enqueueing never waits for a later one, so it can go on, in any queue. Its premise is checked on every run.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
from cases import sampled
from queue_model import (
    ABORT,
    COMPUTE,
    RECEIVE,
    SEND,
    Device,
    EarlyReceives,
    Grows,
    Run,
    Scheduler,
    Stream,
    assigned,
    by_chance,
    by_creation,
    extremes,
    finish,
    one_device,
)  # fmt: skip

from pipex.errors import PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.communication import communicate, unfused
from pipex.plan.families import FAMILIES, build
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan

STREAMS = (COMPUTE, SEND, ABORT)
# Which of the three streams share a queue: all ways that there are. Queues taken in turn, 1, 2 or more of them, are
# three of these.
SHARED = {"all": (0, 0, 0), "compute and send": (0, 0, 1), "compute and abort": (0, 1, 0), "send and abort": (0, 1, 1),
          "none": (0, 1, 2)}  # fmt: skip


def legal(family: str, ranks: int, microbatches: int) -> Plan | None:
    try:
        return unfused(build(family, ranks, microbatches))
    except PlanError:
        return None


def plans(family: str, ranks: Sequence[int], microbatches: Sequence[int]) -> list[Plan]:
    found = [plan for p in ranks for m in microbatches if (plan := legal(family, p, m))]
    assert found, f"{family} has no plan of these sizes"
    return found


def check(
    plan: Plan, queues: Mapping[Stream, int], schedulers: Mapping[str, Scheduler], *, keeps: int = 0,
    grows: Grows = lambda edge, message: False,
) -> None:  # fmt: skip
    orders = communicate(plan)
    for name, scheduler in schedulers.items():
        run = Run(plan, Device(queues), orders, keeps=keeps, grows=grows)
        finish(run, scheduler)
        assert run.stuck() == [], f"{plan.family}, {name}"
        assert run.device.early == [], f"{plan.family}, {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_plan_blocks_on_one_queue_per_process_or_device(family: str) -> None:
    schedulers = extremes() | {"chance": by_chance(0)}
    for plan in plans(family, (2, 4), (4, 8)):
        ranks = plan.placement.ranks
        if plan.microbatches == 2 * ranks:
            for queues in (
                by_creation(ranks, STREAMS, 1),
                one_device(ranks, STREAMS, 1),
                one_device(ranks, STREAMS, 2),
            ):
                check(plan, queues, schedulers)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_kept_for_longer_than_planned_block_nobody(family: str) -> None:
    """What arrives beyond the lent ones is copied out."""
    for plan in plans(family, (2,), (4,)):
        check(plan, one_device(2, STREAMS, 1), extremes(), keeps=1)


GROWTH: dict[str, Grows] = {
    "the first message": lambda edge, message: message == 0,
    "every other message": lambda edge, message: message % 2 == 0,
    "every message": lambda edge, message: True,
    "some messages": lambda edge, message: random.Random(f"{edge} {message}").random() < 0.3,
}


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_edges_that_grow_block_nobody(family: str, growth: str) -> None:
    schedulers = extremes() | {"chance": by_chance(0)}
    for plan in plans(family, (2, 4), (4,)):
        ranks = plan.placement.ranks
        for classes in SHARED.values():
            check(plan, assigned(ranks, STREAMS, classes), schedulers, grows=GROWTH[growth])
        for queues in (1, 2):
            check(plan, one_device(ranks, STREAMS, queues), schedulers, keeps=1, grows=GROWTH[growth])


SIZES = [*((ranks, tuple(range(1, 9))) for ranks in (2, 3, 4)), (8, (16,))]
ANY_NUMBER = [(f, p, many) for f in FAMILIES for p, many in SIZES if any(legal(f, p, m) for m in many)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "ranks", "microbatches"),
    sampled(ANY_NUMBER, 1, name="queues", stratum=lambda case: case[0]),
)
def test_no_plan_blocks_on_any_number_of_queues(family: str, ranks: int, microbatches: Sequence[int]) -> None:
    schedulers = extremes() | {f"chance {seed}": by_chance(seed) for seed in range(3)}
    for plan in plans(family, (ranks,), microbatches):
        ranks = plan.placement.ranks
        for classes in SHARED.values():
            check(plan, assigned(ranks, STREAMS, classes), schedulers)
        for queues in (1, 2, 3, 5, 8):
            check(plan, one_device(ranks, STREAMS, queues), schedulers)


@pytest.mark.parametrize("count", range(1, 9))
def test_queues_taken_in_turn_are_one_of_the_ways_to_share(count: int) -> None:
    taken = by_creation(1, STREAMS, count)
    assert tuple(taken[0, stream] for stream in STREAMS) in SHARED.values()


@pytest.mark.parametrize("placement", [Placement("loop", 3), Placement("loop", 2, 2), Placement("v", 3, 2)], ids=str)
def test_evaluation_does_not_block(placement: Placement) -> None:
    """Every rank takes a micro-batch through all its stages in turn, with slots for a plan of forwards."""
    orders = tuple(
        tuple(Action(stage, Kind.F, m) for m in range(4) for stage in placement.stages_of(rank))
        for rank in range(placement.ranks)
    )
    plan = Plan("evaluation", placement, 4, orders, peak_activations=(1,) * placement.ranks, update="never")
    check(plan, one_device(placement.ranks, STREAMS, 1), extremes())


def test_growth_for_which_both_hosts_meet_blocks_ranks_that_send_to_each_other() -> None:
    """So nobody waits for the other end: memory is offered, and taken whenever the sender comes to it."""
    for in_step in (False, True):
        blocked = []
        for scheduler in extremes().values():
            device = Device(one_device(2, STREAMS, 6))
            run = Run(exchange(), device, communicate(exchange()), grows=lambda *_: True, growth_in_step=in_step)
            finish(run, scheduler)
            blocked.append(bool(run.stuck()))
        assert blocked == [in_step] * len(blocked)


# What the premise is for.


def exchange() -> Plan:
    """Two ranks that send to each other before either looks at what came: one has the stages 0 and 3, the other 1
    and 2 of two pipes."""
    orders = ((Action(0, Kind.F, 0), Action(3, Kind.F, 0)), (Action(2, Kind.F, 0), Action(1, Kind.F, 0)))
    return Plan("exchange", Placement("bidirectional", 2, 2), 1, orders, peak_activations=(2, 2), update="never")


def blocks(plan: Plan, queues: int, *, ahead: int) -> list[bool]:
    """By scheduler, with receives posted early."""
    found = []
    for scheduler in extremes().values():
        device = Device(by_creation(plan.placement.ranks, (RECEIVE, COMPUTE, SEND), queues))
        run = EarlyReceives(plan, device, communicate(plan), ahead=ahead)
        finish(run, scheduler)
        assert ahead == 0 or device.early
        found.append(bool(run.stuck()))
    return found


@pytest.mark.parametrize("plan", [exchange(), build("1f1b", 2, 4), build("zb-h1", 3, 6), build("zbv", 2, 4)],
                         ids=lambda plan: plan.family)  # fmt: skip
def test_receives_posted_ahead_block_on_one_or_two_queues_and_not_on_three(plan: Plan) -> None:
    assert all(blocks(plan, 1, ahead=1))
    assert all(blocks(plan, 2, ahead=1))
    assert not any(blocks(plan, 3, ahead=1))
    assert not any(blocks(plan, 1, ahead=0))


def stuck(plan: Plan, queues: Mapping[Stream, int], room: int | None, *, early_announcement: bool = False) -> bool:
    """Whether some scheduler's run blocks; a queue takes ``room`` operations, and the host waits for room."""
    for scheduler in [*extremes().values(), *map(by_chance, range(5))]:
        run = Run(plan, Device(queues, room), communicate(plan), early_announcement=early_announcement)
        finish(run, scheduler)
        if run.stuck():
            return True
    return False


@pytest.mark.parametrize("family", ["1f1b", "zb-h1", "interleaved-zb", "zbv"])
@pytest.mark.parametrize("room", [1, 2, 8])
def test_full_queues_block_nobody(family: str, room: int) -> None:
    plan = build(family, 2, 4)
    assert not stuck(plan, by_creation(2, STREAMS, 1), room)
    assert not stuck(plan, one_device(2, STREAMS, 1), room)


@pytest.mark.parametrize("family", ["1f1b", "interleaved-zb"])
def test_a_slot_announced_before_its_copy_is_enqueued_blocks_where_processes_share_a_queue(family: str) -> None:
    """The consumer's wait gets in front of the copy. In queues of its own the producer still enqueues the copy, even
    if it waits for room: what it waits for was announced earlier."""
    plan = build(family, 2, 4)
    assert stuck(plan, one_device(2, STREAMS, 1), None, early_announcement=True)
    for room in (None, 1, 2):
        assert not stuck(plan, by_creation(2, STREAMS, 1), room, early_announcement=True)


# A rank that dies.


def survivors_stuck(shared: str, *, by_stream: bool, grows: Grows = lambda edge, message: False) -> int:
    """After how many of the places at which a rank may be killed something of the others never ends."""
    plan = build("zb-h1", 3, 3)
    stuck = 0
    for scheduler in extremes().values():
        moves = 0
        while True:
            run = Run(plan, Device(assigned(3, STREAMS, SHARED[shared])), communicate(plan), grows=grows)
            finish(run, scheduler, moves)
            if run.agreed():
                break
            run.kill(1, by_stream=by_stream)
            finish(run, scheduler)
            stuck += bool(run.stuck())
            assert run.errors == {0, 2} or run.stuck()
            moves += 7
    return stuck


@pytest.mark.parametrize("shared", ["none", "compute and send"])
def test_an_abort_stream_with_a_queue_of_its_own_frees_the_survivors(shared: str) -> None:
    assert survivors_stuck(shared, by_stream=True) == 0


@pytest.mark.parametrize("shared", ["all", "compute and abort", "send and abort"])
def test_an_abort_stream_that_shares_a_queue_may_wait_behind_what_it_should_free(shared: str) -> None:
    assert survivors_stuck(shared, by_stream=True) > 0


@pytest.mark.parametrize("shared", SHARED)
def test_an_abort_that_needs_no_queue_frees_the_survivors(shared: str) -> None:
    assert survivors_stuck(shared, by_stream=False) == 0


@pytest.mark.parametrize("growth", GROWTH)
def test_survivors_are_freed_while_edges_grow(growth: str) -> None:
    for shared in ("none", "compute and send"):
        assert survivors_stuck(shared, by_stream=True, grows=GROWTH[growth]) == 0
