"""What a step is given: checked and cut on every rank, then agreed on by all, before anything has begun.

So an argument that cannot be used is an error of the same call on all ranks, and the next call finds the pipeline as it
was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipex.errors import InputError
from pipex.partition import Stage
from pipex.plan import Plan
from pipex.runtime import microbatch
from pipex.runtime.agreement import compare
from pipex.runtime.copying import checksum, tensors_in
from pipex.runtime.loss import check_total
from pipex.runtime.update import Update, cleared
from pipex.transport.interface import World

_TRAINS = "trains something"  # what a rank says and need not be the same on all


@dataclass(slots=True)
class Given:
    """What this rank was given for a step.

    Attributes:
        batch, target: how they become micro-batches; None where they were not given.
        said: what this rank tells the others of it.
        problem: why it cannot be used.
    """

    batch: microbatch.Cut | None = None
    target: microbatch.Cut | None = None
    said: dict[str, Any] = field(default_factory=dict)
    problem: InputError | None = None


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks know of a step.

    Attributes:
        samples: of each micro-batch.
        total: what sums of losses are divided by, if it was given.
        trains: whether anything is to be trained.
    """

    samples: Sequence[int]
    total: float | None
    trains: bool


def take(
    world: World, plan: Plan, batch: Any, target: Any, total: object, *, first: Stage | None, last: bool,
    training: bool, own_loss: bool,
) -> Given:  # fmt: skip
    """Checks what this rank was given.

    Args:
        plan: whose number of micro-batches a training step keeps to.
        first: the first stage, if this rank holds it, and so needs the batch.
        last: whether it holds the last one, and so needs the target.
        own_loss: whether the model makes its loss itself, which needs no target.
    """
    given = Given()
    try:
        given.said["total"] = check_total(total)
        if own_loss:
            _check_own_loss(batch, target)
        target_needed = last and not own_loss
        batch_needed = first is not None
        for name, value, needed, end in (
            ("batch", batch, batch_needed, "first"),
            ("target", target, target_needed, "last"),
        ):
            if value is None:
                if needed:
                    raise InputError(f"rank {world.rank} holds the {end} stage and needs the {name}", got=None)
                continue
            how = microbatch.look(value, name, plan.microbatches, fewer=not training)
            if name == "target":
                given.target = how
            else:
                microbatch.check_keywords(value)
                if not how.samples:
                    raise InputError(
                        "nothing in the batch can be cut into micro-batches", got=how.forms[0],
                        needed="a tensor with a dimension 0", fix="or pass a list of ready micro-batches",
                    )  # fmt: skip
                given.batch = how
                if first is not None:
                    for inputs in microbatch.unmarked(batch):
                        first.check_inputs(inputs, whole=not isinstance(batch, list))
            ready = how.rows is None
            given.said |= {
                name: list(how.forms), f"{name} ready": ready,
                **_contents(name, value, plan),
                f"samples of the {name}": list(how.samples) if ready else sum(how.samples) or None,
            }  # fmt: skip
    except InputError as problem:
        given.problem = problem
        given.said = {"problem": str(problem)}
    return given


def _check_own_loss(batch: Any, target: Any) -> None:
    """Raises InputError if the model would make another loss than the mean over all micro-batches."""
    if target is not None:
        raise InputError("loss_fn='model' takes the labels out of the batch", got="a target", needed="none",
                         fix="put it into the batch, under the name that the model's forward has for it")  # fmt: skip
    pieces = batch if isinstance(batch, list) else [batch]
    if any(isinstance(piece, Mapping) and piece.get("num_items_in_batch") is not None for piece in pieces):
        raise InputError("loss_fn='model' divides by what all micro-batches have counted",
                         got="num_items_in_batch, by which each of them would have been divided before",
                         needed="a batch without it", fix="leave it out, or pass it as total=")  # fmt: skip


def _contents(name: str, value: Any, plan: Plan) -> dict[str, Any]:
    """What tells whether ranks were given the same, where several of them use it: one copy of the model takes a
    micro-batch from one rank and its target from another."""
    if len(plan.placement.pipes) == 1:
        return {}
    return {f"what the {name} holds, as checksums": [f"{checksum(tensor):08x}" for tensor in tensors_in(value)]}


def refuse_training(given: Given, plan: Plan, update: Update, trains: bool) -> None:
    """Notes why a pipeline cannot train as it is called, if it cannot.

    Args:
        update: what comes after.
        trains: whether this rank has anything to be trained.
    """
    problem = None
    given.said |= {"calls of forward_backward since the last update": len(update.counts), _TRAINS: trains}
    if plan.update == "never":
        problem = InputError("this pipeline cannot train", got=f"{plan.family}, a plan without a backward",
                             needed="a plan that trains", fix="call evaluate, or build another plan")  # fmt: skip
    elif update.optimizer is None and trains:
        problem = InputError("this pipeline cannot train", got="no optimizer", needed="optimizer=factory",
                             fix="pass e.g. optimizer=lambda parameters: torch.optim.AdamW(parameters)")  # fmt: skip
    elif not torch.is_grad_enabled() and trains:
        problem = InputError("this pipeline cannot train here", got="a step under no_grad or inference_mode",
                             needed="gradients", fix="call evaluate, or leave that block")  # fmt: skip
    elif update.reduced:
        problem = InputError("the gradients are complete", got="forward_backward after reduce_gradients",
                             needed="update first")  # fmt: skip
    elif update.dropped():
        problem = cleared()
    elif without_main := update.without_main():
        problem = InputError(
            "parameters without a main weight", got=", ".join(without_main),
            needed="all that are trained, and of bfloat16 or float16, when the pipeline is made",
            fix="thaw, add or replace parameters before that, or make the pipeline anew",
        )  # fmt: skip
    if problem is not None:
        given.problem, given.said = problem, {"problem": str(problem)}


def agreed(microbatches: int, given: Given, every: Sequence[dict[str, Any]]) -> Agreed:
    """What the ranks have agreed on.

    Args:
        every: ``given.said`` of all ranks.

    Raises:
        InputError: a rank cannot use what it was given, or batch and target do not fit.
        ConfigMismatch: two ranks were given different things.
    """
    if given.problem is not None:
        raise given.problem
    for rank, said in enumerate(every):
        if "problem" in said:
            raise InputError(f"rank {rank} cannot use what it was given: {said['problem']}")
    trained = [said.pop(_TRAINS, False) for said in every]
    all_say = compare(every)
    ready = all_say["batch ready"]
    target_ready = all_say.get("target ready", ready)  # there is none where the model makes its loss
    if ready is not target_ready:
        words = {True: "a list of ready micro-batches", False: "to be cut"}
        raise InputError("batch and target disagree", got=f"a batch that is {words[ready]}, a target that is "
                         f"{words[target_ready]}", needed="both lists, or none")  # fmt: skip
    samples = all_say["samples of the batch"]
    others = all_say.get("samples of the target", samples)  # none where all of it goes to every micro-batch
    if ready:
        if len(samples) != len(others):
            raise InputError("batch and target disagree", got=f"{len(samples)} and {len(others)} micro-batches",
                             needed="as many of both")  # fmt: skip
        return Agreed(samples, all_say.get("total"), any(trained))
    if samples != others:
        raise InputError("batch and target disagree", got=f"{samples} and {others} samples", needed="the same number")
    return Agreed(microbatch.sizes(samples, min(samples, microbatches)), all_say.get("total"), any(trained))
