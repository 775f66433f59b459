"""Backward passes that somebody answers for.

The graph of a prepared forward has no paths to recorded parameters, so a pass over it is right only if what the tapes
capture goes to W. Whoever runs a backward announces it, and says what is to become of the tapes; any other pass over
recorded operations (a gradient penalty inside a loss, a backward past the schedule) is refused rather than wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipex.errors import UnsupportedModule

if TYPE_CHECKING:
    from pipex.backward.tape import Tape

Then = Callable[["Tape"], None]
"""What becomes of a tape that a pass has reached."""

_announced: dict[int, Then] = {}  # by the id of the engine's graph task


class announced:
    """Around one backward pass from ``outputs``: ``then`` gets every tape that the pass has reached, at its end."""

    __slots__ = ("_hooks", "_task", "_then")

    def __init__(self, outputs: Sequence[Tensor], then: Then) -> None:
        self._then = then
        self._task = -1
        # The roots of a pass can tell which pass this is, in whatever thread the engine runs them.
        self._hooks = [_hooks_of(output) for output in outputs if output.grad_fn is not None]

    def __enter__(self) -> None:
        for hooks in self._hooks:
            hooks[self] = self._begin

    def _begin(self, _: Tensor) -> None:
        self._task = torch._C._current_graph_task_id()
        _announced[self._task] = self._then

    def __exit__(self, *_: object) -> None:
        for hooks in self._hooks:
            hooks.pop(self, None)
        _announced.pop(self._task, None)


def _hooks_of(output: Tensor) -> dict[Any, Callable[[Tensor], None]]:
    """The hooks on a tensor with a graph: what Tensor.register_hook adds to, without its handle, which takes as long
    as ten such dicts."""
    if output._backward_hooks is None:
        output._backward_hooks = OrderedDict()
        output.grad_fn._register_hook_dict(output)  # type: ignore[union-attr]
    hooks: dict[Any, Any] = output._backward_hooks
    return hooks


def then_of(tape: Tape, task: int) -> Then:
    """What becomes of the tape at the end of this pass.

    Raises:
        UnsupportedModule: nobody has announced it.
    """
    then = tape.then or _announced.get(task)
    if then is None or tape.recording:
        raise UnsupportedModule(
            "a backward pass goes through a prepared forward, but is not the backward of its stage",
            needed="weight gradients that no such pass would make",
            fix="call pipex.stage_backward there, or run the part that differentiates itself (a gradient penalty, "
            "forces) outside of the stage",
        )
    return then


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
    node: Any = torch._C._current_autograd_node()
    while node.next_functions:
        following = next((n for n, _ in node.next_functions if n is not None), None)
        if following is None:
            return True
        node = following
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # asked about a leaf whose gradient the pass returns
        return False
