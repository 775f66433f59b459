"""What a pipeline can be built from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipex.errors import InputError
from pipex.plan import Plan
from pipex.runtime.stage_runner import LossFunction


def check_runnable(plan: Plan) -> None:
    """Raises InputError for a plan that needs more than one copy or version of the weights."""
    copies = len(plan.placement.pipes) > 1
    if copies or plan.update in ("microbatch", "delayed"):
        what = "two copies of the model" if copies else "older versions of the weights"
        raise InputError(
            f"{plan.family} can be planned and simulated, but not run",
            got=f"a plan with {what}",
            needed="one copy of the weights",
            fix="run a synchronous schedule of one pipe, such as interleaved-zb or zbv",
        )


def check_arguments(plan: Plan, ranks: int, stages: Sequence[nn.Module], loss_fn: LossFunction) -> None:
    """Raises InputError if the plan cannot run, or the others do not fit it."""
    placement = plan.placement
    check_runnable(plan)
    if placement.ranks != ranks:
        raise InputError("the plan is for another number of ranks", got=f"a plan for {placement.ranks}",
                         needed=f"{ranks}, as launched")  # fmt: skip
    if len(stages) != placement.stages:
        needed = f"{placement.stages} ({placement.ranks} ranks × {placement.chunks} chunks)"
        raise InputError("the plan is for another number of stages", got=f"{len(stages)} stages", needed=needed)
    if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
        raise InputError("loss_fn has parameters, which no optimizer would see", needed="a loss without parameters",
                         fix="make it part of the last stage")  # fmt: skip
