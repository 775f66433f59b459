"""Where the tests of this folder run: on a GPU, and those of the transport on the simulated driver too."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import pipex
from pipex.runtime import worlds
from pipex.transport import device
from pipex.transport.host import HostRun

LIMIT = 60.0  # seconds for one launch


@dataclass
class Site:
    """Starts ranks on a GPU that they share, or with the simulated driver.

    Attributes:
        simulator: the simulated driver; None: there is a GPU.
        exits: of the last launch, the ranks' exit codes in the order of their process ids.
    """

    simulator: str | None
    exits: list[int] = field(default_factory=list)

    def launch(
        self, fn: Callable[..., Any], ranks: int, *, args: Any = (), timeout: float = 20.0, limit: float = LIMIT
    ) -> list[Any]:
        """As ``pipex.launch``; TimeoutError if even that does not come back within ``limit`` seconds."""
        seen: dict[int, int] = {}
        wait = os.waitpid

        def noting_wait(pid: int, options: int) -> tuple[int, int]:
            ended, status = wait(pid, options)
            if ended:
                seen[ended] = os.waitstatus_to_exitcode(status)
            return ended, status

        with pytest.MonkeyPatch.context() as patch, _within(limit):
            patch.setattr(os, "waitpid", noting_wait)
            if self.simulator is not None:
                self._simulate(patch)
            try:
                return pipex.launch(
                    fn, ranks, args=args, timeout=timeout, device="cuda" if self.simulator is None else "cpu"
                )
            finally:
                self.exits = [seen[pid] for pid in sorted(seen)]

    def free_memory(self) -> int:
        """Of the GPU, whoever uses the rest."""
        return torch.cuda.mem_get_info()[0] if self.simulator is None else 0

    def _simulate(self, patch: pytest.MonkeyPatch) -> None:
        def join(run: HostRun, rank: int, **options: Any) -> Any:
            return device.join(run, rank, torch.device("cpu"), library=str(self.simulator), **options)

        patch.setattr(HostRun, "join", join)
        patch.setattr(worlds, "threads_per_rank", lambda ranks: 1)  # so that the ranks are forked, and know `join`


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError; a time-out that was set before goes on afterwards."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"the ranks did not end within {seconds} s")

    handler = signal.signal(signal.SIGALRM, give_up)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture(
    scope="module",
    params=[pytest.param("simulated", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def site(request: pytest.FixtureRequest) -> Site:
    return Site(str(request.getfixturevalue("simulated_cuda")) if request.param == "simulated" else None)


@pytest.fixture(scope="module")
def gpu_site() -> Site:
    return Site(None)
