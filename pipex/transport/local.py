"""An edge whose two stages live on one rank: messages are handed over as they are, nothing is copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from pipex.errors import MessageMismatch
from pipex.transport.interface import EdgeSpec, Form, form_of


class LocalEdge:
    """Sender and receiver of one edge. The runtime detaches the tensors before it sends them."""

    def __init__(self, spec: EdgeSpec) -> None:
        self._spec = spec
        self._messages: deque[tuple[int, int, tuple[Tensor, ...]]] = deque()

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        self._messages.append((step, microbatch, tuple(tensors)))

    def receive(self, step: int, microbatch: int, form: Form) -> tuple[Tensor, ...]:
        assert self._messages, f"{self._spec}: a receive before its send; a valid plan cannot ask for it"
        sent_step, sent_microbatch, tensors = self._messages[0]
        if (sent_step, sent_microbatch) != (step, microbatch) or form_of(tensors) != form:
            raise MessageMismatch(
                f"{self._spec} holds another message than announced",
                got=_describe(sent_step, sent_microbatch, form_of(tensors)),
                needed=_describe(step, microbatch, form),
                fix="a stage must return the same shapes and dtypes for every micro-batch",
            )
        self._messages.popleft()
        return tensors


def _describe(step: int, microbatch: int, form: Form) -> str:
    return f"{', '.join(map(str, form)) or 'no tensor'} as micro-batch {microbatch}, step {step}"
