"""What a search is given, checked before it begins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import get_args

from pipex.errors import InputError
from pipex.plan.bounds import Spare
from pipex.plan.costs import CostModel
from pipex.plan.families import options_of


def check_arguments(
    objective: str,
    ranks: int,
    microbatches: int,
    chunks: int,
    families: Sequence[str] | None,
    spare: Collection[str] | None,
    evaluations: int | None,
    seconds: float | None,
) -> None:
    """Raises InputError for what is out of range, and PlanError for an unknown family."""
    if objective not in ("makespan", "span"):
        raise InputError("unknown objective", got=repr(objective), needed="makespan or span")
    for name, value in (("ranks", ranks), ("micro-batches", microbatches), ("chunks", chunks)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"bad number of {name}", got=repr(value), needed="a whole number, at least 1")
    if families is not None and (isinstance(families, str) or not families):
        raise InputError("bad families", got=repr(families), needed="a list of names, or None for all")
    if evaluations is not None and evaluations < 1:
        raise InputError("too few evaluations", got=evaluations, needed="at least 1")
    if seconds is not None and not seconds >= 0:  # so that nan is refused too
        raise InputError("bad number of seconds", got=seconds, needed="at least 0")
    for name in families or ():
        options_of(name)
    if isinstance(spare, str):
        raise InputError("bad ways to spare memory", got=repr(spare), needed="a list of names, or None for both")
    if unknown := set(spare or ()) - set(get_args(Spare)):
        raise InputError("unknown way to spare memory", got=repr(min(unknown)), needed="recompute or offload")


def ways_to_spare(
    costs: CostModel, limit: Sequence[float] | None, spare: Collection[Spare] | None
) -> Collection[Spare]:
    """What may be done with stages to keep the limit: what was asked for, else all that the costs know the price of.

    Raises:
        InputError: the costs do not say what copies take, and they were asked for.
    """
    priced: tuple[Spare, ...] = ("recompute",) if getattr(costs, "offload", None) is None else ("offload", "recompute")
    if missing := set(spare or ()) - set(priced):
        raise InputError(f"the costs do not say what it takes to {min(missing)}", needed="offload, the time of a copy")
    return () if limit is None else priced if spare is None else spare
