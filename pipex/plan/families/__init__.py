"""The published schedules, by name. A family is a pure function from sizes to a plan, one per file.

A family takes the ranks and the micro-batches, and by name what else decides its orders: ``chunks`` where several are
legal, ``costs`` where it plans with real times, and its own knobs. Its module's docstring has the facts: a picture,
then Time, Memory, Constraints and Source.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from pipex.errors import PlanError
from pipex.plan.families.gpipe import gpipe
from pipex.plan.families.naive import naive
from pipex.plan.families.one_f_one_b import one_f_one_b
from pipex.plan.families.zb_h1 import zb_h1
from pipex.plan.plan import Plan

FAMILIES: dict[str, Callable[..., Plan]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zb_h1,
}
"""name -> function of (ranks, micro-batches, and by name what ``options_of`` lists)"""


def options_of(name: str) -> tuple[str, ...]:
    """The names of what the family takes besides ranks and micro-batches."""
    return tuple(inspect.signature(FAMILIES[name]).parameters)[2:]


def build(name: str, ranks: int, microbatches: int, **options: object) -> Plan:
    """The plan of the named family for ``ranks`` ranks and ``microbatches`` micro-batches per step.

    ``options`` are the family's own (``options_of``). ``chunks`` may be given to every family, and is refused where the
    family has another number of them.

    Raises:
        PlanError: the name or an option is unknown (lists the known), a number is below 1, or the sizes do not fit the
            family (names the rule and the nearest legal values).
    """
    if name not in FAMILIES:
        raise PlanError("unknown schedule", got=repr(name), needed=f"one of {', '.join(FAMILIES)}")
    if ranks < 1:
        raise PlanError(f"too few ranks for {name}", got=ranks, needed="at least 1")
    if microbatches < 1:
        raise PlanError(f"too few micro-batches for {name}", got=microbatches, needed="at least 1")
    known = options_of(name)
    chunks = None if "chunks" in known else options.pop("chunks", None)
    if unknown := [option for option in options if option not in known]:
        raise PlanError(f"{name} has no option {unknown[0]}", needed=f"one of {', '.join(known)}" if known else "none")
    plan = FAMILIES[name](ranks, microbatches, **options)
    if chunks not in (None, plan.placement.chunks):
        raise PlanError(f"wrong number of chunks per rank for {name}", got=chunks, needed=plan.placement.chunks)
    return plan
