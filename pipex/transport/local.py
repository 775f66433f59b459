"""An edge whose two stages live on one rank: messages are handed over as they are, and nothing is copied
but what the stage may yet write to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from pipex.errors import UnsupportedModule
from pipex.torch_internals import version
from pipex.transport.header import Header, copied, describe, mismatch, pack_table
from pipex.transport.interface import Buffers, EdgeSpec, form_of


class LocalEdge:
    """Sender and receiver of one edge."""

    buffers = Buffers(0, 0)

    def __init__(self, spec: EdgeSpec, digest: bytes) -> None:
        self._spec, self._digest = spec, digest
        self._received = 0
        # With each the versions of the tensors that have a graph.
        self._messages: deque[tuple[int, int, tuple[Tensor, ...], list[int]]] = deque()

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        if self._spec.kind == "activation":
            message = tuple(t.detach().requires_grad_() if t.requires_grad else copied(t) for t in tensors)
        else:
            message = tuple(t.detach() for t in tensors)
        self._messages.append((step, microbatch, message, _versions(message)))

    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]:
        assert self._messages, f"{self._spec}: a receive before its send; a valid plan cannot ask for it"
        sent_step, sent_microbatch, tensors, versions = self._messages[0]
        if (sent_step, sent_microbatch) != (step, microbatch):
            got, needed = self._words(sent_step, sent_microbatch, tensors), self._words(step, microbatch, tensors)
            raise mismatch(self._spec, got, needed)
        if versions != _versions(tensors):
            raise UnsupportedModule(
                f"a tensor of the {self._spec} was changed in place after it was handed on",
                got="a stage that writes to an output of an earlier micro-batch",
                needed="outputs that stay as they are until the next stage has used them",
                fix="keep a clone in the stage",
            )
        self._messages.popleft()
        self._received += 1
        return tensors

    def _words(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> str:
        spec = self._spec
        _, nbytes = pack_table(form_of(tensors))
        return describe(Header(
            self._digest, spec.source, spec.destination, spec.kind, len(tensors), microbatch, step, self._received,
            nbytes,
        ).pack())  # fmt: skip


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [version(tensor) for tensor in tensors if tensor.requires_grad]
