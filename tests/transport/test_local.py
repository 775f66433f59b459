"""An edge whose two stages live on one rank."""

from __future__ import annotations

import pytest
import torch

from pipex.errors import MessageMismatch
from pipex.transport.interface import EdgeSpec
from pipex.transport.local import LocalEdge

SPEC = EdgeSpec(0, 1, "activation", 0, 0, slots=2, alive=2)
DIGEST = bytes(range(16))


def message() -> tuple[torch.Tensor, ...]:
    return torch.ones(2, 3, requires_grad=True) * 2, torch.ones(4, dtype=torch.int64)


def test_hands_over_in_order_without_the_graph_and_copies_only_what_has_none() -> None:
    edge = LocalEdge(SPEC, DIGEST)
    first, second = message(), message()
    edge.send(1, 0, first)
    edge.send(1, 1, second)
    for microbatch, sent in enumerate((first, second)):
        received = edge.receive(1, microbatch)
        assert all(map(torch.equal, received, sent))
        assert [r.data_ptr() == s.data_ptr() for r, s in zip(received, sent, strict=True)] == [True, False]
        assert [t.requires_grad for t in received] == [True, False]
        assert all(t.is_leaf for t in received)


def test_a_change_in_place_is_seen_by_the_graph_that_saved_it() -> None:
    """As in one process, where both stages have the same tensor."""
    edge = LocalEdge(SPEC, DIGEST)
    output = torch.sigmoid(torch.ones(3, requires_grad=True))
    edge.send(1, 0, [output])
    with torch.no_grad():
        edge.receive(1, 0)[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(("step", "microbatch", "named"), [(2, 0, "step 1"), (1, 3, "micro-batch 0")])
def test_names_another_message_than_comes_next_and_keeps_it(step: int, microbatch: int, named: str) -> None:
    edge = LocalEdge(SPEC, DIGEST)
    sent = message()
    edge.send(1, 0, sent)
    with pytest.raises(MessageMismatch, match=named):
        edge.receive(step, microbatch)
    assert edge.receive(1, 0)[0].data_ptr() == sent[0].data_ptr()


def test_says_what_an_edge_between_ranks_says() -> None:
    edge = LocalEdge(SPEC, DIGEST)
    edge.send(1, 0, message())
    edge.receive(1, 0)
    edge.send(2, 0, message())
    with pytest.raises(MessageMismatch) as mismatch:
        edge.receive(2, 1)
    assert str(mismatch.value) == (
        "stage 1 (rank 0) received from stage 0 (rank 0) another message than comes next; got micro-batch 0 of step 2, "
        "activation 0→1, message 1, plan 00010203 (2 tensors, 96 bytes); needed micro-batch 1 of step 2, activation "
        "0→1, message 1, plan 00010203 (2 tensors, 96 bytes); all ranks must run one plan, step by step"
    )
