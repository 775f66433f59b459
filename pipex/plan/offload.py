"""When an offloaded activation is away from its rank: after which action it has gone, and before which it comes back.

A copy out begins when F has ended, a copy back ends before I (or B) starts; a rank makes one copy at a time in each
direction, beside its actions. Whoever waits for a copy is idle, so each copy gets actions beside which it may run, as
many as the plan's promise leaves room for: until then the activation is held. The order and the promise alone decide
which actions these are, so that what a rank holds depends on no clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipex.plan.actions import Kind
from pipex.plan.plan import Plan


@dataclass(slots=True)
class Away:
    """One activation of an offloaded stage; the rest are positions in the order of its rank.

    Attributes:
        stage, microbatch: whose it is.
        forward, backward: where its F and its I or B stand.
        gone: the action that waits until it has been copied out.
        back: the action before which there is room for it again: the copy back starts when the one before that has
            ended, and what had to be gone is gone.
    """

    stage: int
    microbatch: int
    forward: int
    backward: int
    gone: int
    back: int


def away(plan: Plan, rank: int) -> list[Away]:
    """Those of a rank, in the order of their F. Without room for more, a copy has nothing to run beside it: the next
    action waits for the copy out, and the copy back waits for the action before its I."""
    offloaded = set(plan.offloaded) & set(plan.placement.stages_of(rank))
    if not offloaded:
        return []
    order, promise = plan.orders[rank], plan.peak_activations[rank]
    found: dict[tuple[int, int], Away] = {}
    whole: dict[tuple[int, int], int] = {}  # since when the others are held whole
    held = [0] * (len(order) + 1)
    for position, action in enumerate(order):
        for stage, kind, microbatch, _ in action.each:
            key = stage, microbatch
            if kind is Kind.F:
                if stage in offloaded:
                    found[key] = Away(stage, microbatch, position, position, position + 1, position)
                    held[position] += 1
                elif stage not in plan.recomputed:
                    whole[key] = position
                continue
            if kind in (Kind.I, Kind.B):
                if key in found:
                    found[key].backward = found[key].back = position
                if key in found or stage in plan.recomputed:
                    whole[key] = position
            if kind in (Kind.W, Kind.B):
                for place in range(whole.get(key, position), position + 1):
                    held[place] += 1
    # One action more for each copy in turn, so that none takes all the room that there is.
    copies = [(a.forward, 0, a) for a in found.values()] + [(a.backward, 1, a) for a in found.values()]
    copies.sort(key=lambda copy: (copy[0], copy[1], copy[2].stage, copy[2].microbatch))
    for _ in range(3 * plan.placement.chunks):  # a micro-batch's actions: slower copies could not keep up anyway
        longer = []
        for copy in copies:
            _, inward, activation = copy
            place = activation.back - 1 if inward else activation.gone
            if activation.gone < activation.back and held[place] < promise:
                held[place] += 1
                if inward:
                    activation.back = place
                else:
                    activation.gone = place + 1
                longer.append(copy)
        copies = longer
    return list(found.values())


class TimedCopy(NamedTuple):
    """An activation on its way to host memory and back; times from the start of the step."""

    stage: int
    microbatch: int
    out_start: float
    out_end: float
    back_start: float
    back_end: float


class CopyStreams:
    """The two copy streams of one rank while its actions run. Nothing is copied that there is room for all the time.

    Attributes:
        done: what has been copied, in the order of the copies back: that in which they may start.
    """

    def __init__(self, activations: Sequence[Away], takes: Sequence[float] | None) -> None:
        """``takes``: time per stage of a copy, the same both ways; None: none."""
        self._takes = takes
        self._at: dict[int, list[Away]] = defaultdict(list)
        for activation in sorted(activations, key=lambda a: (a.back, a.backward)):
            if activation.gone < activation.back:
                places = activation.forward, activation.gone, activation.back, activation.backward
                for position in dict.fromkeys(places):
                    self._at[position].append(activation)
        self._out: dict[tuple[int, int], tuple[float, float]] = {}
        self._ready: dict[tuple[int, int], float] = {}
        self._out_free = self._back_free = 0.0
        self.done: list[TimedCopy] = []

    def before(self, position: int, time: float) -> float:
        """When the action there can start as far as copies matter, on a rank that is free at ``time``."""
        here = self._at.get(position, ())
        for activation in here:
            if activation.gone == position:
                time = max(time, self._out[activation.stage, activation.microbatch][1])
        start = time
        for activation in here:
            stage, microbatch = key = activation.stage, activation.microbatch
            if activation.back == position:
                begin = max(time, self._back_free)
                self._back_free = self._ready[key] = begin + self._hop(stage)
                self.done.append(TimedCopy(stage, microbatch, *self._out[key], begin, self._back_free))
            if activation.backward == position:
                start = max(start, self._ready[key])
        return start

    def after(self, position: int, time: float) -> None:
        """The action there has ended: what an F has made leaves."""
        for activation in self._at.get(position, ()):
            if activation.forward == position:
                begin = max(time, self._out_free)
                self._out_free = begin + self._hop(activation.stage)
                self._out[activation.stage, activation.microbatch] = begin, self._out_free

    def _hop(self, stage: int) -> float:
        return 0.0 if self._takes is None else self._takes[stage]
