"""Memory of which a process has much in turn: what is freed goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
_LARGE = 1 << 20
_USUAL = 32 << 20  # where glibc's own threshold ends up, once blocks of this size have been freed


@contextmanager
def given_back() -> Iterator[None]:
    """Lets glibc map every large block apart, and so give it back when it is freed. By itself it learns from the first
    layer that is freed to cut the next ones from the heap, where a small block behind each keeps its place."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, _USUAL)
