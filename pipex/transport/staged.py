"""Edges over host memory for stages on a GPU: every message is copied to the host and from there.

The way where device memory cannot be shared between processes; correct, and slower by two copies over the bus.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipex.transport.header import as_sent, is_dense
from pipex.transport.interface import Buffers, EdgeKind, Links, Receiver, Sender, form_of

CPU = torch.device("cpu")


class StagedLinks:
    """This rank's ends of all edges, over those of a transport in host memory."""

    def __init__(self, links: Links, device: torch.device) -> None:
        self._links = links
        self.first_position = links.first_position
        self.senders: dict[tuple[int, int, EdgeKind], Sender] = {
            edge: StagedSender(sender) for edge, sender in links.senders.items()
        }
        self.receivers: dict[tuple[int, int, EdgeKind], Receiver] = {
            edge: StagedReceiver(receiver, device) for edge, receiver in links.receivers.items()
        }

    def flush(self) -> None:
        self._links.flush()

    def close(self) -> None:
        self.senders.clear()
        self.receivers.clear()
        self._links.close()


class StagedSender:
    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    @property
    def buffers(self) -> Buffers:
        return self._sender.buffers

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        copies = [to(t, CPU).requires_grad_(t.requires_grad) if is_dense(t) else t for t in tensors]
        self._sender.send(step, microbatch, copies)  # which refuses by name what is not dense


class StagedReceiver:
    def __init__(self, receiver: Receiver, device: torch.device) -> None:
        self._receiver, self._device = receiver, device

    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]:
        received = self._receiver.receive(step, microbatch)
        return tuple(to(t, self._device).requires_grad_(t.requires_grad) for t in received)


def to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor's values on another device, with its strides, those of an expanded tensor too."""
    found = as_sent(tensor)
    if found.numel() == 0:
        return found.to(device)
    elements = form_of([found])[0].nbytes // found.itemsize
    return found.as_strided((elements,), (1,)).to(device).as_strided(found.shape, found.stride())
