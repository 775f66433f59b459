"""How much of a step is communication that computing does not hide, for each schedule, beside torch's step.

    pipex   pipex.Pipeline on a transformer: shared memory between CPU ranks, the GPUs' memory between GPU ranks
    torch   torch.distributed.pipelining, its own runtime and the schedule of ``torch_schedules``, over Gloo on the
            loopback interface; on a GPU by way of host memory (``torch_staging``)
    free    pipex's step if its messages took no time: the plan simulated with the action times of that run, and what
            the step had before and after its actions

pipex and torch take turns, step by step, in the same processes; ``training`` says what a step is and what its time. As
ranks that share a GPU are time-sliced without --virtual-devices, a message then ends when its receiver has its turn:
what is exposed can be told only with it, or with a GPU for each rank.

``exposed_share`` is the part of the makespan of a step's actions, from the first start to the last end over all ranks,
that the rank that waited longest spent on messages: the time in which it computed nothing because it handed one over,
or waited for one that its peer had handed over already. Waiting for a peer that is not done is the schedule's, not
communication's; ``waiting_share`` has both. On GPUs two ranks' clocks are compared by one point for each that its GPU
and its host have both seen: by how far they are off there, every message is. ``bubble`` is the makespan bubble. Losses
are compared with those of one process: pipex's bit by bit on the CPU, within ``training.TOLERANCE`` on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

from pipex import observe
from pipex.bench import torch_group, training
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.options import add_common
from pipex.bench.report import Row
from pipex.bench.step_providers import TorchStep
from pipex.bench.torch_schedules import torch_plan
from pipex.bench.torch_staging import over_host_memory
from pipex.bench.training import Case, Training
from pipex.observe import Event
from pipex.observe.measure import ACTION_KINDS, message_waits
from pipex.runtime.launch import launch
from pipex.runtime.worlds import current_world
from pipex.transport.interface import World

PROVIDER, PEER, FREE = "pipex", "torch", "free"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``pipex bench overlap``."""
    parser.description = (
        "How much of a step of a transformer is communication that computing does not hide, for each schedule, beside "
        "a step of torch.distributed.pipelining (Gloo)."
    )
    training.add_arguments(parser)
    add_common(parser, samples=20, floor="how many times faster than torch's a step must be, such as 1f1b/128x64=1")
    parser.add_argument("--max-exposed-share", metavar="CASE=SHARE,...",
                        help="most of a step, such as 1f1b/128x64=0.1")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code."""
    return training.run(options, cases, measure, PROVIDER)


def cases(schedules: str, ranks: int, microbatches: int, device: str) -> list[Case]:
    """As ``training.cases``.

    Raises:
        PlanError: an unknown schedule, or sizes that do not fit it.
        InputError: torch has no schedule to stand beside one, or the sizes do not fit that.
    """
    found = training.cases(schedules, ranks, microbatches, device)
    for case in found:
        torch_plan(case.schedule, ranks, microbatches)
    return found


def measure(cases: Sequence[Case], rounds: Rounds) -> list[Row]:
    """Three rows per case; the cases differ in their schedules alone."""
    answers = launch(_rank, cases[0].ranks, args=(list(cases), rounds), device=cases[0].device)
    wanted = answers[0]["wanted"]
    return [
        row
        for index, case in enumerate(cases)
        for row in _rows(case, [answer["cases"][index] for answer in answers], wanted)
    ]


def _rows(case: Case, answers: Sequence[dict[str, Any]], wanted: Sequence[float]) -> list[Row]:
    """``answers[r]`` is what ``_measure_case`` returned on rank r."""
    events = [training.events_of(answer["events"]) for answer in answers]
    placement = case.plan().placement
    figures = observe.measure(events, placement)
    spans, exposed, waiting = [], [], []
    for step in sorted({event.step for event in events[0]}):
        ranks = [[event for event in rank if event.step == step] for rank in events]
        compute = [[event for event in rank if event.kind in ACTION_KINDS] for rank in ranks]
        spans.append((max(e.end for rank in compute for e in rank) - min(rank[0].begin for rank in compute)) / 1e9)
        on_messages = [
            waits + _seconds(rank, "SEND") for rank, waits in zip(ranks, message_waits(ranks, placement), strict=True)
        ]
        exposed.append(max(on_messages) / spans[-1])
        waiting.append(max(_seconds(rank, "RECV") for rank in ranks) / spans[-1])
    ideal = training.simulated(case.plan(), events, figures, free=True)
    times = {name: training.slowest([answer["times"][name] for answer in answers]) for name in (PROVIDER, PEER)}
    around = times[PROVIDER].p50 - 1e6 * median(spans)
    times[FREE] = quantiles([around + 1e6 * ideal.makespan])
    nothing: dict[str, float | None] = dict.fromkeys(("exposed_share", "waiting_share", "bubble"))
    shares = {
        PROVIDER: nothing | {"exposed_share": median(exposed), "waiting_share": median(waiting),
                             "bubble": figures.bubble_makespan},
        PEER: nothing,
        FREE: nothing | {"bubble": ideal.bubble_makespan},
    }  # fmt: skip
    correct = {FREE: True}
    for name, tolerance in ((PROVIDER, training.TOLERANCE), (PEER, training.TORCH_TOLERANCE)):
        known = [answer["losses"][name] for answer in answers if answer["losses"][name]]
        correct[name] = bool(known) and all(training.agree(losses, wanted, tolerance[case.device]) for losses in known)
    return [
        Row(case.name, name, case.size, times[name], times[PEER].p50 / times[name].p50, correct[name],
            {**shares[name], "tokens_per_s": case.tokens_per_s(times[name])})
        for name in (PROVIDER, PEER, FREE)
    ]  # fmt: skip


def _seconds(events: Sequence[Event], kind: str) -> float:
    return sum(event.end - event.begin for event in events if event.kind.startswith(kind)) / 1e9


def _rank(cases: Sequence[Case], rounds: Rounds) -> dict[str, Any]:
    """On each rank: what was measured by case, and on rank 0 what the losses must be."""
    world = current_world()
    with torch_group.joined(world), over_host_memory():
        found = [_measure_case(case, rounds, world) for case in cases]
    count = rounds.warmups + rounds.samples
    wanted = training.losses_of_one_process(cases[0], count, world.device) if world.rank == 0 else None
    return {"cases": found, "wanted": wanted}


def _measure_case(case: Case, rounds: Rounds, world: World) -> dict[str, Any]:
    """Times and losses by provider, and pipex's events; no losses of torch on ranks without the last stage."""
    ours, theirs = Training(case, case.plan(), world, rounds.samples), _Torch(case, world)
    times = rounds.interleave(
        {
            PROVIDER: lambda: training.timed(world, ours.step),
            PEER: lambda: training.timed(world, theirs.step),
        }
    )
    ours.close()
    return {"times": times, "losses": {PROVIDER: ours.losses, PEER: theirs.losses}, "events": ours.events}


class _Torch:
    """The same training by torch.

    Attributes:
        losses: of all steps, on the rank of the last stage.
    """

    def __init__(self, case: Case, world: World) -> None:
        plan = case.plan()
        stages = case.stages(plan.placement.stages)
        self._step = TorchStep(stages, case.schedule, plan, world.rank, *case.batch(world.device), training.loss_of)
        self._optimizer = case.optimizer(self._step.parameters)
        self.losses: list[float] = []

    def step(self) -> None:
        self._step.run()
        self._optimizer.step()
        if self._step.loss is not None:
            self.losses.append(self._step.loss)
