"""The published schedules, by name. A family is a pure function from sizes to a plan, one per file."""

from __future__ import annotations

from collections.abc import Callable

from pipex.errors import PlanError
from pipex.plan.families.gpipe import gpipe
from pipex.plan.families.naive import naive
from pipex.plan.families.one_f_one_b import one_f_one_b
from pipex.plan.families.zb_h1 import zb_h1
from pipex.plan.plan import Plan

FAMILIES: dict[str, Callable[[int, int], Plan]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zb_h1,
}
"""name -> function of (ranks, micro-batches)"""


def build(name: str, ranks: int, microbatches: int) -> Plan:
    """The plan of the named family for ``ranks`` ranks and ``microbatches`` micro-batches per step.

    Raises:
        PlanError: the name is unknown (lists the known), or a number is below 1.
    """
    if name not in FAMILIES:
        raise PlanError("unknown schedule", got=repr(name), needed=f"one of {', '.join(FAMILIES)}")
    if ranks < 1:
        raise PlanError(f"too few ranks for {name}", got=ranks, needed="at least 1")
    if microbatches < 1:
        raise PlanError(f"too few micro-batches for {name}", got=microbatches, needed="at least 1")
    return FAMILIES[name](ranks, microbatches)
