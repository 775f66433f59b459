"""Ranks over device memory on the simulated driver, whose device memory torch sees as the CPU's."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import persistent
import torch
from forked import Forked
from host_world import run_in
from simulated_cuda import Simulator

from pipex.transport import device
from pipex.transport.device import DeviceWorld
from pipex.transport.host import HostRun

Body = Callable[[DeviceWorld], Any]


def rank_main(join: Callable[..., DeviceWorld], body: Body, library: Path, settings: str) -> dict[str, Any]:
    os.environ["SIMULATED_CUDA"] = settings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = join(device=torch.device("cpu"), library=str(library))
        try:
            result = run_in(world, body, (world,))
        except BaseException:
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
        partial(rank_main, partial(device.join, run, rank, timeout=timeout), body, library, each[rank])
        for rank, body in enumerate(bodies)
    ])  # fmt: skip
    run.close()
    return forked


def launch(
    fn: Callable[..., Any], ranks: int, *, args: Sequence[Any] = (), library: Path, settings: str = ""
) -> list[Any]:
    """As ``pipex.launch``, through device memory, by ranks that stay."""
    run = HostRun.create(ranks)
    bodies = [partial(_rank, run.address, rank, fn, args, library, settings) for rank in range(ranks)]
    try:
        outcomes = persistent.ranks.outcomes(bodies)
    finally:
        run.close()
    return results(outcomes)


def results(outcomes: Sequence[dict[str, Any]]) -> list[Any]:
    """What all ranks returned; also that they went through device memory, and that nothing is left of it."""
    for outcome in outcomes:
        assert "result" in outcome, outcomes
        seen = outcome["result"]
        assert (seen["staged"], seen["mappings"], seen["violations"], seen["warnings"]) == (None, 0, [], []), seen
    return [outcome["result"]["result"] for outcome in outcomes]


def _rank(
    address: bytes, rank: int, fn: Callable[..., Any], args: Sequence[Any], library: Path, settings: str
) -> dict[str, Any]:
    Simulator(library).forget()
    join = partial(device.join, HostRun.open(address), rank, timeout=30.0)
    return rank_main(join, lambda _: fn(*args), library, settings)
