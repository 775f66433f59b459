"""Which backwards are split, and which weight gradients are made together: orders that are checked by eye."""

from __future__ import annotations

import pytest
from torch.distributed.pipelining.schedules import _Action

from pipex.backward.deferral import Deferral, MicroBatch, deferral
from pipex.plan import build, communicate, unfused
from pipex.plan.actions import parse_action


def of_text(order: str) -> Deferral:
    actions = [parse_action(text) for text in order.split()]
    return deferral((a.kind.value, a.stage, a.microbatch) for a in actions)


ORDERS: list[tuple[str, set[MicroBatch], set[MicroBatch]]] = [
    # order, split, followed
    ("0F0 0I0 0W0", set(), set()),
    ("0F0 0B0", set(), set()),
    ("1F0 1I0 1SEND_B0 1W0", {(1, 0)}, set()),
    ("0I0 0I1 0W0 0W1", {(0, 0), (0, 1)}, {(0, 0)}),
    ("0I0 0F1 0W0 0I1 0W1 0W2", {(0, 0)}, set()),  # W1 is made with I1, so nothing follows it, and it follows nothing
    ("0I0 0W0 0I1 1SEND_B1 0W1 0F4 0I2 0I3 0W2 0W3", {(0, 1), (0, 2), (0, 3)}, {(0, 2)}),
    ("0I0 1I0 0W0 1W0", {(0, 0), (1, 0)}, set()),  # of two stages
    ("0I1 0W0", {(0, 1)}, set()),  # another micro-batch's W
    ("1I0 0W0 0I0 1W0 1W1 1W2", {(1, 0), (0, 0)}, set()),
    ("", set(), set()),
]


@pytest.mark.parametrize(("order", "split", "followed"), ORDERS)
def test_an_order(order: str, split: set[MicroBatch], followed: set[MicroBatch]) -> None:
    assert of_text(order) == (split, followed)


def test_torch_s_actions_are_named_alike() -> None:
    actions = [_Action.from_str(text) for text in ("1I0", "1SEND_B0", "1W0", "1UNSHARD", "1I1", "1W1")]
    found = deferral((a.computation_type.value, a.stage_index, a.microbatch_index) for a in actions if a is not None)
    assert found == ({(1, 0)}, set())


@pytest.mark.parametrize("family", ["zb-h1", "zb-h2", "zb-auto"])
def test_between_ranks_everything_is_split_but_on_the_first_stage(family: str) -> None:
    """The first stage sends no gradient, so its W follow at once; elsewhere the send stands between."""
    plan = unfused(build(family, 4, 8))
    for rank, order in enumerate(communicate(plan)):
        found = deferral((a.kind.value, a.stage, a.microbatch) for a in order)
        assert found.split == (set() if rank == 0 else {(rank, m) for m in range(8)})
