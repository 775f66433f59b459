"""A process that has hardly a file descriptor left."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def descriptors(spare: int) -> Iterator[None]:
    """So many more than there are now can be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))  # its own, which is closed by now
    held = [os.dup(0) for _ in range(highest)]  # fills what is free below
    limit = max(held) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    for descriptor in held[len(held) - spare :]:
        os.close(descriptor)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in held[: len(held) - spare]:
            os.close(descriptor)
