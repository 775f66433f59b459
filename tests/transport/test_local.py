"""An edge whose two stages live on one rank."""

from __future__ import annotations

import pytest
import torch

from pipex.errors import MessageMismatch
from pipex.transport.interface import EdgeSpec, TensorForm, form_of
from pipex.transport.local import LocalEdge

FORM = (TensorForm((2, 3), torch.float32), TensorForm((4,), torch.int64))
SPEC = EdgeSpec(0, 1, "activation", 0, 0, slots=2, alive=2, form=FORM)
DIGEST = bytes(range(16))


def message() -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(form.shape, dtype=form.dtype) for form in FORM)


def test_hands_over_the_same_tensors_in_order() -> None:
    edge = LocalEdge(SPEC, DIGEST)
    first, second = message(), message()
    edge.send(1, 0, first)
    edge.send(1, 1, second)
    for microbatch, sent in enumerate((first, second)):
        received = edge.receive(1, microbatch, FORM)
        assert all(a is b for a, b in zip(received, sent, strict=True))


@pytest.mark.parametrize(
    ("step", "microbatch", "form", "named"),
    [
        (2, 0, FORM, "step 1"),
        (1, 3, FORM, "micro-batch 0"),
        (1, 0, (TensorForm((3, 2), torch.float32), FORM[1]), r"float32\[2, 3\]"),
        (1, 0, (TensorForm((2, 3), torch.float64), FORM[1]), "float64"),
    ],
)
def test_names_a_message_other_than_announced_and_keeps_it(step: int, microbatch: int, form: tuple, named: str) -> None:
    edge = LocalEdge(SPEC, DIGEST)
    sent = message()
    edge.send(1, 0, sent)
    with pytest.raises(MessageMismatch, match=named):
        edge.receive(step, microbatch, form)
    assert edge.receive(1, 0, form_of(sent))[0] is sent[0]


def test_says_what_an_edge_between_ranks_says() -> None:
    edge = LocalEdge(SPEC, DIGEST)
    with pytest.raises(MessageMismatch) as of_number:
        edge.send(1, 0, message()[:1])
    assert str(of_number.value) == (
        "a message of the activation edge 0→1 (rank 0→0) has another number of tensors than announced; got 1; needed "
        "2; a stage must return as many for every micro-batch"
    )
    edge.send(1, 0, message())
    edge.receive(1, 0, FORM)
    edge.send(2, 0, (torch.ones(2, 3), torch.ones([1] * 9)))  # more dimensions than a header between ranks has
    with pytest.raises(MessageMismatch) as of_form:
        edge.receive(2, 0, FORM)
    assert str(of_form.value) == (
        "stage 1 (rank 0) received from stage 0 (rank 0) another tensor than announced; got float32[1, 1, 1, 1, 1, 1, "
        "1, 1, 1] (4 bytes) as tensor 1 of micro-batch 0, step 2, activation 0→1, message 1, plan 00010203; needed "
        "int64[4] (32 bytes) as tensor 1 of micro-batch 0, step 2, activation 0→1, message 1, plan 00010203; a stage "
        "must return the same shapes and dtypes for every micro-batch, and all ranks must run one plan"
    )
