"""An edge whose two stages live on one rank: messages are handed over as they are, nothing is copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from pipex.transport.header import Header, mismatch
from pipex.transport.interface import EdgeSpec, Form, TensorForm, check_number, form_of


class LocalEdge:
    """Sender and receiver of one edge. The runtime detaches the tensors before it sends them."""

    def __init__(self, spec: EdgeSpec, digest: bytes) -> None:
        self._spec, self._digest = spec, digest
        self._received = 0
        self._messages: deque[tuple[int, int, tuple[Tensor, ...]]] = deque()

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        check_number(self._spec, tensors)
        self._messages.append((step, microbatch, tuple(tensors)))

    def receive(self, step: int, microbatch: int, form: Form) -> tuple[Tensor, ...]:
        assert self._messages, f"{self._spec}: a receive before its send; a valid plan cannot ask for it"
        sent_step, sent_microbatch, tensors = self._messages[0]
        found = form_of(tensors)
        if (sent_step, sent_microbatch) != (step, microbatch) or found != form:
            for index, (got, needed) in enumerate(zip(found, form, strict=True)):
                sent = self._header(index, sent_step, sent_microbatch, got)
                announced = self._header(index, step, microbatch, needed)
                if sent != announced:
                    raise mismatch(self._spec, str(sent), str(announced))
        self._messages.popleft()
        self._received += 1
        return tensors

    def _header(self, index: int, step: int, microbatch: int, form: TensorForm) -> Header:
        spec = self._spec
        return Header(
            self._digest, spec.source, spec.destination, spec.kind, index, microbatch, step, self._received, form
        )
