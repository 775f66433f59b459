"""Which backwards a rank's order splits, and which of their weight gradients can be made together.

    I0 W0 I1 SEND_B1 W1 F4 W2 W3        W0: made with I0       W1: deferred       W2: deferred, and followed by W3

An I whose W is the rank's very next action is not split: nothing waits for the input gradient in between, and one pass
costs less than two halves. With a send between them it is, so that the gradient leaves before W begins.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

MicroBatch = tuple[int, int | None]
"""(stage, micro-batch)"""


class Deferral(NamedTuple):
    """What a rank's order says of its weight gradients.

    Attributes:
        split: whose W is deferred; every other I makes the weight gradients too, and its W has nothing left to do.
        followed: those of them whose W is directly followed by the next deferred W of the same stage.
    """

    split: frozenset[MicroBatch] = frozenset()
    followed: frozenset[MicroBatch] = frozenset()


def deferral(order: Iterable[tuple[str, int, int | None]]) -> Deferral:
    """From all actions of a rank in their order, sends and receives included, as (kind, stage, micro-batch); kinds are
    named as torch.distributed.pipelining does (``I``, ``W``, ``SEND_B``, ...)."""
    actions = list(order)
    whole = {i[1:] for i, w in pairwise(actions) if (i[0], w[0]) == ("I", "W") and i[1:] == w[1:]}
    split = frozenset((stage, m) for kind, stage, m in actions if kind == "I" and (stage, m) not in whole)
    deferred = [(stage, m) if kind == "W" and (stage, m) in split else None for kind, stage, m in actions]
    return Deferral(split, frozenset(w for w, after in pairwise(deferred) if w and after and w[0] == after[0]))
