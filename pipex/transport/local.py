"""An edge whose two stages live on one rank: messages are handed over as they are, nothing is copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from pipex.transport.header import Header, describe, mismatch, pack_table
from pipex.transport.interface import Buffers, EdgeSpec, form_of


class LocalEdge:
    """Sender and receiver of one edge."""

    buffers = Buffers(0, 0)

    def __init__(self, spec: EdgeSpec, digest: bytes) -> None:
        self._spec, self._digest = spec, digest
        self._received = 0
        self._messages: deque[tuple[int, int, tuple[Tensor, ...]]] = deque()

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        message = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
        self._messages.append((step, microbatch, message))

    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]:
        assert self._messages, f"{self._spec}: a receive before its send; a valid plan cannot ask for it"
        sent_step, sent_microbatch, tensors = self._messages[0]
        if (sent_step, sent_microbatch) != (step, microbatch):
            got, needed = self._words(sent_step, sent_microbatch, tensors), self._words(step, microbatch, tensors)
            raise mismatch(self._spec, got, needed)
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
