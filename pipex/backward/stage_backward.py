"""``stage_backward`` and its two halves, with the signatures of torch.distributed.pipelining._backward.

They work on any graph. Over a prepared forward W is what its tapes hold. Elsewhere one pass makes all gradients in I,
and W adds those of the weights: right, but not deferred; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pipex.backward.accumulate import accumulate
from pipex.backward.passes import Deferred, Root, Then, announced, at_once
from pipex.backward.root import anchor
from pipex.backward.uses import Sums
from pipex.errors import InputError, UnsupportedModule
from pipex.torch_internals import hooks_of, is_view, set_hooks

_then: ContextVar[Then] = ContextVar("then", default=at_once)


@contextmanager
def weight_later(then: Then) -> Iterator[None]:
    """In here ``stage_backward`` is an I: ``then`` gets the tapes whose ``backward_weight`` is W."""
    before = _then.set(then)
    try:
        yield
    finally:
        _then.reset(before)


def stage_backward(
    stage_output: Any, output_grads: Any, input_values: Sequence[Any], outputs_with_grads_idxs: list[int] | None = None
) -> tuple[Tensor | None, ...]:
    """B: adds the gradients of the parameters to their ``.grad``, and returns those of the inputs.

    Args:
        stage_output: a tensor, or tuples, lists and dicts of tensors; those without a graph are skipped. In place of a
            tensor that is freed its ``GradientEdge`` can stand, as in stages of torch 2.15.
        output_grads: of the same structure, each tensor in the shape of its output; None for a scalar loss.
        input_values: the stage's inputs; their ``.grad`` is emptied.
        outputs_with_grads_idxs: the outputs that count, where not all do.

    Returns:
        one gradient per input; None for what is no tensor, or has none.

    Raises:
        InputError: outputs and gradients differ in structure.
        UnsupportedModule: the pass cannot be split (``pipex.backward.passes``).
    """
    if outputs_with_grads_idxs is not None:
        stage_output = [stage_output[i] for i in outputs_with_grads_idxs]
        output_grads = [output_grads[i] for i in outputs_with_grads_idxs]
    pairs = list(_with_graph(stage_output, output_grads))
    outputs = [output for output, _ in pairs]
    if outputs:
        with announced(outputs, _then.get()) as backward:
            torch.autograd.backward(
                cast(Sequence[Tensor], outputs), [gradient for _, gradient in pairs], retain_graph=backward.retains
            )
    gradients = []
    for value in input_values:
        gradients.append(value.grad if isinstance(value, Tensor) else None)
        if isinstance(value, Tensor):
            value.grad = None  # the next micro-batch must not add to it
    return tuple(gradients)


def stage_backward_input(
    stage_outputs_or_loss: Sequence[Tensor | GradientEdge | None],
    output_grads: Sequence[Tensor | None] | None,
    input_values: Sequence[Any],
    weights: Iterable[Tensor],
) -> tuple[tuple[Tensor | None, ...], list[dict[str, Any]]]:
    """I: the gradients of the inputs, and what ``stage_backward_weight`` needs; no weight's ``.grad`` changes.

    The outputs are detached where they are no views, so that nothing of the graph outlives this.

    Args:
        stage_outputs_or_loss: tensors, or a ``GradientEdge`` in place of one that is freed; those without a graph, and
            None, are skipped.
        output_grads: one per output, in its shape; None: ones.
        input_values: the stage's inputs; to their ``.grad`` the gradients are added too.
        weights: the parameters of the stage.

    Returns:
        one gradient per input, None for what is no tensor or needs none; and a list to hand to W as it is.

    Raises:
        InputError: a gradient edge without a gradient.
        UnsupportedModule: a region under reentrant checkpointing, or a pass that cannot be split.
    """
    if output_grads is None:
        output_grads = [torch.ones_like(o) if isinstance(o, Tensor) else None for o in stage_outputs_or_loss]
    pairs = list(_with_graph(list(stage_outputs_or_loss), list(output_grads)))
    inputs = {i: x for i, x in enumerate(input_values) if isinstance(x, Tensor) and x.requires_grad}
    trained = {id(weight): weight for weight in weights if weight.requires_grad}
    parameters = list(trained.values())
    tapes: list[Deferred] = []
    found: Sequence[Tensor | None] = [None] * (len(inputs) + len(parameters))
    if pairs:
        outputs = [output for output, _ in pairs]
        with announced(outputs, tapes.append) as backward:
            try:
                # The anchor is where recorded operations end whose input needs no gradient.
                *found, _ = torch.autograd.grad(
                    cast(Sequence[Tensor], outputs), [*inputs.values(), *parameters, anchor],
                    [gradient for _, gradient in pairs],
                    retain_graph=backward.retains,
                    allow_unused=True,
                )  # fmt: skip
            except RuntimeError as error:
                if "checkpoint" in str(error).lower() and ".grad()" in str(error):
                    raise UnsupportedModule(
                        "a region of the stage is under reentrant checkpointing, which cannot be split",
                        fix="checkpoint with use_reentrant=False",
                    ) from error
                raise
    gradients: list[Tensor | None] = [None] * len(input_values)
    for (index, value), gradient in zip(inputs.items(), found[: len(inputs)], strict=True):
        gradients[index] = gradient
        if gradient is not None:
            value.grad = gradient if value.grad is None else value.grad + gradient
    for output in stage_outputs_or_loss:
        if isinstance(output, Tensor) and not is_view(output):
            output.detach_()
    made = [(p, g) for p, g in zip(parameters, found[len(inputs) :], strict=True) if g is not None]
    return tuple(gradients), [{"tapes": tapes, "params": [p for p, _ in made], "grads": [g for _, g in made]}]


def stage_backward_weight(
    weights: Iterable[Tensor], param_groups: list[dict[str, Any]], retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """W: adds the weight gradients that I has left to ``.grad``. Empties ``param_groups``; once only.

    Args:
        weights: the parameters of the stage.
        param_groups: what ``stage_backward_input`` returned.
        retain_graph: without effect; W needs no graph.

    Returns:
        ``.grad`` of each weight (torch's own returns what it was before).
    """
    for group in param_groups:
        sums = Sums()
        for tape in group["tapes"]:
            tape.add_to(sums)
        for parameter, gradient in zip(group["params"], group["grads"], strict=True):
            sums.add(parameter, gradient)
        with _without_hooks(group["params"]):
            accumulate(*sums.cast_back())
    param_groups.clear()
    return tuple(weight.grad for weight in weights)


@contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """In here no gradient hook on these runs: I has run them, on gradients that it has asked autograd for."""
    hooks = [(parameter, hooks_of(parameter)) for parameter in parameters if hooks_of(parameter)]
    for parameter, _ in hooks:
        set_hooks(parameter, None)
    try:
        yield
    finally:
        for parameter, its_hooks in hooks:
            set_hooks(parameter, its_hooks)


def _with_graph(output: Any, gradient: Any) -> Iterator[tuple[Root, Tensor | None]]:
    """The tensors and gradient edges of ``output`` that have a graph, with their gradients."""
    if isinstance(output, GradientEdge):  # also a tuple
        if not isinstance(gradient, Tensor):
            raise InputError(
                "a gradient edge needs its output's gradient", got=type(gradient).__name__, needed="a tensor"
            )
        yield output, gradient
        return
    if isinstance(output, Tensor):
        if output.requires_grad:
            if gradient is not None and not isinstance(gradient, Tensor):
                raise InputError("a gradient is no tensor", got=type(gradient).__name__, needed="a tensor or None")
            yield output, gradient
        return
    if gradient is None or not isinstance(output, (tuple, list, dict)):
        return
    if isinstance(output, dict):
        if not isinstance(gradient, dict) or output.keys() != gradient.keys():
            got = sorted(gradient) if isinstance(gradient, dict) else type(gradient).__name__
            raise InputError("outputs and gradients differ", got=got, needed=f"a dict with {sorted(output)}")
        for key in output:
            yield from _with_graph(output[key], gradient[key])
        return
    if not isinstance(gradient, (tuple, list)) or len(gradient) != len(output):
        parts = len(gradient) if isinstance(gradient, (tuple, list)) else type(gradient).__name__
        raise InputError("outputs and gradients differ", got=parts, needed=f"{len(output)} gradients")
    for part, its_gradient in zip(output, gradient, strict=True):
        yield from _with_graph(part, its_gradient)
