"""What a pipeline can be built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TypeGuard

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from pipex.errors import InputError, UnsupportedModule
from pipex.layout import Layout
from pipex.partition import Stage
from pipex.plan import Plan
from pipex.runtime.agreement import agree
from pipex.runtime.copies import said_of_copies
from pipex.transport.interface import World


def refuse_asynchronous(**asked: bool) -> None:
    """Raises InputError if something is asked of a plan with updates within the step that all ranks must do together:
    none of them waits for another there."""
    if wanted := [name for name, is_asked in asked.items() if is_asked]:
        raise InputError(
            "this plan updates the weights within a step, on each rank by itself", got=", ".join(wanted),
            needed="step() alone, and nothing that looks at all ranks' gradients", fix="leave it out, or run a plan "
            "that updates at the end of a step",
        )  # fmt: skip


def refuse_ties(layout: Layout) -> None:
    """Raises UnsupportedModule if stages of a plan with updates within the step share a parameter."""
    for tie in layout.ties:
        raise UnsupportedModule(
            f"{tie.name} stands in the stages {tie.between}, and the plan updates each of them by itself",
            got="a parameter of several stages", needed="one stage for each", fix="cut the model so that all its uses "
            "are in one stage, or run a plan that updates at the end of a step",
        )  # fmt: skip


def check_stages(plan: Plan, ranks: int, stages: Sequence[nn.Module]) -> None:
    """Raises InputError if the plan cannot run, or the others do not fit it."""
    placement = plan.placement
    if plan.asynchronous and placement.chunks > 1:
        raise InputError("a plan with updates within the step needs one stage per rank", got=f"{placement.chunks} each",
                         needed="one, since a rank has one optimizer")  # fmt: skip
    if placement.ranks != ranks:
        raise InputError("the plan is for another number of ranks", got=f"a plan for {placement.ranks}",
                         needed=f"{ranks}, as launched")  # fmt: skip
    if len(stages) != placement.pieces:
        of = "in each copy of the model" if len(placement.pipes) > 1 else f"× {placement.chunks} chunks"
        needed = f"{placement.pieces} ({placement.ranks} ranks {of})"
        raise InputError("the plan is for another number of stages", got=f"{len(stages)} stages", needed=needed)


def check_own_loss(loss_fn: object, stages: Sequence[Stage], plan: Plan) -> None:
    """Raises InputError if the loss is to be the model's own, and there is none that can be."""
    if loss_fn != "model":
        return
    seen = stages[-1].loss_seen
    if seen is None:
        raise InputError("loss_fn='model' is the loss that the model's own forward returns",
                         got="stages that apply its layers one after another", needed="stages that run it",
                         fix="pass split_model a dict as the sample, or the pipeline a loss function")  # fmt: skip
    if not seen:
        raise InputError("loss_fn='model' is the loss that the model's own forward returns", got="none in what it has "
                         "returned for the sample", needed="a sample with labels",
                         fix="put them into split_model's sample, as into every batch")  # fmt: skip
    if problem := stages[-1].loss_problem:
        raise InputError(
            "the model's own loss is no mean over its samples or tokens, and so none over micro-batches", got=problem,
            needed="the same", fix="pass a loss_fn; if each micro-batch is to weigh by its samples, "
            "loss_fn=lambda output, target: output.loss, and the labels as the target too",
        )  # fmt: skip
    if plan.asynchronous:
        raise InputError("this plan updates the weights within a step", got="loss_fn='model', a mean over all "
                         "micro-batches", needed="the mean loss of each micro-batch",
                         fix="pass loss_fn=lambda output, target: output.loss, and the labels as the target too; or "
                         "run a plan that updates at the end of a step")  # fmt: skip


def check_options(loss_fn: object, optimizer: object, clip_norm: object, scaler: object, seed: object) -> None:
    """Raises InputError if one of a pipeline's options is not what it must be."""
    if not callable(loss_fn) and loss_fn != "model":
        got = repr(loss_fn) if isinstance(loss_fn, str) else type(loss_fn).__name__
        raise InputError("loss_fn must be a function", got=got, needed="(output, target) -> loss, or 'model'")
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
