"""Ranks that are threads of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipex.errors import PeerError
from pipex.transport.host import HostWorld

SomeWorld = TypeVar("SomeWorld", bound=HostWorld)
Result = TypeVar("Result")


def each(worlds: Sequence[SomeWorld], act: Callable[[SomeWorld], Result]) -> list[Result]:
    """Runs ``act`` on every rank at once; raises what the lowest failing rank raised."""

    def guarded(world: SomeWorld) -> Result:
        try:
            return act(world)
        except BaseException as error:
            world.fail(error)  # else the others would wait for it
            raise

    with ThreadPoolExecutor(len(worlds)) as pool:
        results = [pool.submit(guarded, world) for world in worlds]
        errors = [error for result in results if (error := result.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, PeerError)):
        raise error
    return [result.result() for result in results]
