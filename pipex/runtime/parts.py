"""What a pipeline is made of on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.amp import GradScaler

import pipex.plan as plans
from pipex.layout import Layout
from pipex.observe import Observer
from pipex.observe.times import Times, times_of
from pipex.partition import Stage, as_stages, layout_of, materialize, room_for, without_others
from pipex.partition.own_forward.loss import own_loss
from pipex.plan import Plan
from pipex.runtime import pairs, tied
from pipex.runtime.agreement import share
from pipex.runtime.arguments import (
    agree_on,
    check_options,
    check_own_loss,
    check_stages,
    enabled,
    refuse_asynchronous,
    refuse_ties,
)
from pipex.runtime.commit import Gradients
from pipex.runtime.elsewhere import Elsewhere
from pipex.runtime.executor import Executor
from pipex.runtime.fused_executor import FusedExecutor
from pipex.runtime.loss import Loss, LossFunction
from pipex.runtime.main_weights import refuse_main_grad
from pipex.runtime.offloading import OffloadingRunner
from pipex.runtime.recomputing import RecomputingRunner
from pipex.runtime.seeding import Seeds
from pipex.runtime.shared_state import watch, watch_loss
from pipex.runtime.stage_runner import StageRunner
from pipex.runtime.trainable import Trainables
from pipex.runtime.update import OptimizerFactory, Update
from pipex.runtime.versions import Versions
from pipex.runtime.wiring import connect
from pipex.transport.interface import Links, World

_made: WeakKeyDictionary[World, int] = WeakKeyDictionary()
"""How many pipelines each world has. All ranks make them in the same order, so the number says which one it is."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Attributes:
    number: of the pipeline in its world, counted as they are made.
    layout: what every rank holds.
    stages: of the model; of those that this rank does not hold, forms.
    local_stages: those that it holds, in the model's order.
    runners: by stage of the plan, what this rank runs.
    versions: of the weights, where they change within a step.
    blank: whether a rank holds tensors without values.
    """

    number: int
    layout: Layout
    stages: list[Stage]
    local_stages: list[Stage]
    runners: dict[int, StageRunner]
    loss: Loss
    seeds: Seeds
    times: Times
    trainables: Trainables
    update: Update
    versions: Versions | None
    links: Links
    executor: Executor
    blank: bool


def assemble(
    world: World, stages: Sequence[nn.Module], plan: Plan, loss_fn: LossFunction | Literal["model"],
    optimizer: OptimizerFactory | None,
    clip_norm: float | None, scaler: GradScaler | None, main_weights: bool, seed: int, observer: Observer | None,
    exact: bool | None,
) -> Parts:  # fmt: skip
    """Collective. Arguments as of ``Pipeline``, errors too."""
    number = _made[world] = _made.get(world, 0) + 1
    plans.validate(plan)
    check_stages(plan, world.ranks, stages)
    check_options(loss_fn, optimizer, clip_norm, scaler, seed)
    model, scaler = as_stages(stages), enabled(scaler)
    check_own_loss(loss_fn, model, plan)
    layout = layout_of(plan, model)
    agree_on(world, layout, model, {
        "loss_fn": "model" if loss_fn == "model" else "a function", "optimizer": optimizer is not None,
        "clip_norm": clip_norm, "scaler": scaler is not None,
        "main_weights": main_weights, "seed": seed, "exact": exact,
    })  # fmt: skip
    refuse_main_grad(model)
    if plan.asynchronous:
        refuse_asynchronous(clip_norm=clip_norm is not None, scaler=scaler is not None, main_weights=main_weights)
        refuse_ties(layout)
    own = layout.pieces_of(world.rank)
    apart = pairs.agreed_obstacle(world, plan)
    runnable = plans.unfused(plan) if apart else plan
    kept = without_others(model, own)
    blank = any(share(world, "Pipeline(...)", materialize([model[piece] for piece in own], world.device)))

    seeds, accumulators = Seeds(world.device, seed), tied.Accumulators()
    function = own_loss if loss_fn == "model" else loss_fn
    placement, of_loss = plan.placement, watch_loss(function, plan)
    loss = Loss(
        function, None if scaler is None else scaler.scale, means_only=plan.asynchronous,
        around=nullcontext if of_loss is None else of_loss.forward,
    )  # fmt: skip
    runners = {
        stage: _kind_of(stage, plan)(
            stage, _on(world.device, kept[placement.piece(stage)]), placement, loss, seeds, exact, accumulators,
            watch(model, runnable, stage),
        )
        for stage in placement.stages_of(world.rank)
    }  # fmt: skip
    copies = len(placement.pipes) > 1
    trainables = Trainables(layout.ties, runners, accumulators, Elsewhere(model, kept), copies)
    gradients = Gradients(world, layout, trainables)
    local = [kept[piece] for piece in own]
    update = Update(world, gradients, local, main_weights, optimizer, clip_norm, scaler)

    versions = None
    if plan.asynchronous:
        (runner,) = runners.values()
        versions = Versions(
            lambda: runner.survey.parameters, delayed=plan.update == "delayed", others=runner.stage.buffers
        )
    orders = plans.communicate(runnable)
    links = connect(world, layout, runnable, orders)
    times = times_of(world.device, observer)
    common = world, runnable, orders[world.rank], runners, times
    if pairs.has_some(runnable):
        way = pairs.way_of(world.device, {stage: runner.stage for stage, runner in runners.items()})
        executor: Executor = FusedExecutor(*common, way)
    else:
        executor = Executor(*common, versions, update.within)
        executor.why_apart = apart
    executor.connect(links)
    return Parts(
        number, layout, kept, local, runners, loss, seeds, times, trainables, update, versions, links, executor, blank
    )


def _on(device: torch.device, stage: Stage) -> Stage:
    with room_for(stage, device):
        return stage.to(device)


def _kind_of(stage: int, plan: Plan) -> type[StageRunner]:
    if stage in plan.recomputed:
        return RecomputingRunner
    return OffloadingRunner if stage in plan.offloaded else StageRunner
