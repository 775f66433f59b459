"""``pipex train``: a language model through a pipeline of processes, on this machine or under torchrun."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from typing import TYPE_CHECKING

from pipex.cli import FAILED, INTERRUPTED
from pipex.cli.train import options as option_module
from pipex.errors import InputError

if TYPE_CHECKING:
    from pipex.cli.train.task import Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    option_module.add_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    options = option_module.read(namespace)
    from pipex.cli.train.job import build_plan, check_resume
    from pipex.cli.train.task import task_of
    from pipex.runtime.launch import launch
    from pipex.runtime.worlds import under_torchrun

    # What is wrong with the arguments is said once, here, before any rank is started.
    ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun() else options.ranks
    plan = build_plan(options, ranks)
    task = task_of(options, plan)
    options.check_outputs()
    if plan.update == "never":
        raise InputError(f"{plan.family} has no backward", fix="choose a plan that trains")
    check_resume(options, task.stages(verify=False))
    results = launch(_rank, ranks, args=(task,), timeout=options.timeout, device=options.device)
    return max(int(result) for result in results if result is not None)


def _rank(task: Task) -> int:
    """One rank; rank 0 prints the report. Returns the exit code."""
    from pipex.cli.train import report
    from pipex.cli.train.check import differences, prepare
    from pipex.cli.train.job import train
    from pipex.observe import measure, write_trace
    from pipex.runtime.worlds import current_world

    world, options = current_world(), task.options
    process = prepare(task) if options.check and world.rank == 0 else None
    outcome = train(task)
    world.close()  # the others need not wait for the report
    if world.rank != 0:
        return 0
    if outcome.interrupted:
        where = f"; the checkpoint is in {options.save}" if options.save else ""
        print(f"stopped at step {len(outcome.losses)}{where}", file=sys.stderr)
        return INTERRUPTED
    if not outcome.losses:
        print(f"nothing to do: the checkpoint has reached --steps {options.steps}", file=sys.stderr)
        if options.json:
            print(json.dumps({"steps": 0}), flush=True)
        return 0
    plan = task.plan
    if options.trace is not None:
        write_trace(options.trace, outcome.events, plan.placement)
    different = None if process is None else differences(process, task, outcome)
    figures = measure(outcome.events, plan.placement)
    numbers = report.numbers(options, plan, outcome, figures, different)
    print(report.text(numbers, figures, different), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        # JSON has no NaN: a loss that is not finite is null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        print(json.dumps(finite), flush=True)
    return FAILED if different else 0
