"""``drop_in()``: torch.distributed.pipelining with pipex's split backward, for every schedule and stage.

What is replaced, and why there:

    F   _PipelineStageBase.forward_one_chunk           a prepared forward, where the schedule will split the backward
    I   _PipelineStageBase.backward_one_chunk          gives the stage a dw_builder, torch's public seam, for this call:
                                                       torch then runs a full backward in I, on stage 0 too, and takes
                                                       W from the builder
    W   _PipelineStageBase.backward_weight_one_chunk   runs W and, under DDP, the reduction that torch leaves out
        stage.stage_backward{,_input,_weight}          for stages and handlers that call these themselves
        _step_microbatches of the schedules            tells which micro-batches are split (below)
        schedules._check_torch_compile_compatibility   a compiled stage is right here, if not deferred

A micro-batch whose W stands directly behind its I is not split: its I is one ordinary backward pass, which costs less
than two halves, and nothing waits in between. So is every micro-batch of a stage that is wrapped in DDP or has compiled
parts. FSDP2's parameters are not those that its forward uses, so they are never recorded. All these are right, and get
their weight gradients in I.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from itertools import pairwise
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import schedules, stage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, _PipelineScheduleRuntime
from torch.distributed.pipelining.stage import PipelineStage, _PipelineStageBase
from torch.nn.parallel import DistributedDataParallel

from pipex.backward.stage_backward import stage_backward, stage_backward_input, stage_backward_weight, weight_later
from pipex.backward.tape import Splitter, Tape
from pipex.errors import UnsupportedModule

_NEEDED: dict[tuple[Any, str], tuple[str, ...]] = {
    (_PipelineStageBase, "forward_one_chunk"): ("self", "fwd_chunk_id", "args", "kwargs"),
    (_PipelineStageBase, "backward_one_chunk"): ("self", "bwd_chunk_id", "loss", "full_backward", "last_backward"),
    (_PipelineStageBase, "backward_weight_one_chunk"): ("self", "bwd_chunk_id", "last_backward"),
    (PipelineScheduleMulti, "_step_microbatches"): ("self",),
    (_PipelineScheduleRuntime, "_step_microbatches"): ("self",),
    (schedules, "_check_torch_compile_compatibility"): ("stages", "schedule_name"),
    (stage, "stage_backward"): ("stage_output", "output_grads", "input_values"),
    (stage, "stage_backward_input"): ("stage_outputs_or_loss", "output_grads", "input_values", "weights"),
    (stage, "stage_backward_weight"): ("weights", "param_groups"),
}
"""What is replaced, and the first parameters that it must have."""

_split: ContextVar[frozenset[tuple[int, int]]] = ContextVar("split", default=frozenset())
"""(stage, micro-batch) of the running step whose weight gradients are deferred."""
_followed: ContextVar[frozenset[tuple[int, int]]] = ContextVar("followed", default=frozenset())
"""(stage, micro-batch) of the running step whose W is directly followed by the next deferred W of the stage."""

_splitters: WeakKeyDictionary[_PipelineStageBase, Splitter] = WeakKeyDictionary()
_installed: list[drop_in] = []


class drop_in:
    """Makes torch.distributed.pipelining use pipex's split backward, from now on or inside of a ``with``.

    Schedules and stages may be made before or after. ``undo()``, or the end of the ``with``, puts everything back;
    several may be open at a time, and then the last to be undone does.

    Raises:
        UnsupportedModule: this torch has other insides than those that are replaced, or a trial on a small stage gives
            wrong gradients. Nothing is replaced then.
    """

    def __init__(self) -> None:
        check_torch()
        if not _installed:
            self_test()
            _replace(_replacements())
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


def check_torch() -> None:
    """Raises UnsupportedModule where this torch lacks a function that is replaced, or it has other parameters."""
    for (owner, name), parameters in _NEEDED.items():
        found = getattr(owner, name, None)
        names = () if found is None else tuple(inspect.signature(found).parameters)
        if names[: len(parameters)] != parameters and not _installed:
            raise UnsupportedModule(
                f"torch {torch.__version__} has another torch.distributed.pipelining than pipex knows",
                got=f"{owner.__name__}.{name}({', '.join(names)})" if found else f"no {owner.__name__}.{name}",
                needed=f"{name}({', '.join(parameters)})",
                fix="use pipex.backward.dw_builder, which needs none of it",
            )


class _Weight:
    """W of one micro-batch: what I left to do."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def __call__(self, more: bool = False) -> None:
        for tape in self.tapes:
            tape.backward_weight(more)


