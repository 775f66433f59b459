"""Messages of torch.distributed between GPUs over Gloo, which takes CPU memory only.

Gloo's send and receive hand the tensor's address to a socket as it is, so that a GPU's tensor would end the process
(``ProcessGroupGloo::send``; of the collectives some stage, of these two none). All of torch.distributed's messages go
through two methods of ``ProcessGroup``; here they do what a user of Gloo has to do himself: a sent tensor is copied to
pinned host memory, which waits for the GPU, and a received one to the GPU when it is waited for, in its stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def over_host_memory() -> Iterator[None]:
    """Inside, torch.distributed sends and receives tensors of GPUs over Gloo; those of the CPU as always."""
    send, receive = dist.ProcessGroup.send, dist.ProcessGroup.recv

    def staged_send(group: Any, tensors: list[Tensor], rank: int, tag: int) -> Any:
        if not _must_be_staged(tensors[0]):
            return send(group, tensors, rank, tag)
        # Detached, or what is under way would keep the tensors' graphs.
        return send(group, [_room_for(tensor).copy_(tensor.detach()) for tensor in tensors], rank, tag)

    def staged_receive(group: Any, tensors: list[Tensor], rank: int, tag: int) -> Any:
        if not _must_be_staged(tensors[0]):
            return receive(group, tensors, rank, tag)
        hosts = [_room_for(tensor) for tensor in tensors]
        return _Received(receive(group, hosts, rank, tag), hosts, tensors)

    # setattr, as mypy lets no method be assigned to.
    setattr(dist.ProcessGroup, "send", staged_send)  # noqa: B010
    setattr(dist.ProcessGroup, "recv", staged_receive)  # noqa: B010
    try:
        yield
    finally:
        setattr(dist.ProcessGroup, "send", send)  # noqa: B010
        setattr(dist.ProcessGroup, "recv", receive)  # noqa: B010


def _must_be_staged(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _room_for(tensor: Tensor) -> Tensor:
    """In the host's memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class _Received:
    """A message under way, as torch.distributed's ``Work``: all that its callers do with one is to wait."""

    def __init__(self, work: Any, hosts: list[Tensor], tensors: list[Tensor]) -> None:
        self._work, self._hosts, self._tensors = work, hosts, tensors

    def wait(self) -> bool:
        self._work.wait()
        for host, tensor in zip(self._hosts, self._tensors, strict=True):
            # Detached, as receive buffers are leaves that require grad. The pinned memory is not used again before the
            # stream has copied: torch's allocator sees to it.
            tensor.detach().copy_(host, non_blocking=True)
        return True
