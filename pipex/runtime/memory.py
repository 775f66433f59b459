"""Where tensors lie, and which of them lie in the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipex.torch_internals import storage_id


def memory_of(tensor: Tensor) -> int:
    """The same for all views of the same memory."""
    return storage_id(tensor.untyped_storage())  # not the address: a subclass that wraps other tensors has none


def has_bytes(tensor: Tensor) -> bool:
    """Whether it lies in memory as it is: no lazy one, none on the meta device, none that is sparse or wraps others."""
    if nn.parameter.is_lazy(tensor) or type(tensor.detach()) is not Tensor:
        return False
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta) and tensor.numel() > 0


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its storage that it may use, and the one behind the last."""
    begin = int(tensor.storage_offset())
    last = begin + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * tensor.itemsize, (last + 1) * tensor.itemsize


_Owner = TypeVar("_Owner")


def overlapping(tensors: Iterable[tuple[Tensor, _Owner]]) -> Iterator[tuple[_Owner, _Owner]]:
    """Of each two tensors that have memory in common what they are given with; those without bytes are left out."""
    by_storage: dict[int, list[tuple[int, int, Tensor, _Owner]]] = {}
    for tensor, owner in tensors:
        if has_bytes(tensor):
            by_storage.setdefault(memory_of(tensor), []).append((*extent(tensor), tensor, owner))
    for together in by_storage.values():
        together.sort(key=itemgetter(0))
        for position, (_, end, one, owner) in enumerate(together):
            for begin, _, other, its_owner in together[position + 1 :]:
                if begin >= end:
                    break
                if overlap(one, other):
                    yield owner, its_owner


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one storage have an element in common, or a part of one."""
    if one.itemsize != other.itemsize:
        return bool(one.numel() and other.numel())  # a tensor as another dtype: nearly always the same bytes
    first = min(one.storage_offset(), other.storage_offset())
    return _overlap(
        one.shape, one.stride(), one.storage_offset() - first, other.shape, other.stride(),
        other.storage_offset() - first,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _overlap(
    shape: Sequence[int], strides: Sequence[int], begin: int, other: Sequence[int], its_strides: Sequence[int],
    its_begin: int,
) -> bool:  # fmt: skip
    if 0 in shape or 0 in other:
        return False
    ends = [
        at + 1 + sum((size - 1) * stride for size, stride in zip(sizes, steps, strict=True))
        for at, sizes, steps in ((begin, shape, strides), (its_begin, other, its_strides))
    ]
    if ends[0] <= its_begin or ends[1] <= begin:
        return False
    elements = torch.zeros(max(ends), dtype=torch.bool)
    elements[torch.arange(max(ends)).as_strided(shape, strides, begin)] = True  # a write to it may not overlap itself
    return bool(elements.as_strided(other, its_strides, its_begin).any())
