"""Modules that are used in several stages and keep something: a BatchNorm that stands twice in a model.

On one rank its uses share what it keeps, since it is one object. Across ranks each has its own; and where a rank runs
the first use of several micro-batches before the second use of one, what is kept changes in another order than in one
process. Both are right as long as no forward writes to it (tables of positions, masks), which is watched.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipex.errors import UnsupportedModule
from pipex.partition import Stage
from pipex.plan import Kind, Plan
from pipex.runtime.survey import keeps_nothing
from pipex.torch_internals import buffers_of, parameters_of, version

_INTERNAL = frozenset(vars(nn.Module()))

State = dict[object, tuple[object, object]]
"""By name: the object, and what tells that its contents have changed."""

_PLAIN = (bool, int, float, complex, str, bytes, torch.device)
_SMALL = 1024
"""Elements of tensors whose values are compared, since no version tells of a write to ``.data``; and
entries of containers that are looked into."""
_DEPTH = 3
"""Containers within containers that are looked into."""


class Watch:
    """Refuses what cannot be right, in one stage.

    Args:
        modules: those that are not to change, with what they are called.
        refusal: (module, what has changed) -> the error.
    """

    def __init__(
        self, modules: Sequence[tuple[str, nn.Module]], refusal: Callable[[str, str], UnsupportedModule]
    ) -> None:
        self._modules, self._refusal = modules, refusal

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward of the stage.

        Raises:
            UnsupportedModule: it has changed what is kept.
        """
        before = [_state(module) for _, module in self._modules]
        yield
        for (called, module), kept in zip(self._modules, before, strict=True):
            if changed := _changed(kept, _state(module)):
                raise self._refusal(called, changed)


def _of_shared(stages: Sequence[int], called: str, changed: str) -> UnsupportedModule:
    return UnsupportedModule(
        f"{called} is used in the stages {', '.join(map(str, stages))} and keeps what its forward changes",
        got=f"a change of {changed}",
        needed="nothing that changes, since these stages do not run one after the other, in one process, as the model "
        "does",
        fix="cut the model so that all of its uses are in one stage, give each use a module of its own, or run a plan "
        "with one copy of the model",
    )


def _of_loss(called: str, changed: str) -> UnsupportedModule:
    return UnsupportedModule(
        f"{called} is the loss function, or in it, and keeps what it changes",
        got=f"a change of {changed}", needed="nothing that changes, since each copy of the model has a loss function "
        "that sees its own micro-batches", fix="run a plan with one copy of the model",
    )  # fmt: skip


def _of_recomputed(stage: int, called: str, changed: str) -> UnsupportedModule:
    return UnsupportedModule(
        f"{called} is in stage {stage}, which is recomputed, and keeps what its forward changes",
        got=f"a change of {changed}", needed="nothing that changes, since each forward runs twice",
        fix="run a plan that does not recompute this stage",
    )  # fmt: skip


def watch_loss(loss: object, plan: Plan) -> Watch | None:
    """For the loss function of a plan with several copies of the model, whose last ranks each have one."""
    if len(plan.placement.pipes) == 1 or not isinstance(loss, nn.Module):
        return None
    return Watch([(type(module).__name__, module) for module in loss.modules()], _of_loss)


def watch(stages: Sequence[Stage], plan: Plan, stage: int) -> Watch | None:
    """For a stage of the plan; None where nothing of it can go wrong.

    Args:
        stages: of the model.
    """
    placement = plan.placement
    if stage in plan.recomputed:
        return Watch(list(_named(stages[placement.piece(stage)])), partial(_of_recomputed, stage))
    kept_by = [_kept(other) for other in stages] * len(placement.pipes)
    watched: list[tuple[str, nn.Module]] = []
    together: set[int] = set()
    for called, module in _named(stages[placement.piece(stage)]):
        kept = {id(module), *(id(buffer) for buffer in buffers_of(module).values() if buffer is not None)}
        users = [other for other, its in enumerate(kept_by) if kept & its]
        if len(users) > 1 and not _as_in_one_process(plan, users):
            watched.append((called, module))
            together.update(users)
    return Watch(watched, partial(_of_shared, sorted(together))) if watched else None


def _kept(stage: Stage) -> set[int]:
    return {id(kept) for kept in (*stage.layers.modules(), *stage.layers.buffers())}


def _named(stage: Stage) -> Iterable[tuple[str, nn.Module]]:
    for path, module in stage.layers.named_modules():
        position, _, inside = path.partition(".")
        if position:
            at = f"layer {stage.first_layer + int(position)}"
            yield f"{type(module).__name__} ({f'{inside} of {at}' if inside else at})", module


def _as_in_one_process(plan: Plan, stages: Sequence[int]) -> bool:
    """Whether one rank has all of these stages, and runs their forwards micro-batch by micro-batch."""
    ranks = {plan.placement.rank_of(stage) for stage in stages}
    if len(ranks) > 1:
        return False
    parts = [part for action in plan.orders[ranks.pop()] for part in action.each]
    order = [(part.microbatch, part.stage) for part in parts if part.kind is Kind.F and part.stage in stages]
    return order == sorted(order)


def _state(module: nn.Module) -> State:
    if keeps_nothing(module):  # but a module around it may write to its parameters
        return {name: (p, _written(p)) for name, p in parameters_of(module).items()}
    attributes = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
    return _entries(attributes | buffers_of(module) | parameters_of(module), _DEPTH)


def _entries(kept: Mapping[Any, object], depth: int) -> State:
    return {name: (value, _mark(value, depth)) for name, value in kept.items()}


def _mark(value: object, depth: int) -> object:
    if isinstance(value, Tensor):
        return None if nn.parameter.is_lazy(value) else (_written(value), _values(value))
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().numpy())
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, (dict, list, tuple, set, deque)):
        if not depth or len(value) > _SMALL:
            return len(value)
        if isinstance(value, dict):
            return _entries(value, depth - 1)
        return [(one, _mark(one, depth - 1)) for one in value]
    return None


def _written(tensor: Tensor | None) -> int | None:
    if tensor is None or nn.parameter.is_lazy(tensor) or tensor.is_inference():
        return None
    return version(tensor)


def _values(tensor: Tensor) -> bytes | None:
    """None of a large tensor, and of one on a GPU, which would have to be waited for."""
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu or tensor.numel() > _SMALL:
        return None
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    values = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
    return ctypes.string_at(values.data_ptr(), values.nbytes)  # by way of numpy it takes five times as long


def _changed(before: State, after: State) -> str:
    """The name of something that has changed; what is made by the first forward that needs it has not, in a dict
    neither."""
    return next((str(name) for name, kept in before.items() if not _same(kept, after.get(name, (None, None)))), "")


def _same(before: tuple[object, object], after: tuple[object, object]) -> bool:
    (value, mark), (now, mark_now) = before, after
    if value is None:
        return True
    if now is not value and not (type(now) is type(value) and isinstance(value, tuple)):
        return isinstance(value, _PLAIN) and bool(now == value)
    if isinstance(mark, dict) and isinstance(mark_now, dict):
        return not _changed(mark, mark_now)
    if isinstance(mark, list) and isinstance(mark_now, list):
        return len(mark) == len(mark_now) and all(map(_same, mark, mark_now))
    return mark == mark_now
