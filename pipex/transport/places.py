"""What the places mean that ranks publish: a step, and a position in the order of a plan or a phase.

A rank publishes its place before each action (``World.at``) as two numbers: that costs next to nothing, and can be
read when the rank is dead. Several pipelines may share a world, so each plan has positions of its own, behind those of
the plans that were opened before it:

    plan       opened first, 9 actions on its longest rank     opened next
    position   0 1 2 3 4 5 6 7 8                               9 10 11 12 …

All ranks open the same plans in the same order, so a position means the same to all of them.
"""

from __future__ import annotations

from pipex.errors import Ending, PeerError, peer_error
from pipex.transport.interface import Orders, Phase


class Places:
    """The positions of all plans that a world has opened."""

    def __init__(self) -> None:
        self._plans: dict[bytes, tuple[int, Orders]] = {}  # by digest: its first position, its orders
        self._end = 0

    def add(self, digest: bytes, orders: Orders) -> int:
        """The first position of a plan. One that is opened again, for larger messages or by another pipeline, keeps
        its positions: they mean the same. None are forgotten: a failure may be told of more than once."""
        if digest not in self._plans:
            self._plans[digest] = self._end, orders
            self._end += max(map(len, orders), default=0)
        return self._plans[digest][0]

    def error(self, ending: Ending, text: str, rank: int, step: int | None, position: int | None) -> PeerError:
        """What every rank raises when ``rank`` has ended the run at this place; None where that is not known."""
        action, stage, microbatch = (None, None, None) if position is None else self._name(rank, position)
        return peer_error(ending, text, rank=rank, step=step, stage=stage, action=action, microbatch=microbatch)

    def _name(self, rank: int, position: int) -> tuple[str | None, int | None, int | None]:
        if position < 0:
            return Phase(position).name.lower(), None, None
        for first, orders in self._plans.values():
            if rank < len(orders) and first <= position < first + len(orders[rank]):
                act = orders[rank][position - first]
                return str(act), act.stage, act.microbatch
        return None, None, None  # published without a plan
