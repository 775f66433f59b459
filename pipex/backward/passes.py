"""Backward passes that somebody answers for.

The graph of a prepared forward has no paths to recorded parameters, so a pass over it is right only if what the tapes
capture goes to W. Whoever runs a backward announces it, and says what is to become of the tapes; any other pass over
recorded operations (a gradient penalty inside a loss, a backward past the schedule) is refused rather than wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from pipex import torch_internals
from pipex.backward.uses import Sums
from pipex.backward.weights import Target
from pipex.errors import UnsupportedModule

Root = Tensor | GradientEdge
"""Where a pass begins: an output, or the place in the graph of one that is freed (torch's stages from 2.15 on)."""


class Deferred(Protocol):
    """What a pass has left to W: a tape."""

    def backward_weight(self, more: bool = False) -> None: ...

    def add_to(self, sums: Sums) -> None: ...

    @property
    def targets(self) -> Sequence[Target] | None: ...


Then = Callable[[Deferred], None]
"""What becomes of a tape that a pass has reached."""


def at_once(tape: Deferred) -> None:
    """Its W follows with the end of the pass."""
    tape.backward_weight()


_announced: dict[int, Then] = {}  # by the id of the engine's graph task


class Watcher(Protocol):
    """Looks at the graph before an announced pass, and says whether it is needed after it."""

    def take(self, roots: Sequence[Any]) -> bool: ...

    def pass_ended(self) -> None: ...


watchers: WeakSet[Watcher] = WeakSet()
"""Those who still have to know something; none after the first steps."""


class announced:
    """Around one backward pass from ``roots``: ``then`` gets every tape that the pass has reached, at its end.

    Attributes:
        retains: whether the pass must leave its graph as it is (``retain_graph``).
    """

    __slots__ = ("_edges", "_handles", "_hooks", "_task", "_tensors", "_then", "_watched", "retains")

    def __init__(self, roots: Sequence[Root], then: Then) -> None:
        self._then = then
        self._task = -1
        self.retains = False
        # The roots of a pass can tell which pass this is, in whatever thread the engine runs them.
        self._tensors = tensors = [root for root in roots if isinstance(root, Tensor)]
        self._hooks = [torch_internals.hook_dict(root) for root in tensors if root.grad_fn is not None]
        self._watched: list[Watcher] = []
        self._edges = [] if len(tensors) == len(roots) else [r for r in roots if isinstance(r, GradientEdge)]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> announced:
        if watchers:
            nodes = [t.grad_fn for t in self._tensors if t.grad_fn is not None] + [edge.node for edge in self._edges]
            self._watched = list(watchers)
            for watcher in self._watched:
                self.retains |= watcher.take(nodes)
        for hooks in self._hooks:
            hooks[self] = self._begin
        self._handles = [edge.node.register_prehook(self._begin) for edge in self._edges]
        return self

    def _begin(self, _: object) -> None:
        self._task = torch_internals.current_pass()
        _announced[self._task] = self._then

    def __exit__(self, *_: object) -> None:
        for hooks in self._hooks:
            hooks.pop(self, None)
        for handle in self._handles:
            handle.remove()
        _announced.pop(self._task, None)
        for watcher in self._watched:
            watcher.pass_ended()


def announced_for(task: int) -> Then | None:
    """What is to become of the tapes that this pass has reached; None if nobody has announced it."""
    return _announced.get(task)


def refuse_unannounced() -> NoReturn:
    """For a pass that nobody answers for."""
    raise UnsupportedModule(
        "a backward pass goes through a prepared forward, but is not the backward of its stage",
        needed="weight gradients that no such pass would make",
        fix="call pipex.stage_backward there, or run the part that differentiates itself (a gradient penalty, "
        "forces) outside of the stage",
    )


def refuse_graph_of_gradients() -> None:
    """Called during a pass, before dy is taken.

    Raises:
        UnsupportedModule: the pass makes a graph of its gradients (create_graph), in which recorded parameters lack.
    """
    if torch.is_grad_enabled():
        raise UnsupportedModule(
            "a backward pass with create_graph goes through a prepared forward",
            needed="first derivatives only",
            fix="run the part that is differentiated twice outside of the stage, or without the split backward",
        )


def accumulates() -> bool:
    """Called during a pass, by an operation that it has come to: whether it adds to ``.grad`` all that it comes to, as
    ``backward`` does, or is an ``autograd.grad``, which makes the gradients that it was asked for and no others."""
    node: Any = torch_internals.current_node()
    while node.next_functions:
        following = next((n for n, _ in node.next_functions if n is not None), None)
        if following is None:
            return True
        node = following
    try:
        return torch_internals.will_execute(node)
    except RuntimeError:  # asked about a leaf whose gradient the pass returns
        return False


def keep(_: Deferred) -> None:
    """For ``announced``: W comes later; whoever called the pass has the tape."""