_originals: dict[tuple[Any, str], Callable[..., Any]] = {
    (owner, name): vars(owner)[name] for owner, name in _NEEDED if name in vars(owner)
}


def _replacements() -> dict[tuple[Any, str], Callable[..., Any]]:
    return {
        (_PipelineStageBase, "forward_one_chunk"): _forward_one_chunk,
        (_PipelineStageBase, "backward_one_chunk"): _backward_one_chunk,
        (_PipelineStageBase, "backward_weight_one_chunk"): _backward_weight_one_chunk,
        (PipelineScheduleMulti, "_step_microbatches"): _step_of(PipelineScheduleMulti),
        (_PipelineScheduleRuntime, "_step_microbatches"): _step_of(_PipelineScheduleRuntime),
        (schedules, "_check_torch_compile_compatibility"): lambda stages, schedule_name: None,
        (stage, "stage_backward"): stage_backward,
        (stage, "stage_backward_input"): stage_backward_input,
        (stage, "stage_backward_weight"): stage_backward_weight,
    }


def _replace(functions: dict[tuple[Any, str], Callable[..., Any]]) -> None:
    for (owner, name), function in functions.items():
        setattr(owner, name, function)


def _original(owner: Any, name: str) -> Callable[..., Any]:
    return _originals[owner, name]


def _step_of(owner: type[PipelineScheduleMulti]) -> Callable[..., Any]:
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with_messages = isinstance(self, _PipelineScheduleRuntime)
        orders = self.pipeline_order_with_comms if with_messages else self.pipeline_order
        order = list(_flat(orders[self.rank] if orders else ()))
        split = split_microbatches(order)
        before = _split.set(split), _followed.set(followed_weights(order, split))
        try:
            return _original(owner, "_step_microbatches")(self, *args, **kwargs)
        finally:
            _split.reset(before[0])
            _followed.reset(before[1])
            for its_stage in self._stages:  # nothing is left there by a step that was completed
                if its_stage in _splitters:
                    _splitters[its_stage].fused.clear()

    return step


def split_microbatches(order: Iterable[Any]) -> frozenset[tuple[int, int]]:
    """(stage, micro-batch) of every I whose W is not the next action of the rank."""
    found = set()
    previous = None
    for action in order:
        kind = action.computation_type
        what = (action.stage_index, action.microbatch_index)
        if kind is schedules.BACKWARD_INPUT:
            found.add(what)
        elif kind is schedules.BACKWARD_WEIGHT and previous == (schedules.BACKWARD_INPUT, *what):
            found.remove(what)
        previous = (kind, *what)
    return frozenset(found)


