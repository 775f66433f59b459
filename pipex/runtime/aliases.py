"""Tensors of one message that share memory, which would be apart behind a cut.

In one process a layer that works in place on one of them changes the others. So one that a stage returns twice crosses
once, and is one tensor on the other side too:

    (y, y, z)  ──►  y, z, note  ──►  (y, y, z)

and of those that overlap otherwise (y and y[:2], y and y.detach()) the next stage is told, which may read them, but not
change one in place. Both is said by a note at the end of the message, which most messages have no need of.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pipex.errors import MessageMismatch
from pipex.runtime.memory import memory_of, overlap

_NOTE = (1, 1, 1, 1, 1, 1, 2)
"""The first dimensions of a note: int16[*_NOTE, n] for n tensors, the place of each in the message, and whether it
overlaps with another one. A message whose last tensor looks like a note gets one itself."""


def fold(tensors: Sequence[Tensor], known: Collection[int]) -> Sequence[Tensor]:
    """The message of these tensors, of which there is more than one.

    Args:
        known: the memory (``memory_of``) of tensors that overlapped with others when they were received.
    """
    memories = list(map(memory_of, tensors))
    if len(set(memories)) == len(memories) and not known and not _is_note(tensors[-1]):
        return tensors
    sent: list[Tensor] = []
    places = []
    for tensor in tensors:
        places.append(next((n for n, other in enumerate(sent) if other is tensor), len(sent)))
        if places[-1] == len(sent):
            sent.append(tensor)
    flags = [any(_shared(one, other, known) for other in sent if other is not one) for one in sent]
    if len(sent) == len(tensors) and not any(flags) and not _is_note(tensors[-1]):
        return tensors
    note = torch.tensor([places, [flags[place] for place in places]], dtype=torch.int16, device=sent[0].device)
    return *sent, note.view(*_NOTE, len(tensors))


def unfold(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[int], frozenset[int]] | None:
    """Of a message with a note: what was sent, the place there of each tensor, and the places of those that overlap.

    Raises:
        MessageMismatch: the note is not of these tensors.
    """
    if len(tensors) < 2 or not _is_note(tensors[-1]):
        return None
    places, flags = tensors[-1].flatten(0, 5)[0].tolist()
    if set(places) != set(range(len(tensors) - 1)):
        raise MessageMismatch(
            "a message says of its tensors what cannot be", got=f"places {places}",
            needed=f"each of 0 to {len(tensors) - 2}", fix="use one version of pipex on all ranks",
        )  # fmt: skip
    return tensors[:-1], places, frozenset(place for place, flag in zip(places, flags, strict=True) if flag)


def _is_note(tensor: Tensor) -> bool:
    return tensor.dtype is torch.int16 and tensor.shape[:-1] == _NOTE


def _shared(one: Tensor, other: Tensor, known: Collection[int]) -> bool:
    memory, its = memory_of(one), memory_of(other)
    return (memory in known and its in known) or (memory == its and overlap(one, other))
