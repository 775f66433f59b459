"""Ranks over device memory on the simulated driver, whose device memory torch sees as the CPU's."""

from __future__ import annotations

import gc
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked import Forked
from simulated_cuda import Simulator

from pipex.runtime import worlds
from pipex.transport import device
from pipex.transport.device import DeviceWorld
from pipex.transport.host import HostRun

Body = Callable[[DeviceWorld], Any]


def rank_main(run: HostRun, rank: int, body: Body, library: Path, settings: str, timeout: float) -> dict[str, Any]:
    os.environ["SIMULATED_CUDA"] = settings
    worlds.set_threads(run.ranks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = device.join(run, rank, torch.device("cpu"), timeout=timeout, library=str(library))
        worlds.enter(world)
        try:
            result = body(world)
            world.close()
        except BaseException as error:
            world.fail(error)
            world.close()
            raise
    gc.collect()  # a pipeline refers to itself
    simulator = Simulator(library)
    return {
        "result": result, "staged": world.staged, "mappings": simulator.mappings, "violations": simulator.violations,
        "warnings": [str(warning.message) for warning in caught if warning.category is RuntimeWarning],
    }  # fmt: skip


def start(
    bodies: Sequence[Body], library: Path, settings: str | Sequence[str] = "", *, timeout: float = 30.0
) -> Forked:
    """Forked ranks, each with its body and, if they differ, its settings of the simulator. A result comes with what the
    rank has warned of and left behind."""
    run = HostRun.create(len(bodies))
    each = [settings] * len(bodies) if isinstance(settings, str) else settings
    forked = Forked([
        partial(rank_main, run, rank, body, library, each[rank], timeout) for rank, body in enumerate(bodies)
    ])  # fmt: skip
    run.close()
    return forked


def launch(
    fn: Callable[..., Any], ranks: int, *, args: Sequence[Any] = (), library: Path, settings: str = ""
) -> list[Any]:
    """As ``pipex.launch``, through device memory; also that nothing is left of it."""
    importlib.import_module("torch._dynamo")  # or the first optimizer of every rank would
    with start([lambda _: fn(*args)] * ranks, library, settings) as forked:
        outcomes = [forked.outcome(rank, seconds=100) for rank in range(ranks)]
    for outcome in outcomes:
        assert "result" in outcome, outcomes
        seen = outcome["result"]
        assert (seen["staged"], seen["mappings"], seen["violations"], seen["warnings"]) == (None, 0, [], []), seen
    return [outcome["result"]["result"] for outcome in outcomes]