def followed_weights(order: Iterable[Any], split: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
    """(stage, micro-batch) of every deferred W whose successor in the rank's order is one of the same stage."""
    deferred = [
        what if action.computation_type is schedules.BACKWARD_WEIGHT and what in split else None
        for action in order
        for what in [(action.stage_index, action.microbatch_index)]
    ]
    return frozenset(w for w, after in pairwise(deferred) if w and after and w[0] == after[0])


def _flat(order: Iterable[Any]) -> Iterator[Any]:
    for action in order:
        if action is not None:
            yield from _flat(action.sub_actions) if action.sub_actions else (action,)


def _forward_one_chunk(self: _PipelineStageBase, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
    forward = _original(_PipelineStageBase, "forward_one_chunk")
    if (self.stage_index, fwd_chunk_id) not in _split.get() or not self.has_backward or self.dw_builder is not None:
        return forward(self, fwd_chunk_id, *args, **kwargs)
    if (splitter := _splitters.get(self)) is None:
        splitter = _splitters[self] = Splitter.of(self.submod)
    with splitter.record():
        return forward(self, fwd_chunk_id, *args, **kwargs)


def _backward_one_chunk(
    self: _PipelineStageBase, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True,
    last_backward: bool = False,
) -> None:  # fmt: skip
    backward = _original(_PipelineStageBase, "backward_one_chunk")
    if full_backward or self.dw_builder is not None:
        backward(self, bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)
        return
    weight = _Weight()
    self.dw_builder = lambda: weight
    try:
        with weight_later(weight.tapes.append):
            backward(self, bwd_chunk_id, loss=loss, full_backward=False, last_backward=last_backward)
    finally:
        self.dw_builder = None


def _backward_weight_one_chunk(self: _PipelineStageBase, bwd_chunk_id: int, last_backward: bool = False) -> None:
    weight = self.dw_runner.get(bwd_chunk_id)
    if not isinstance(weight, _Weight):
        _original(_PipelineStageBase, "backward_weight_one_chunk")(self, bwd_chunk_id, last_backward=last_backward)
        return
    del self.dw_runner[bwd_chunk_id]
    more = (self.stage_index, bwd_chunk_id) in _followed.get()
    weight(more)
    if not more and self in _splitters:
        _splitters[self].fused.add()  # of the W's before, where this micro-batch went through nothing recorded
    if last_backward and isinstance(self.submod, DistributedDataParallel):
        _reduce(self.submod)


def _reduce(module: DistributedDataParallel) -> None:
    """All-reduces the gradients that ``no_sync`` has accumulated. The reducer waits for every parameter's accumulator
    to run, so zeros are added to each."""
    parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    module.reducer.prepare_for_backward(parameters)  # to which all are reachable, whatever find_unused_parameters says
    torch.autograd.backward(parameters, [p.new_zeros(()).expand_as(p) for p in parameters])


def self_test() -> None:
    """Runs F, I and W of a small stage through the replacements.

    Raises:
        UnsupportedModule: the gradients are not those of one backward, or W was not deferred.
    """
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    wanted = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    trial = object.__new__(PipelineStage)  # as its __init__ leaves it, which needs a process group
    state: dict[str, Any] = {
        "submod": module, "stage_index": 0, "num_stages": 1, "dw_builder": None, "backward_state": {}, "dw_runner": {},
        "fwd_cache": {}, "bwd_cache": {}, "output_chunks": [], "_has_backward": True, "chunks": 1,
        "_runtime_validate": False, "log_prefix": "", "_stage_meta": stage._StageMeta(inputs=()),
    }  # fmt: skip
    trial.__dict__.update(state)
    before = _split.set(frozenset({(0, 0)}))
    _replace(_replacements())
    try:
        loss = trial.forward_one_chunk(0, (x,)).sum()
        trial.backward_one_chunk(0, loss=loss, full_backward=False)
        deferred = all(parameter.grad is None for parameter in module.parameters())
        trial.backward_weight_one_chunk(0)
        found = [parameter.grad for parameter in module.parameters()]
        right = all(g is not None and torch.equal(g, w) for g, w in zip(found, wanted, strict=True))
        problem = None if right and deferred else f"deferred: {deferred}, gradients right: {right}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        _replace(_originals)
        _split.reset(before)
    if problem is not None:
        raise UnsupportedModule(
            f"a trial of the split backward in torch {torch.__version__}'s pipelining failed", got=problem,
            needed="the gradients of one backward, those of the weights in W",
            fix="use pipex.backward.dw_builder, which needs none of torch's insides",
        )  # fmt: skip
