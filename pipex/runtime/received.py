"""What a stage gets to work on, so that it may do with it what it may do in one process.

In one process the input of a layer is what the layer before it made, and no leaf of the graph. So a layer may work in
place on it, and its gradient has the strides in which autograd makes it. What arrives from another stage is a leaf, and
neither is so: autograd refuses in-place operations on leaves that require grad, and gives their gradients the strides
of the leaf. Hence

    leaf ──unsafe_view──► handed ──► stage          handed has the leaf's memory and strides, is no view of it, and has
                             └─ hook                a version counter of its own; the hook takes the gradient as it is,
                                                    after all hooks that the stage puts on handed
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pipex.errors import UnsupportedModule
from pipex.runtime.aliases import unfold
from pipex.runtime.memory import memory_of
from pipex.torch_internals import unsafe_view, version


class Received:
    """The tensors of one message, in use by a stage for one micro-batch.

    Args:
        tensors: leaves, and maybe a note on how they share memory; a gradient is wanted of those that require grad.
        plain: whether the stage begins with a layer that does not work in place and whose gradient has its input's
            strides, where that is contiguous: the leaves will do then, which takes 9 µs less, backward included.

    Attributes:
        handed: for the stage; the same tensor twice where the stage before has returned it twice.
        overlapping: memory of those that are apart here, but in one process are not.
    """

    __slots__ = ("_gradients", "_leaves", "_marks", "_own", "_wanted", "handed", "overlapping")

    def __init__(self, tensors: Sequence[Tensor], plain: bool) -> None:
        found = unfold(tensors) if len(tensors) > 1 else None
        if found is not None:
            tensors, places, overlapping = found
        self._leaves = self._own = tuple(tensors)
        self._wanted = [t.requires_grad for t in tensors]  # now: the stage may write something with a graph into one
        self._gradients: list[list[Tensor]] | None = None  # per tensor what the hook has got: one or nothing
        if not (plain and all(t.is_contiguous() for t in tensors)):
            self._gradients = [[] for _ in tensors]
            self._own = tuple(map(_hand, tensors, self._gradients))
        self.handed = self._own
        self._marks: Sequence[tuple[Tensor, object]] = ()
        self.overlapping: Collection[int] = ()
        if found is not None:
            self.handed = tuple(self._own[place] for place in places)
            apart = [self._own[place] for place in overlapping]
            self._marks = [(tensor, _mark(tensor)) for tensor in apart]
            self.overlapping = frozenset(map(memory_of, apart))

    def check_use(self, stage: int) -> None:
        """Called after the forward, and on the last stage after the loss. Where a tensor was changed in place, so was
        its leaf, which on one rank may be in the graph of the stage before: autograd's own check must see that there.

        Raises:
            UnsupportedModule: a tensor that overlaps with another one was changed, which that one has not seen.
        """
        for tensor, mark in self._marks:
            if _changed(tensor, mark):
                raise UnsupportedModule(
                    f"stage {stage} works in place on a tensor that shares memory with another one of its inputs",
                    got=f"a change of a tensor of shape {list(tensor.shape)}",
                    needed="no change of what overlaps, since behind a cut the others do not see it",
                    fix="clone the tensor before it is changed, or cut the model elsewhere",
                )  # fmt: skip
        if self._gradients is not None:
            for leaf, own in zip(self._leaves, self._own, strict=True):
                if own is not leaf and version(own):
                    increment_version(leaf)
        self.handed = self._own = ()  # they refer to the graph, and this is kept until the backward
        self._marks = ()

    def gradients(self) -> tuple[Tensor, ...]:
        """After the backward: one for each tensor that required grad when it came, since its sender waits for it;
        ``no_gradient`` where nothing depends on it."""
        found = []
        for number, (leaf, wanted) in enumerate(zip(self._leaves, self._wanted, strict=True)):
            if wanted:
                taken = [leaf.grad] if self._gradients is None else self._gradients[number]
                found.append(taken[0] if taken and taken[0] is not None else no_gradient(leaf.device))
        return tuple(found)


def no_gradient(device: torch.device) -> Tensor:
    """Stands for a gradient that is not there, and is not zeros: an optimizer leaves out what has none."""
    return torch.empty(0, dtype=torch.uint8, device=device)


def is_gradient(tensor: Tensor) -> bool:
    """Not of a ``no_gradient``, whose dtype no gradient has."""
    return tensor.dtype is not torch.uint8


def seeded(roots: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
    """Those of the roots that have a gradient, and it; None if gradients are not those of the roots."""
    if len(roots) != len(gradients):
        return None
    without = False
    for root, gradient in zip(roots, gradients, strict=True):
        if not is_gradient(gradient):
            without = True
        elif gradient.dtype is not root.dtype or gradient.shape != root.shape:
            return None
    if not without:
        return roots, gradients
    pairs = [(r, g) for r, g in zip(roots, gradients, strict=True) if is_gradient(g)]
    return [root for root, _ in pairs], [gradient for _, gradient in pairs]


def _hand(leaf: Tensor, gradients: list[Tensor]) -> Tensor:
    # Without gradients a leaf may be worked on in place, and has no graph. It may still require grad: the stage before
    # may say so of what it returns, as transformers does of embeddings for checkpoints.
    if not leaf.requires_grad or not torch.is_grad_enabled():
        return leaf
    handed = unsafe_view(leaf, leaf.shape)
    if handed.stride() != leaf.stride():  # of a dimension of one element it makes its own
        handed.data = leaf.data
    # Hooks on tensors run before those on nodes: the stage's own, which may change the gradient, before this one.
    handed.grad_fn.register_prehook(lambda found: gradients.append(found[0]))  # type: ignore[union-attr]
    return handed


def _mark(tensor: Tensor) -> object:
    """What tells whether a tensor has changed since: torch counts the changes of all that autograd may see."""
    return tensor.clone() if tensor.is_inference() else version(tensor)


def _changed(tensor: Tensor, mark: object) -> bool:
    return not torch.equal(tensor, mark) if isinstance(mark, Tensor) else version(tensor) != mark
