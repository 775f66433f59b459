"""Ranks that stay: processes that are forked once and then take one job after the other.

A fresh rank spends most of its time on what is done once per process (the first optimizer, the first backward, memory
copied on write): ten times what a small job takes. So healthy ranks are these. What ends a rank, needs it fresh or
patches what it runs starts its own: through ``pipex.launch`` or ``forked``.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from forked import outcome_of

from pipex.runtime import worlds
from pipex.torch_internals import import_compiler

FORK = multiprocessing.get_context("fork")


class Ranks:
    """Processes that grow in number with what is asked of them; started afresh when one of them has died or hangs."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def outcomes(self, bodies: Sequence[Callable[[], Any]], seconds: float = 100.0) -> list[dict[str, Any]]:
        """As ``forked.outcomes``, of bodies and results that can be pickled."""
        jobs = [pickle.dumps(body) for body in bodies]  # all, before any rank waits for another
        self.start(len(jobs))
        pipes = self._pipes[: len(jobs)]
        for pipe, job in zip(pipes, jobs, strict=True):
            pipe.send_bytes(job)
        deadline = time.monotonic() + seconds
        found = [_outcome(pipe, deadline) for pipe in pipes]
        if any(outcome is None or outcome == HUNG for outcome in found):
            self.stop()
        return [outcome or {} for outcome in found]

    def results(self, bodies: Sequence[Callable[[], Any]]) -> list[Any]:
        """What the bodies return; all must."""
        found = self.outcomes(bodies)
        assert all("result" in outcome for outcome in found), found
        return [outcome["result"] for outcome in found]

    def start(self, count: int) -> None:
        """There are at least so many from here on."""
        import_compiler()  # or the first optimizer of every rank would
        while len(self._pipes) < count:
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forking with threads around
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._processes.clear()
        self._pipes.clear()


HUNG = {"hung": True}

ranks = Ranks()
atexit.register(ranks.stop)


def _outcome(pipe: Connection, deadline: float) -> dict[str, Any] | None:
    """None of a rank that has died."""
    with suppress(EOFError, OSError):
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(max(0.0, deadline - time.monotonic())) else HUNG
    return None


def _serve(pipe: Connection, parent: int) -> None:
    worlds.die_with(parent)
    gc.freeze()  # what was there before need not be looked at after every job
    while True:
        job = pipe.recv_bytes()
        torch.manual_seed(0)
        pipe.send_bytes(pickle.dumps(outcome_of(pickle.loads(job))))
        gc.collect()  # a pipeline refers to itself, and holds rings
