"""What one forward has left to its backward, and its way to host memory and back.

Autograd gets handles to put in its graph, and the tape for the inputs of its operations. At "gone" they let go of the
device's memory, and get other memory with the same bytes at "back". Whatever else refers to the memory keeps it alive,
so nothing can be read that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pipex.runtime.copying import is_plain
from pipex.runtime.memory import memory_of
from pipex.torch_internals import version


class _Place(NamedTuple):
    """Where a tensor lies in its memory."""

    memory: int
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class _Handle:
    """In the place of a tensor that autograd has saved."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.put(tensor)

    def put(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, version(tensor)


class _Memory:
    """What one storage holds: on the device, on the host, or on both."""

    def __init__(self, tensor: Tensor) -> None:
        self.device: Tensor | None = _empty(tensor.device).set_(tensor.untyped_storage())
        self.host = _empty(torch.device("cpu"))

    def copy_out(self) -> None:
        assert self.device is not None
        self.host = torch.empty(self.device.shape, dtype=torch.uint8, pin_memory=self.device.is_cuda)
        self.host.copy_(self.device, non_blocking=True)

    def copy_back(self) -> None:
        assert self.device is not None
        self.device.copy_(self.host, non_blocking=True)


class Saved:
    """What one forward has left to its backward. ``pack`` and ``unpack`` are autograd's hooks."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")  # that of what is to move
        self._handles: list[_Handle] = []
        self._places: list[_Place] = []  # of each of them
        self._memory: dict[int, _Memory] = {}
        self._copied: torch.cuda.Event | None = None

    def pack(self, tensor: Tensor) -> _Handle:
        handle = _Handle(tensor)
        self._handles.append(handle)
        return handle

    def unpack(self, handle: _Handle) -> Tensor:
        """Raises RuntimeError as autograd does, of a tensor that was changed in place since it was saved."""
        tensor, needed = handle.tensor, handle.version
        if version(tensor) != needed:
            raise RuntimeError(
                f"a tensor that the backward needs was modified in place after the forward; got version "
                f"{version(tensor)} of a tensor of shape {tuple(tensor.shape)}, needed version {needed}; use an "
                "out-of-place operation there"
            )
        return tensor

    def stay(self, tensors: Iterable[Tensor]) -> None:
        """Leaves alone what shares memory with one of these, and what was changed since it was saved: that is refused
        where it is used."""
        self._device = next((one.tensor.device for one in self._handles if one.tensor.is_cuda), self._device)
        kept = {memory_of(tensor) for tensor in tensors if tensor.layout is torch.strided and not tensor.is_nested}

        def moves(handle: _Handle) -> bool:
            tensor = handle.tensor
            here = tensor.device == self._device and is_plain(tensor) and not tensor.is_inference()
            return here and memory_of(tensor) not in kept and version(tensor) == handle.version

        self._handles = list(filter(moves, self._handles))

    def copy_out(self) -> None:
        """Begins to copy."""
        for handle in self._handles:
            tensor = handle.tensor
            key = memory_of(tensor)
            if key not in self._memory:
                self._memory[key] = _Memory(tensor)
            offset = int(tensor.storage_offset())
            self._places.append(_Place(key, tensor.dtype, offset, tensor.shape, tensor.stride()))
        self._copied = _beside(self._device, "out", [memory.copy_out for memory in self._memory.values()])

    def gone(self) -> None:
        """Work that is given to the device from here on finds the memory free."""
        _wait(self._copied)
        for memory in self._memory.values():
            memory.device = None
        for handle in self._handles:
            handle.put(_empty(self._device))

    def back(self) -> None:
        """Begins to copy back."""
        for memory in self._memory.values():
            memory.device = torch.empty(memory.host.shape, dtype=torch.uint8, device=self._device)
        self._copied = _beside(self._device, "back", [memory.copy_back for memory in self._memory.values()])

    def ready(self) -> None:
        """Work that is given to the device from here on finds all in place."""
        _wait(self._copied)
        for handle, place in zip(self._handles, self._places, strict=False):  # no places: nothing has moved
            memory = self._memory[place.memory].device
            assert memory is not None
            tensor = torch.empty(0, dtype=place.dtype, device=self._device)
            handle.put(tensor.set_(memory.untyped_storage(), place.offset, place.shape, place.stride))
        self._handles, self._places = [], []
        self._memory.clear()


def _empty(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device)


# Copies on a GPU have a stream for each direction. The memory that they read or write is the main stream's: they begin
# when that has made what they read, or has done with what the memory was before; and nobody frees it, and so gives it
# to others, before the main stream has waited for their end.


@cache
def _stream(device: torch.device, way: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _beside(device: torch.device, way: str, copies: Iterable[Callable[[], None]]) -> torch.cuda.Event | None:
    if device.type != "cuda":
        for copy in copies:
            copy()
        return None
    stream = _stream(device, way)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for copy in copies:
            copy()
    done: torch.cuda.Event = stream.record_event()
    return done


def _wait(event: torch.cuda.Event | None) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
