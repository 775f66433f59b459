"""Adds gradients to ``param.grad`` as autograd does, or to ``param.main_grad``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pipex.backward.weights import Made
from pipex.errors import UnsupportedModule
from pipex.torch_internals import engine, foreach_add, hooks_of, post_accumulate_hooks


def hooks_on(node: Node) -> tuple[dict[int, Any], dict[int, Any]]:
    """The hooks that run before and after a node of the graph, those included that come later; those put there from
    C++, as DDP's are, do not show.

    torch keeps all hooks of one kind on a node in one dict, which the handle of any hook of that kind shows.
    """
    handles = node.register_prehook(lambda _: None), node.register_hook(lambda *_: None)
    before, after = (handle.hooks_dict_ref() for handle in handles)
    assert before is not None, "the node holds it"
    assert after is not None
    for handle in handles:
        handle.remove()
    return before, after


class Silence:
    """Hooks on gradients of parameters that do not run until ``end``; those of C++, as DDP's are, do."""

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken: list[tuple[dict[int, Any], dict[int, Any]]] = []  # where hooks were, and which

    def of(self, parameter: Tensor) -> None:
        """Of one more."""
        on_node = hooks_on(get_gradient_edge(parameter).node)
        for hooks in filter(None, (hooks_of(parameter), post_accumulate_hooks(parameter), *on_node)):
            self._taken.append((hooks, dict(hooks)))
            hooks.clear()

    def end(self) -> None:
        """They are there again."""
        for hooks, taken in self._taken:
            hooks.update(taken)
        self._taken.clear()


class Accumulator:
    """autograd's accumulator of a parameter, held, so that a hook which somebody puts on it is seen.

    An accumulator lives as long as somebody holds it, and the hooks on it as long as the accumulator.
    """

    __slots__ = ("_after", "_before", "node")

    def __init__(self, parameter: Tensor) -> None:
        self.node = get_gradient_edge(parameter).node
        self._before, self._after = hooks_on(self.node)

    @property
    def hooked(self) -> bool:
        """Whether something is to happen when it runs."""
        return bool(self._before or self._after)


def accumulate(
    targets: Sequence[Tensor | Made], gradients: Sequence[Tensor], known: Mapping[int, Accumulator] | None = None
) -> None:
    """Adds each gradient to its parameter's ``.grad`` as autograd's own accumulators do, hooks on the parameter and on
    its accumulator included (optimizers in the backward, data parallelism). That of something made of parameters goes
    through its graph first.

    A parameter with an attribute ``main_grad`` (Megatron-LM's and TransformerEngine's name for a gradient of higher
    precision) gets its gradient added there instead, and ``grad_added_to_main_grad`` set where it has that too; of its
    hooks those run that wait for an accumulated gradient. One that was frozen meanwhile gets none.

    Args:
        targets: leaf tensors, or what is made of some; each once.
        gradients: for each of them, in its shape, the whole gradient of this backward.
        known: by id of the parameter. Only a parameter whose accumulator is in here may have a gradient that nobody
            else holds, so that its memory may become ``.grad``; the others' is copied where it is shared.

    Raises:
        UnsupportedModule: the graph of something made of parameters is gone.
    """
    by_engine: list[Tensor | GradientEdge] = []
    their_gradients: list[Tensor] = []
    sums: list[Tensor] = []
    additions: list[Tensor] = []
    for target, gradient in zip(targets, gradients, strict=True):
        if isinstance(target, Made):
            by_engine.append(target.edge)
            their_gradients.append(gradient)
            continue
        parameter = target
        if not parameter.requires_grad:
            continue
        main_grad = main_grad_of(parameter)
        if main_grad is not None:
            for change in list((hooks_of(parameter) or {}).values()):
                changed = change(gradient)
                gradient = gradient if changed is None else changed
            main_grad.add_(gradient)
            tell_of_main_grad(parameter)
            for hook in list((post_accumulate_hooks(parameter) or {}).values()):
                hook(parameter)
            continue
        accumulator = None if known is None else known.get(id(parameter))
        if accumulator is not None and only_adds(accumulator, parameter, gradient):
            so_far = parameter.grad
            if so_far is None and gradient.stride() == parameter.stride():
                parameter.grad = gradient
                continue
            if so_far is not None and so_far.layout is gradient.layout and is_plain(so_far):
                sums.append(so_far)
                additions.append(gradient)
                continue
        by_engine.append(parameter)
        their_gradients.append(gradient)
    if sums:
        foreach_add(sums, additions)
    if by_engine:
        # Leaves as roots: nothing runs but their accumulators. All in one pass, in which what is made of one parameter
        # adds to it before anybody sees the sum. Not by autograd.backward, whose checks of gradients that are right by
        # construction take twice as long as the rest (18 instead of 7 µs for a small parameter, of which the addition
        # itself is 2).
        with naming_graphs_that_are_gone():
            engine.run_backward(
                tuple(by_engine), tuple(their_gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
            )


@contextmanager
def naming_graphs_that_are_gone() -> Iterator[None]:
    """Around a pass through what weights are made by."""
    try:
        yield
    except RuntimeError as error:
        if "a second time" not in str(error):
            raise
        raise UnsupportedModule(
            "the input gradient has come to a weight that is made of parameters (a parametrization, a merged LoRA "
            "pair), through an operation whose gradient does not wait, and has freed what W needs of it",
            needed="such a use in the first micro-batches too, in which it is looked for",
            fix="repeat the step: the gradients of these parameters do not wait from now on",
        ) from error


def only_adds(accumulator: Accumulator, parameter: Tensor, gradient: Tensor) -> bool:
    """Whether all that autograd would do is to add: no hook waits for this gradient, and it is not cast."""
    return not (
        hooks_of(parameter)
        or post_accumulate_hooks(parameter)
        or accumulator.hooked
        or getattr(parameter, "grad_dtype", gradient.dtype) is not gradient.dtype
    )


def is_plain(gradient: Tensor) -> bool:
    """Whether adding to it in place is the addition alone: no subclass sees it, and no graph records it."""
    return type(gradient) is Tensor and not gradient.requires_grad


def main_grad_of(parameter: Tensor) -> Tensor | None:
    """Where the parameter's gradient is to be added instead of ``.grad``, if anywhere."""
    return getattr(parameter, "main_grad", None)


def tell_of_main_grad(parameter: Tensor) -> None:
    """For whoever waits for a gradient in ``.grad``: it was added to ``main_grad``, if there is one."""
    if hasattr(parameter, "grad_added_to_main_grad") and main_grad_of(parameter) is not None:
        parameter.grad_added_to_main_grad = True
