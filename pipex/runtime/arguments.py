"""What a pipeline can be built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TypeGuard

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from pipex.errors import InputError
from pipex.layout import Layout
from pipex.partition import Stage
from pipex.plan import Plan
from pipex.runtime.agreement import agree
from pipex.runtime.copies import said_of_copies
from pipex.transport.interface import World


def check_runnable(plan: Plan) -> None:
    """Raises InputError for a plan that needs more than one version of the weights."""
    if plan.update in ("microbatch", "delayed"):
        raise InputError(
            f"{plan.family} can be planned and simulated, but not run", got="a plan with older versions of the weights",
            needed="one version of the weights", fix="run a synchronous schedule, such as interleaved-zb or zbv",
        )  # fmt: skip


def check_stages(plan: Plan, ranks: int, stages: Sequence[nn.Module]) -> None:
    """Raises InputError if the plan cannot run, or the others do not fit it."""
    placement = plan.placement
    check_runnable(plan)
    if placement.ranks != ranks:
        raise InputError("the plan is for another number of ranks", got=f"a plan for {placement.ranks}",
                         needed=f"{ranks}, as launched")  # fmt: skip
    if len(stages) != placement.pieces:
        of = "in each copy of the model" if len(placement.pipes) > 1 else f"× {placement.chunks} chunks"
        needed = f"{placement.pieces} ({placement.ranks} ranks {of})"
        raise InputError("the plan is for another number of stages", got=f"{len(stages)} stages", needed=needed)


def check_options(loss_fn: object, optimizer: object, clip_norm: object, scaler: object, seed: object) -> None:
    """Raises InputError if one of a pipeline's options is not what it must be."""
    if not callable(loss_fn):
        raise InputError("loss_fn must be a function", got=type(loss_fn).__name__,
                         needed="(output, target) -> loss")  # fmt: skip
    if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
        raise InputError("loss_fn has parameters, which no optimizer would see", needed="a loss without parameters",
                         fix="make it part of the last stage")  # fmt: skip
    if optimizer is not None and (isinstance(optimizer, Optimizer) or not callable(optimizer)):
        raise InputError("optimizer must be a factory, since every rank makes one for its own parameters",
                         got=f"an instance of {type(optimizer).__name__}", needed="parameters -> optimizer",
                         fix="pass e.g. optimizer=lambda parameters: torch.optim.AdamW(parameters)")  # fmt: skip
    if clip_norm is not None and not (_is_number(clip_norm) and isfinite(clip_norm) and clip_norm > 0):
        raise InputError("clip_norm cannot be used", got=repr(clip_norm), needed="a finite number above 0, or None",
                         fix="leave it out not to clip")  # fmt: skip
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise InputError("scaler cannot be used", got=type(scaler).__name__, needed="a torch.amp.GradScaler, or None")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise InputError("seed cannot be used", got=repr(seed), needed="an integer from -2^63 to 2^63 - 1")


def enabled(scaler: GradScaler | None) -> GradScaler | None:
    """None for one that is not, as loops have it that scale only on a GPU."""
    return scaler if scaler is not None and scaler.is_enabled() else None


def agree_on(world: World, layout: Layout, model: Sequence[Stage], options: Mapping[str, object]) -> None:
    """Collective.

    Args:
        model: all stages.
        options: what else a pipeline is made with.

    Raises:
        ConfigMismatch: the ranks were given different things, or copies of a tied parameter that differ.
        UnsupportedModule: tensors that are not one share memory, and that of different ranks.
    """
    plan = layout.plan
    said = {
        "ranks": plan.placement.ranks, "micro-batches": plan.microbatches, "stages": len(model),
        "plan": f"{plan.family} (digest {plan.digest.hex()[:8]})",
        **{name: str(value) for name, value in options.items()},
        "layers per stage": str(list(layout.counts)), **said_of_copies(model, layout, world.rank),
        **{f"layer {n}": layout.blueprint.layer(n) for n in range(len(layout.blueprint.layers))},
    }  # fmt: skip
    agree(world, "Pipeline(...)", said)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
