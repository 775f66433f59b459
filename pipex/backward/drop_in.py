"""``drop_in()``: torch.distributed.pipelining with pipex's split backward, for every schedule and stage.

What is replaced, and why there (``torch_internals.REPLACED``):

    F   _PipelineStageBase.forward_one_chunk           a prepared forward, where the schedule will split the backward,
                                                       or a module of the stage does so itself (``own``)
    I   _PipelineStageBase.backward_one_chunk          gives the stage a dw_builder, torch's public seam, for this call:
                                                       torch then runs a full backward in I, on stage 0 too, and takes
                                                       W from the builder
    W   _PipelineStageBase.backward_weight_one_chunk   runs W and, under DDP, the reduction that torch leaves out
        _PipelineStageBase.scale_grads                 divides a tied parameter's gradient once; torch does so for every
                                                       stage of the rank that holds it
        PipelineStage._prepare_forward_infra           what its look at the shapes leaves in such modules is taken away
        stage.stage_backward{,_input,_weight}          for stages and handlers that call these themselves
        _step_microbatches of the schedules            tells which micro-batches are split (below)
        schedules._check_torch_compile_compatibility   a compiled stage is right here, and split (``compiled``)

A micro-batch whose W stands directly behind its I is not split: its I is one ordinary backward pass, which costs less
than two halves, and nothing waits in between. It gets its weight gradients in I.

Under FSDP2 the reduction is torch's own, in its action REDUCE_GRAD behind a stage's last W (``fsdp``); under DDP it is
that W's, bucket by bucket (``ddp``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipex.backward.ddp import deferrable, reduce
from pipex.backward.deferral import Deferral, deferral
from pipex.backward.passes import Deferred
from pipex.backward.splitter import Splitter
from pipex.backward.stage_backward import stage_backward, stage_backward_input, stage_backward_weight, weight_later
from pipex.backward.trial_stage import try_split
from pipex.backward.waiting import Waiting, warn_if_few_wait
from pipex.torch_internals import (
    REPLACED,
    SCHEDULES,
    STAGE,
    differences,
    find,
    refusal,
    require_split_backward,
    stages_of,
)

Stage = Any
"""A _PipelineStageBase."""


class Step(NamedTuple):
    """What the stages of a rank have to know of the step that is running.

    Attributes:
        deferral: which micro-batches are split.
        holders: by id of a parameter how many stages hold it whose gradients are not yet divided.
    """

    deferral: Deferral = Deferral()
    holders: Counter[int] | None = None


_OUTSIDE = Step()
_step: ContextVar[Step] = ContextVar("step", default=_OUTSIDE)

_splitters: WeakKeyDictionary[Stage, Splitter] = WeakKeyDictionary()
_waiting: WeakKeyDictionary[Stage, Waiting] = WeakKeyDictionary()
_judged: WeakSet[Any] = WeakSet()
"""The schedules of which it is known how many of their weight gradients wait."""
_originals: dict[str, Callable[..., Any]] = {}
_installed: list[drop_in] = []


class drop_in:
    """Makes torch.distributed.pipelining use pipex's split backward, from now on or inside of a ``with``.

    Schedules and stages may be made before or after. ``undo()``, or the end of the ``with``, puts everything back;
    several may be open at a time, and then the last to be undone does.

    Raises:
        UnsupportedModule: this torch has other insides than those that are replaced, or a trial on a small stage fails
            or gives wrong gradients. Nothing is replaced then.
    """

    def __init__(self) -> None:
        if not _installed:
            _install()
        _installed.append(self)

    def __enter__(self) -> drop_in:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.undo()

    def undo(self) -> None:
        """Puts torch's own functions back; micro-batches under way still come out right. May be called twice."""
        if self in _installed:
            _installed.remove(self)
            if not _installed:
                _replace(_originals)


def _install() -> None:
    fix = "use pipex.backward.dw_builder, which needs none of torch.distributed.pipelining's insides"
    require_split_backward()
    if differing := differences(REPLACED):
        raise refusal("pipex.drop_in()", "; ".join(differing), fix)
    _originals.update({path: find(path) for path, *_ in REPLACED})
    _replace(_REPLACEMENTS)
    before = _step.set(Step(Deferral(split=frozenset({(0, 0)}))))
    try:
        try_split()
    except BaseException as error:
        _replace(_originals)
        if not isinstance(error, Exception):
            raise
        raise refusal("pipex.drop_in()", f"in a trial of the split backward {_causes(error)}", fix) from error
    finally:
        _step.reset(before)


def _causes(error: BaseException) -> str:
    """What was raised, back to its cause: torch's stages wrap what their modules raise."""
    told = []
    cause: BaseException | None = error
    while cause is not None:
        told.append(f"{type(cause).__name__}: {' '.join(str(cause).split())}")
        cause = cause.__cause__
    return ", caused by ".join(told)


class _Weight:
    """W of one micro-batch: what I left to do."""

    def __init__(self) -> None:
        self.tapes: list[Deferred] = []

    def __call__(self, more: bool = False) -> None:
        for tape in self.tapes:
            tape.backward_weight(more)


def _replace(functions: Mapping[str, Callable[..., Any]]) -> None:
    for path, function in functions.items():
        owner, _, name = path.rpartition(".")
        setattr(find(owner), name, function)


