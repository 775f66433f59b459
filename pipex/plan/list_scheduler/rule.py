"""The rule by which the list scheduler decides what is urgent: every action gets a due date on straight lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipex.errors import InputError
from pipex.plan.list_scheduler.problem import Problem
from pipex.plan.placement import PlacementName

_LARGEST = 2**61
"""Two parts of a due date are added up in the native twin's 64 bits."""


class Rule(NamedTuple):
    """The knobs, as whole numbers per mille. T is the problem's interval, P the ranks, V the chunks of a pipe, r a rank
    (of two pipes: the one with the same stage in the first), and of a pipe that not all micro-batches pass, T is longer
    in pace and group, as rarely as they do.

    Attributes:
        forward_slope: due dates of F advance from stage to stage by so much of F's time, and the hop.
        input_slope: the same for I, from the last stage back.
        pace: due dates of F advance from micro-batch to micro-batch by so much of T; within a group of T/V.
        group: micro-batches per group, of P and rounded; groups follow each other at T each micro-batch. 0: no groups.
        input_lead: I is due earlier by so much of P·T.
        weight_delay: W is due later than the end of its I by so much of P·T,
        weight_skew: and by so much more on the last rank, in proportion on the others.
        look: a rank waits for a more urgent action that is ready within so much of T/V.
        overrun: while it waits it may run a W that ends too late by so much of the W's time.
        earliness: F of stage 0 does not start earlier before its due date than so much of T.
        share: of the memory in which chunks hold activations in proportion to how long, at best, they have to, deeper
            chunks, or that of the other pipe, have so much kept free for them; at least room for one activation each,
            which makes it safe.
    """

    forward_slope: int
    input_slope: int
    pace: int
    group: int
    input_lead: int
    weight_delay: int
    weight_skew: int
    look: int
    overrun: int
    earliness: int
    share: int


@dataclass(frozen=True)
class DueDates:
    """What a rule says about a problem.

    Attributes:
        start: per micro-batch, in thousandths of the problem's unit of time.
        offset: per kind and stage; an action is due at ``start + offset``.
        release: per micro-batch the time before which F of stage 0 does not start.
        cap: per stage what the chunks of its rank up to this one may hold together; of two pipes, what it may alone.
        look: how long a rank waits for a more urgent action.
        overrun: thousandths of a W's time by which it may end too late.
    """

    start: Sequence[int]
    offset: tuple[Sequence[int], Sequence[int], Sequence[int]]
    release: Sequence[int]
    cap: Sequence[int]
    look: int
    overrun: int


