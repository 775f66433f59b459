"""Runs a function as several forked ranks of one world, and tells what became of each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore

from pipex.transport.group import GroupWorld

LIMIT_SECONDS = 60.0
FORK = multiprocessing.get_context("fork")


@dataclass
class Outcome:
    """What a rank ended with; ``at`` is on the monotonic clock, which all processes of a host share."""

    value: Any = None
    error: str | None = None
    text: str = ""
    place: tuple[Any, ...] = ()
    at: float = 0.0
    exit_code: int | None = None


Body = Callable[[GroupWorld], Any]


def _child(report: Connection, path: Path, rank: int, ranks: int, timeout: float, body: Body) -> None:
    try:
        world = GroupWorld(FileStore(str(path), ranks), rank, ranks, timeout=timeout)
        try:
            outcome = Outcome(body(world))
            world.close()
        except Exception as error:
            world.fail(error)
            raise
    except Exception as error:
        place = tuple(getattr(error, name, None) for name in ("rank", "step", "stage", "action", "microbatch"))
        outcome = Outcome(error=type(error).__name__, text=str(error), place=place)
    outcome.at = time.monotonic()
    report.send(outcome)


class Ranks:
    """The started processes. A rank that ends without a report (killed, or aborted) has an outcome without values."""

    def __init__(self, path: Path, body: Body, ranks: int, timeout: float, absent: int) -> None:
        self.processes, self.reports = [], []
        for rank in range(ranks - absent):
            report, child_end = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_child, args=(child_end, path, rank, ranks, timeout, body), daemon=True)
            process.start()
            child_end.close()
            self.processes.append(process)
            self.reports.append(report)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> float:
        """Sends a signal and returns when."""
        pid = self.processes[rank].pid
        assert pid is not None
        at = time.monotonic()
        os.kill(pid, number)
        return at

    def outcomes(self, skip: tuple[int, ...] = ()) -> list[Outcome]:
        """Waits for every rank; those in ``skip`` are killed when the others are done."""
        outcomes = [Outcome() for _ in self.processes]
        order = [rank for rank in range(len(self.processes)) if rank not in skip] + list(skip)
        for rank in order:
            process, report = self.processes[rank], self.reports[rank]
            if rank in skip:
                process.kill()
            try:
                if report.poll(LIMIT_SECONDS):
                    outcomes[rank] = report.recv()
            except EOFError:
                pass
            process.join(LIMIT_SECONDS)
            outcomes[rank].exit_code = process.exitcode
        return outcomes


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """``start(body, ranks, timeout=30.0, absent=0)`` forks all but the last ``absent`` ranks and returns at once."""
    started: list[Ranks] = []

    def begin(body: Body, ranks: int, timeout: float = 30.0, absent: int = 0) -> Ranks:
        started.append(Ranks(tmp_path / f"store{len(started)}", body, ranks, timeout, absent))
        return started[-1]

    yield begin
    for process in (process for ranks in started for process in ranks.processes):
        process.kill()
        process.join()


@pytest.fixture
def run(start: Callable[..., Ranks]) -> Callable[..., list[Any]]:
    """``run(body, ranks)`` returns what each rank's body returned; every rank must end well."""

    def run_all(body: Body, ranks: int, timeout: float = 30.0) -> list[Any]:
        outcomes = start(body, ranks, timeout).outcomes()
        assert [(outcome.error, outcome.text, outcome.exit_code) for outcome in outcomes] == [(None, "", 0)] * ranks
        return [outcome.value for outcome in outcomes]

    return run_all