def _step_of(owner: str) -> Callable[..., Any]:
    def step_microbatches(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A schedule with messages in its order is _PipelineScheduleRuntime.
        orders = getattr(self, "pipeline_order_with_comms", self.pipeline_order)
        holders = Counter(id(p) for stage in stages_of(self) for p in stage.submod.parameters())
        before = _step.set(Step(deferral_of(orders[self.rank] if orders else ()), holders))
        try:
            result = _originals[f"{SCHEDULES}.{owner}._step_microbatches"](self, *args, **kwargs)
            if self not in _judged and warn_if_few_wait(_waiting[s] for s in stages_of(self) if s in _waiting):
                _judged.add(self)
            return result
        finally:
            _step.reset(before)
            for stage in stages_of(self):  # nothing is left there by a step that was completed
                if stage in _splitters:
                    _splitters[stage].fused.clear()

    return step_microbatches


def deferral_of(order: Iterable[Any]) -> Deferral:
    """Of a rank's order in torch's actions, fused pairs and idle steps included."""
    return deferral((a.computation_type.value, a.stage_index, a.microbatch_index) for a in _flat(order))


def _flat(order: Iterable[Any]) -> Iterator[Any]:
    for action in order:
        if action is not None:
            yield from _flat(action.sub_actions) if action.sub_actions else (action,)


def _forward_one_chunk(self: Stage, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
    forward = _originals[f"{STAGE}._PipelineStageBase.forward_one_chunk"]
    if not self.has_backward or self.dw_builder is not None:
        return forward(self, fwd_chunk_id, *args, **kwargs)
    splitter = _splitter_of(self)
    split = (self.stage_index, fwd_chunk_id) in _step.get().deferral.split
    with splitter.record() if split else splitter.whole():
        return forward(self, fwd_chunk_id, *args, **kwargs)


def _prepare_forward_infra(self: Stage, *args: Any, **kwargs: Any) -> Any:
    prepare = _originals[f"{STAGE}.PipelineStage._prepare_forward_infra"]
    looks_back = kwargs.get("has_backward", args[3:4] == (True,)) and self.dw_builder is None  # torch 2.13 on
    with _splitter_of(self).whole() if looks_back else nullcontext():
        return prepare(self, *args, **kwargs)


def _splitter_of(stage: Stage) -> Splitter:
    if (splitter := _splitters.get(stage)) is None:
        splitter = _splitters[stage] = Splitter.of(deferrable(stage.submod))
        _waiting[stage] = Waiting(stage.submod, stage.stage_index)
        if isinstance(stage.submod, DistributedDataParallel):
            splitter.own.refuse_replicated()
    return splitter


def _backward_one_chunk(
    self: Stage, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
) -> None:
    backward = _originals[f"{STAGE}._PipelineStageBase.backward_one_chunk"]
    if full_backward or self.dw_builder is not None:
        backward(self, bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)
        return
    weight = _Weight()
    split = (self.stage_index, bwd_chunk_id) in _step.get().deferral.split
    looking = _waiting[self].look() if split and self in _waiting else nullcontext()
    self.dw_builder = lambda: weight
    try:
        with weight_later(weight.tapes.append), looking:
            backward(self, bwd_chunk_id, loss=loss, full_backward=False, last_backward=last_backward)
    finally:
        self.dw_builder = None


def _backward_weight_one_chunk(self: Stage, bwd_chunk_id: int, last_backward: bool = False) -> None:
    weight = self.dw_runner.get(bwd_chunk_id)
    if not isinstance(weight, _Weight):
        _originals[f"{STAGE}._PipelineStageBase.backward_weight_one_chunk"](
            self, bwd_chunk_id, last_backward=last_backward
        )
        return
    del self.dw_runner[bwd_chunk_id]
    if last_backward and isinstance(self.submod, DistributedDataParallel):
        if self in _splitters:
            _splitters[self].fused.add()  # of the W's before
        reduce(self.submod, weight.tapes)
        return
    more = (self.stage_index, bwd_chunk_id) in _step.get().deferral.followed
    weight(more)
    if not more and self in _splitters:
        _splitters[self].fused.add()  # of the W's before, where this micro-batch went through nothing recorded


@torch.no_grad()
def _scale_grads(self: Stage, grad_scale_factor: int) -> None:
    """Divides the gradients of a stage, once its last micro-batch has come. That of a parameter which other stages of
    the rank hold too is complete, and divided, with the last of these."""
    holders = _step.get().holders
    for parameter in self.submod.parameters():
        if holders is not None:
            holders[id(parameter)] -= 1
            if holders[id(parameter)] > 0:
                continue
        if parameter.grad is not None and grad_scale_factor != 1:
            # Of a DTensor, as FSDP2's are, this rank's part, without what a DTensor does around a division.
            part = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            part.div_(grad_scale_factor)


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    f"{STAGE}._PipelineStageBase.forward_one_chunk": _forward_one_chunk,
    f"{STAGE}._PipelineStageBase.backward_one_chunk": _backward_one_chunk,
    f"{STAGE}._PipelineStageBase.backward_weight_one_chunk": _backward_weight_one_chunk,
    f"{STAGE}._PipelineStageBase.scale_grads": _scale_grads,
    f"{SCHEDULES}.PipelineScheduleMulti._step_microbatches": _step_of("PipelineScheduleMulti"),
    f"{SCHEDULES}._PipelineScheduleRuntime._step_microbatches": _step_of("_PipelineScheduleRuntime"),
    f"{SCHEDULES}._check_torch_compile_compatibility": lambda stages, schedule_name: None,
    f"{STAGE}.PipelineStage._prepare_forward_infra": _prepare_forward_infra,
    f"{STAGE}.stage_backward": stage_backward,
    f"{STAGE}.stage_backward_input": stage_backward_input,
    f"{STAGE}.stage_backward_weight": stage_backward_weight,
}
assert _REPLACEMENTS.keys() == {path for path, *_ in REPLACED}