def due_dates(problem: Problem, rule: Rule) -> DueDates:
    """The due dates, in whole numbers, so that the native twin has nothing left to round.

    Raises:
        InputError: the knobs are so large that 64 bits do not hold the due dates.
    """
    placement = problem.placement
    ranks, chunks = placement.ranks, placement.chunks // len(placement.pipes)
    start = _starts(problem, rule, chunks)
    forward, input_gradient, weight_gradient = ([0] * placement.stages for _ in problem.durations)
    to_next, back = (*problem.activation_hop, 0), (0, *problem.gradient_hop)
    for pipe in placement.pipes:
        date = 0
        for stage in pipe:
            forward[stage] = date
            date += rule.forward_slope * problem.forward[stage] + 1000 * to_next[stage]
        date -= rule.input_lead * ranks * problem.interval
        for stage in reversed(pipe):
            input_gradient[stage] = date
            date += rule.input_slope * problem.input_gradient[stage] + 1000 * back[stage]
    for stage, time in enumerate(problem.input_gradient):
        delay = rule.weight_delay + rule.weight_skew * problem.rank_of[placement.piece(stage)] // max(1, ranks - 1)
        weight_gradient[stage] = input_gradient[stage] + 1000 * time + delay * ranks * problem.interval
    offset = forward, input_gradient, weight_gradient
    if max(map(abs, (*start, *forward, *input_gradient, *weight_gradient))) >= _LARGEST:
        raise InputError(
            "the due dates are too large", needed=f"less than {_LARGEST}", fix="take a larger unit of time"
        )
    return DueDates(
        start=start,
        offset=offset,
        release=[max(0, date // 1000 - rule.earliness * problem.interval // 1000) for date in start],
        cap=_caps(problem, rule.share),
        look=rule.look * problem.interval // (1000 * chunks),
        overrun=rule.overrun,
    )


def _starts(problem: Problem, rule: Rule, chunks: int) -> list[int]:
    starts: list[int] = []
    for pipe in problem.placement.pipes:
        passing = range(len(problem.microbatches_at[pipe[0]]))
        interval = problem.interval * problem.microbatches // max(1, len(passing))
        if not rule.group:
            starts += [m * interval * rule.pace for m in passing]
            continue
        group = max(1, (rule.group * problem.placement.ranks + 500) // 1000)
        pace = interval * rule.pace // chunks
        starts += [m // group * group * interval * 1000 + m % group * pace for m in passing]
    return starts


def _caps(problem: Problem, share: int) -> list[int]:
    """Per stage the cap for its rank's chunks up to it: the limit without what is kept for deeper chunks.

    From one chunk to the next the cap grows by at least one activation. So when a chunk is at its cap, one of its own
    activations is there to go on: the deepest chunk that waits for memory always gets it. With two pipes each keeps
    the limit without what is kept for the other, which is just as safe. What an I takes beside what was kept since its
    F is left free of all forwards.
    """
    lifetimes = problem.lifetimes
    caps = [0] * problem.placement.stages
    for rank, most in enumerate(problem.limit):
        stages = problem.stages_of[rank]
        limit = most - max(problem.surge[stage] for stage in stages)
        total = sum(lifetimes[stage] for stage in stages) or 1
        if len(problem.placement.pipes) > 1:
            for stage, other in zip(stages, reversed(stages), strict=True):
                kept = max(problem.charge[other], limit * share * lifetimes[other] // (1000 * total))
                caps[stage] = max(problem.charge[stage], limit - kept)
            continue
        least = sum(problem.charge[stage] for stage in stages)
        cap, deeper = limit, 0
        for stage in reversed(stages):
            caps[stage] = cap
            deeper += lifetimes[stage]
            least -= problem.charge[stage]
            proportional = limit - limit * share * deeper // (1000 * total)
            cap = max(least, min(cap - problem.charge[stage], proportional))
    return caps


# Found by random search over about 200 cells (4 to 32 ranks, 1 to 4 chunks, memory from half to 1.2 of that of 1f1b,
# five ratios of F, I, W and hop), and chosen together: each is the best one of its placement somewhere.
_LOOP = (
    Rule(1927, 2913, 2094, 1092, 32, 976, 2976, 188, 725, 100_000, 0),
    Rule(987, 3145, 724, 502, 453, 814, 2388, 124, 213, 2569, 28),
    Rule(1721, 2982, 1202, 501, 45, 1505, 707, 230, 880, 100_000, 68),
    Rule(39, 5700, 3283, 146, 947, 2618, -955, 243, 139, 2400, 71),
    Rule(2008, 5243, 1616, 506, 25, 1957, -1346, 124, 679, 3022, 398),
    Rule(944, 1954, 513, 473, 37, 166, 586, 63, 595, 524, 412),
    Rule(2400, 3930, 1046, 142, 33, 1085, 2357, 89, 941, 100_000, 424),
    Rule(325, 3757, 2239, 144, -71, 46, 2517, 335, 111, 3276, 50),
    Rule(937, 5353, 960, 22, 305, 1925, 2864, 122, 890, 100_000, 104),
    Rule(2378, 4002, 542, 128, 244, 80, 940, 125, 262, 100_000, 738),
    Rule(950, 1018, 1293, 541, 11, 3681, 2887, 188, 0, 210, 0),
)
_V = (
    Rule(1052, 2445, 695, 0, -69, 776, -195, 250, 820, 100_000, 1066),
    Rule(693, 4073, 803, 415, -1909, 1755, 343, 69, 0, 1177, 1087),
    Rule(1002, 1030, 657, 0, -55, 1036, 44, 276, 331, 1512, 0),
    Rule(3223, 2341, 645, 0, -305, 443, 2212, 520, 295, 100_000, 1084),
    Rule(1572, 2180, 558, 0, -569, 1628, 314, 796, 535, 100_000, 1040),
    Rule(3223, 2261, 171, 181, -287, 1429, 570, 75, 0, 100_000, 395),
    Rule(2122, 3006, 858, 0, -59, 966, 203, 675, 535, 100_000, 1178),
    Rule(2099, 5437, 853, 516, -30, 3310, 209, 88, 124, 1660, 1147),
    Rule(1122, 2450, 2102, 363, -31, 5210, 1608, 161, 247, 1066, 1128),
)
PORTFOLIO: dict[PlacementName, tuple[Rule, ...]] = {"loop": _LOOP, "v": _V, "wave": _V, "bidirectional": _V}
"""Per placement the rules to begin with."""
