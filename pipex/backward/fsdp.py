"""Stages whose parameters FSDP2 shards: W writes the gradient that a backward would have written, and has it reduced.

The forward does not use the module's parameters, but gathered ones, which exist from the first forward on and whose
memory comes and goes:

    F   gather ─► linear(x, alias of the gathered weight) ─► let go, if FSDP2 was told so
    I   gather ─► dX; norms' weight gradients, which FSDP2 takes into its sums (``post_backward``) ─► let go
    W   dW from (x, dy) alone ─► the gathered parameter's ``.grad`` ─► into the sums, in the precision in which they are
        reduced ─► reduced, if FSDP2 is to (``set_requires_gradient_sync``)

So micro-batches are summed one by one, as without the split, and there is one reduction for the gradients of I and W.
torch's schedules reduce in an action of their own behind a stage's last W; until then they tell FSDP2 not to. Whoever
has every W reduce has what I's have made by then reduced with it, be it of later micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pipex.backward.weights import Made, Target
from pipex.torch_internals import (
    context_of,
    finish_reductions,
    is_root,
    sharded_groups,
    sharded_states,
    unsharded_parameter,
)


class Sharded:
    """What FSDP2 holds of a stage; see ``sharded``."""

    def __init__(self, states: Sequence[Any]) -> None:
        self._states = states
        self._to_come = [parameter for group in self._groups() for parameter in group.fsdp_params]

    def _groups(self) -> Iterator[Any]:
        """Anew each time: FSDP2 completes its states in the first forward."""
        for state in self._states:
            yield from sharded_groups(state)

    def gathered(self) -> list[Tensor]:
        """The parameters that forwards use and that were gathered for the first time since the last call."""
        found, still_to_come = [], []
        for parameter in self._to_come:
            leaf = unsharded_parameter(parameter)
            if leaf is None:
                still_to_come.append(parameter)
            else:
                found.append(leaf)
        self._to_come = still_to_come
        return found

    @contextmanager
    def without_reduction(self) -> Iterator[None]:
        """Around I: nothing is reduced before W. torch's schedules see to that themselves."""
        groups = [(group, group.reduce_grads) for group in self._groups()]
        for group, _ in groups:
            group.reduce_grads = False
        try:
            yield
        finally:
            for group, reduces in groups:
                group.reduce_grads = reduces

    @contextmanager
    def for_weight(self, held: Sequence[Tensor], targets: Sequence[Target] | None) -> Iterator[None]:
        """Around W: has FSDP2 take what it writes. Gathers what was let go, should W read any of it.

        Args:
            held: what its products read.
            targets: what it gives gradients to, if that is known. The graph of something made of parameters may have
                saved them.
        """
        reads = targets is None or any(isinstance(target, Made) for target in targets)
        groups = []
        if reads or any(_let_go(tensor) for tensor in held):
            groups = [group for group in self._groups() if not group.is_unsharded]
        for group in groups:
            group.unshard()
            group.wait_for_unshard()
        try:
            yield
        finally:
            for group in groups:
                group.reshard()
        self._take()

    def _take(self) -> None:
        """What FSDP2 does at the end of a backward."""
        reduced = set()
        for state in self._states:
            for group in sharded_groups(state):
                if group.reduce_grads:
                    group.post_backward()
                    reduced.add(context_of(state))
                    continue
                for parameter in group.fsdp_params:
                    if unsharded_parameter(parameter) is not None:
                        parameter.accumulate_unsharded_grad_if_needed()
                        parameter.to_accumulated_grad_if_needed()
        for state in self._states:
            if is_root(state) and context_of(state) in reduced:
                finish_reductions(state)


def sharded(module: nn.Module) -> Sharded | None:
    """For a module that FSDP2 was applied to, or to a part of it; None for others."""
    states = sharded_states(module)
    return Sharded(states) if states else None


def _let_go(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
