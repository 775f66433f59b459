"""The published schedules, by name. A family is a pure function from sizes to a plan, one per file.

A family takes the ranks and the micro-batches, and by name what else decides its orders: ``chunks`` where several are
legal, ``costs`` where it plans with real times, and its own knobs. Its module's docstring has the facts: a picture,
then Time, Memory, Constraints and Source.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from pipex.errors import PlanError
from pipex.plan.families.chimera import chimera
from pipex.plan.families.dualpipe import dualpipe
from pipex.plan.families.dualpipev import dualpipev
from pipex.plan.families.forward_only import forward_only
from pipex.plan.families.gpipe import gpipe
from pipex.plan.families.hanayo import hanayo
from pipex.plan.families.interleaved import interleaved
from pipex.plan.families.interleaved_zb import interleaved_zb
from pipex.plan.families.looped_bfs import looped_bfs
from pipex.plan.families.naive import naive
from pipex.plan.families.one_f_one_b import one_f_one_b
from pipex.plan.families.pipedream import pipedream
from pipex.plan.families.pipedream_2bw import pipedream_2bw
from pipex.plan.families.v_half import v_half
from pipex.plan.families.v_min import v_min
from pipex.plan.families.zb_auto import zb_auto
from pipex.plan.families.zb_h1 import zb_h1
from pipex.plan.families.zb_h2 import zb_h2
from pipex.plan.families.zbv import zbv
from pipex.plan.plan import Plan, check_size

FAMILIES: dict[str, Callable[..., Plan]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "looped-bfs": looped_bfs,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-auto": zb_auto,
    "interleaved-zb": interleaved_zb,
    "zbv": zbv,
    "v-half": v_half,
    "v-min": v_min,
    "dualpipev": dualpipev,
    "dualpipe": dualpipe,
    "chimera": chimera,
    "hanayo": hanayo,
    "pipedream": pipedream,
    "pipedream-2bw": pipedream_2bw,
    "forward-only": forward_only,
}
"""name -> function of (ranks, micro-batches, and by name what ``options_of`` lists)"""


def options_of(name: str) -> tuple[str, ...]:
    """The names of what the family takes besides ranks and micro-batches.

    Raises:
        PlanError: the name is unknown (lists the known).
    """
    if name not in FAMILIES:
        raise PlanError("unknown schedule", got=repr(name), needed=f"one of {', '.join(FAMILIES)}")
    return tuple(inspect.signature(FAMILIES[name]).parameters)[2:]


def build(name: str, ranks: int, microbatches: int, **options: object) -> Plan:
    """The plan of the named family for ``ranks`` ranks and ``microbatches`` micro-batches per step.

    ``options`` are the family's own (``options_of``); None stands for the default. ``chunks`` may be given to every
    family, and is refused where the family has another number of them.

    Raises:
        PlanError: the name or an option is unknown (lists the known), a number is below 1, or the sizes do not fit the
            family (names the rule and the nearest legal values).
    """
    known = options_of(name)
    for what, size in (("ranks", ranks), ("micro-batches", microbatches)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise PlanError(f"bad number of {what}", got=repr(size), needed="a whole number")
    if ranks < 1:
        raise PlanError(f"too few ranks for {name}", got=ranks, needed="at least 1")
    if microbatches < 1:
        raise PlanError(f"too few micro-batches for {name}", got=microbatches, needed="at least 1")
    given = options.get("chunks")
    check_size(ranks, given if isinstance(given, int) else 1, microbatches)
    options = {option: value for option, value in options.items() if value is not None}
    chunks = None if "chunks" in known else options.pop("chunks", None)
    if unknown := [option for option in options if option not in known]:
        raise PlanError(f"{name} has no option {unknown[0]}", needed=f"one of {', '.join(known)}" if known else "none")
    parameters = inspect.signature(FAMILIES[name]).parameters
    for option, value in options.items():
        if str(parameters[option].annotation).startswith("int") and not isinstance(value, int):
            raise PlanError(f"bad option {option}", got=repr(value), needed="a whole number")
    plan = FAMILIES[name](ranks, microbatches, **options)
    if chunks not in (None, plan.placement.chunks):
        raise PlanError(f"wrong number of chunks per rank for {name}", got=chunks, needed=plan.placement.chunks)
    return plan
