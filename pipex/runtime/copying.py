"""Copies of what a stage is given: of tensors in tuples, lists and dicts, which share memory as the originals do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from pipex.runtime.memory import extent, has_bytes, memory_of


def copy(value: Any) -> Any:
    """The same, with copies of the tensors in it: of the same strides, and leaves that require grad where they did.
    What is neither a tensor nor a container of some is not copied."""
    extents: dict[int, tuple[int, int]] = {}  # of each memory, the bytes of it that are used
    for tensor in tensors_in(value):
        if is_plain(tensor):
            begin, end = extent(tensor)
            begin -= begin % _ALIGNED
            known = extents.get(memory_of(tensor), (begin, end))
            extents[memory_of(tensor)] = min(begin, known[0]), max(end, known[1])
    return _copy(value, extents, {}, {})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in the arguments of a stage."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(one)


def _copy(
    value: Any, extents: Mapping[int, tuple[int, int]], memories: dict[int, Tensor], known: dict[int, Any]
) -> Any:
    """``memories``: the copied bytes; ``known``: the copies of tensors, by their id."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = _copied(value, extents, memories)
        return known[id(value)]
    if isinstance(value, Mapping):
        copies = {key: _copy(one, extents, memories, known) for key, one in value.items()}
        return copies if type(value) is dict else type(value)(copies)  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        parts = [_copy(one, extents, memories, known) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _copied(tensor: Tensor, extents: Mapping[int, tuple[int, int]], memories: dict[int, Tensor]) -> Tensor:
    if not is_plain(tensor):
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    key = memory_of(tensor)
    begin, end = extents[key]
    if key not in memories:
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        memories[key] = whole[begin:end].clone()
    offset = int(tensor.storage_offset()) - begin // tensor.itemsize
    place = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    place.set_(memories[key].untyped_storage(), offset, tensor.shape, tensor.stride())
    return place.requires_grad_(tensor.requires_grad)


def is_plain(tensor: Tensor) -> bool:
    """Whether its bytes are all that it is."""
    if type(tensor) is not Tensor or not has_bytes(tensor):
        return False
    return not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


_ALIGNED = 16
"""Bytes: what every dtype is aligned to."""


def checksum(tensor: Tensor) -> int:
    """Of the elements in their order; 0 of what is more than them."""
    if nn.parameter.is_lazy(tensor) or type(tensor.detach()) is not Tensor or tensor.layout is not torch.strided:
        return 0
    plain = tensor.detach().resolve_conj().resolve_neg()
    return crc32(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data) if is_plain(plain) else 0
