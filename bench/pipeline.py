"""Whole training steps of a transformer, schedule beside schedule, and whether they cost what the simulator says.

    pipex        pipex.Pipeline with pipex's order of the schedule
    torch-order  pipex.Pipeline with the order of torch.distributed.pipelining's schedule that stands beside it

Both run in pipex, so their ``ratio`` is what the order alone gains. torch has no ZB-H1, nor any zero-bubble schedule of
one chunk per rank: beside it stands torch's 1F1B. For most other names the two orders are the same actions in the same
places (``torch_schedules``), and the ratio says how much noise is left.

All schedules, and torch's orders, are pipelines of one launch that take turns step by step, so that whatever disturbs
the machine disturbs all alike; each has a model of its own, all with the same weights (``training``). Between the steps
of one, the others' hold memory but run nothing.

    speedup            1f1b's step, pipex's order, over this one
    predicted_speedup  the same of the simulated makespans: each plan with the action times and the median message of
                       its own steps in this run
    misprediction      |speedup / predicted_speedup - 1|
    bubble             makespan bubble of the steps' actions; bubble_simulated: of the simulated plan

Losses are compared with those of one process: bit by bit on the CPU, within ``training.TOLERANCE`` on a GPU. On the CPU
there must be a core for each rank, or bubbles cannot be seen; on one GPU, --virtual-devices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipex import observe
from pipex.bench import training
from pipex.bench.driver import Quantiles, Rounds
from pipex.bench.options import add_common
from pipex.bench.report import Row
from pipex.bench.torch_schedules import TORCH_NAMES, torch_plan
from pipex.bench.training import Case, Training
from pipex.errors import InputError
from pipex.plan import Plan
from pipex.runtime.launch import launch
from pipex.runtime.worlds import current_world

PROVIDER, PEER = "pipex", "torch-order"
BASELINE = "1f1b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``pipex bench pipeline``."""
    parser.description = (
        "Whole training steps of a transformer, schedule beside schedule, each with pipex's order and with "
        "torch.distributed.pipelining's, and what the simulator says of them."
    )
    training.add_arguments(parser)
    add_common(parser, samples=20, floor="how many times faster than with torch's order, such as zb-h1/128x64=1.05")
    parser.add_argument("--min-speedup", metavar="CASE=RATIO,...",
                        help="how many times faster than 1f1b a step must be, such as zb-h1/128x64=1.1")  # fmt: skip
    parser.add_argument("--max-misprediction", metavar="CASE=SHARE,...",
                        help="most that the speedup may differ from the simulated one, as a share of that, such as "
                        "zb-h1/128x64=0.1")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code."""
    return training.run(options, cases, measure, PROVIDER)


def cases(schedules: str, ranks: int, microbatches: int, device: str) -> list[Case]:
    """As ``training.cases``.

    Raises:
        PlanError: an unknown schedule, or sizes that do not fit it.
        InputError: the baseline is not among them, torch has no schedule to stand beside one, or the sizes do not fit
            that.
    """
    found = training.cases(schedules, ranks, microbatches, device)
    if BASELINE not in (case.schedule for case in found):
        raise InputError("the schedules are compared with one that is not measured", got=schedules,
                         needed=f"{BASELINE} among them")  # fmt: skip
    for case in found:
        torch_plan(case.schedule, ranks, microbatches)
    return found


def measure(cases: Sequence[Case], rounds: Rounds) -> list[Row]:
    """Two rows per case; the cases differ in their schedules alone."""
    return _rows(cases, launch(_rank, cases[0].ranks, args=(list(cases), rounds), device=cases[0].device))


def _plans(cases: Sequence[Case]) -> dict[str, Plan]:
    """All that are run, by name: pipex's orders, and each of torch's once."""
    ours = {case.schedule: case.plan() for case in cases}
    theirs = {_peer_of(case): torch_plan(case.schedule, case.ranks, case.microbatches) for case in cases}
    return ours | theirs


def _peer_of(case: Case) -> str:
    return f"torch {TORCH_NAMES[case.schedule]}"


def _rank(cases: Sequence[Case], rounds: Rounds) -> dict[str, Any]:
    """On each rank, by name of the plan: times, losses, events; and on rank 0 what the losses must be."""
    world = current_world()
    trainings = {name: Training(cases[0], plan, world, rounds.samples) for name, plan in _plans(cases).items()}
    steps: dict[str, Callable[[], float]] = {
        name: partial(training.timed, world, one.step) for name, one in trainings.items()
    }
    times = rounds.interleave(steps)
    for one in trainings.values():
        one.close()
    count = rounds.warmups + rounds.samples
    return {
        "times": times,
        "losses": {name: one.losses for name, one in trainings.items()},
        "events": {name: one.events for name, one in trainings.items()},
        "wanted": training.losses_of_one_process(cases[0], count, world.device) if world.rank == 0 else None,
    }


@dataclass(frozen=True)
class _Measured:
    """One plan's steps. Bubbles are those of the makespan; ``predicted`` is the simulated makespan in seconds."""

    time: Quantiles
    correct: bool
    bubble: float
    bubble_simulated: float
    predicted: float


def _rows(cases: Sequence[Case], answers: Sequence[dict[str, Any]]) -> list[Row]:
    """``answers[r]`` is what ``_rank`` returned on rank r."""
    tolerance = training.TOLERANCE[cases[0].device]
    found = {name: _measured(name, plan, answers, tolerance) for name, plan in _plans(cases).items()}
    base = found[BASELINE]
    rows = []
    for case in cases:
        peer = found[_peer_of(case)]
        for provider, one in ((PROVIDER, found[case.schedule]), (PEER, peer)):
            speedup, predicted = base.time.p50 / one.time.p50, base.predicted / one.predicted
            figures = {
                "speedup": speedup,
                "predicted_speedup": predicted,
                "misprediction": abs(speedup / predicted - 1),
                "bubble": one.bubble,
                "bubble_simulated": one.bubble_simulated,
                "tokens_per_s": case.tokens_per_s(one.time),
            }
            ratio = peer.time.p50 / one.time.p50
            rows.append(Row(case.name, provider, case.size, one.time, ratio, one.correct, figures))
    return rows


def _measured(name: str, plan: Plan, answers: Sequence[dict[str, Any]], tolerance: float) -> _Measured:
    events = [training.events_of(answer["events"][name]) for answer in answers]
    figures = observe.measure(events, plan.placement)
    simulation = training.simulated(plan, events, figures)
    return _Measured(
        time=training.slowest([answer["times"][name] for answer in answers]),
        correct=all(training.agree(answer["losses"][name], answers[0]["wanted"], tolerance) for answer in answers),
        bubble=figures.bubble_makespan,
        bubble_simulated=simulation.bubble_makespan,
        predicted=simulation.makespan,
    )
