"""Stages that are wrapped in DistributedDataParallel: its buckets leave in the last W, each as soon as it is full.

DDP reduces a parameter when autograd has added to its gradient, once in a step:

    W 0 … M-2   gradients are added, and DDP does not look (``no_sync``)
    W M-1       DDP is told to look; then it is told of the parameters whose gradients are complete already, since I
                makes them (norms); then autograd adds those of W, one parameter after the other as its products are
                made, in the order in which a backward comes to them
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipex.backward.accumulate import Silence, accumulate, main_grad_of
from pipex.backward.passes import Deferred
from pipex.backward.uses import Sums
from pipex.backward.weights import Target, leaves_of
from pipex.torch_internals import engine, has_python_reducer


def deferrable(module: nn.Module) -> nn.Module:
    """What may be recorded of a stage whose last W ``reduce`` makes: what DDP is around, unless DDP counts how often
    each parameter gets a gradient, or has another in its place."""
    if not isinstance(module, DistributedDataParallel):
        return module
    counts = module.static_graph or module.mixed_precision is not None or has_python_reducer(module)
    return module if counts else module.module


def reduce(module: DistributedDataParallel, tapes: Sequence[Deferred]) -> None:
    """The last W of a step: makes the gradients that the tapes have left, and has all of the module's reduced.

    Parameters that had no gradient in the whole step are unused, if DDP is to find such; else they get zeros.
    """
    told = [tape.targets for tape in tapes]
    made = Sums()
    if any(targets is None for targets in told):  # then all before the first leaves
        for tape in tapes:
            tape.add_to(made)
        targets = made.targets
    else:
        targets = [target for those in told for target in those or ()]
    leaving = _Leaving(targets)
    parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    complete = [p for p in parameters if not leaving.has(p)]
    outputs: list[Tensor] = []
    if module.find_unused_parameters:
        complete = [p for p in complete if p.grad is not None]
        with torch.enable_grad():  # it looks for parameters in graphs, where one by itself is in none
            outputs = [p.view_as(p) for p in parameters if leaving.has(p) or p.grad is not None]
    module.reducer.prepare_for_backward(outputs)
    _tell_of(complete)
    if targets is made.targets:
        for target, gradient in zip(made.targets, made.gradients, strict=True):
            leaving.add(target, gradient)
    else:
        for tape in tapes:
            tape.add_to(leaving)


class _Together:
    """Targets that share parameters, whose gradients autograd sums: they leave in one pass."""

    def __init__(self) -> None:
        self.sums = Sums()
        self.missing = 0  # gradients


class _Leaving(Sums):
    """Adds gradients to parameters as soon as they are complete.

    Args:
        targets: of all gradients to come, as often as these do.
    """

    __slots__ = ("_groups",)

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__()
        self._groups: dict[int, _Together] = {}  # by id of a parameter
        for target in targets:
            self._join(target).missing += 1

    def _join(self, target: Target) -> _Together:
        leaves = leaves_of(target)
        before = {id(group): group for leaf in leaves if (group := self._groups.get(id(leaf))) is not None}
        if len(before) == 1 and all(id(leaf) in self._groups for leaf in leaves):
            return next(iter(before.values()))
        joined = _Together()
        joined.missing = sum(group.missing for group in before.values())
        for key, group in self._groups.items():
            if id(group) in before:
                self._groups[key] = joined
        self._groups |= {id(leaf): joined for leaf in leaves}
        return joined

    def has(self, parameter: Tensor) -> bool:
        """Whether autograd will add to the parameter's gradient."""
        return id(parameter) in self._groups and main_grad_of(parameter) is None

    def add(self, target: Target, gradient: Tensor) -> None:
        group = self._groups[id(leaves_of(target)[0])]
        group.sums.add(target, gradient)
        group.missing -= 1
        if group.missing == 0:
            sums, group.sums = group.sums, Sums()
            accumulate(*sums.cast_back())  # by the engine, or DDP would not see it


def _tell_of(parameters: Sequence[Tensor]) -> None:
    """Has DDP take gradients that are complete: autograd adds a zero to each, which changes no bit, not even the sign
    of a zero. Others have been told of these gradients in I."""
    if not parameters:
        return
    nothing = [
        torch.zeros_like(p.grad) if p.grad is not None and p.grad.is_sparse else p.new_full((), -0.0).expand_as(p)
        for p in parameters
    ]
    silence = Silence()
    try:
        for parameter in parameters:
            silence.of(parameter)
        engine.run_backward(
            tuple(parameters), tuple(nothing), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    finally:
        silence.end()
