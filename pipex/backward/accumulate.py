"""Adds gradients to ``param.grad`` as autograd's AccumulateGrad does, hooks included, or to ``param.main_grad``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Adds each gradient to its parameter's ``.grad``, then runs the post-accumulate hooks.

    A parameter with an attribute ``main_grad`` (Megatron-LM's and TransformerEngine's name for a gradient of higher
    precision) gets its gradient added there, and ``grad_added_to_main_grad`` set where it has that too.

    Args:
        parameters: leaf tensors, each once.
        gradients: for each of them, in its shape and dtype, the whole gradient of this backward; fresh memory, which
            may become ``.grad`` itself.
    """
    present: list[Tensor] = []
    additions: list[Tensor] = []
    hooked = False
    for parameter, gradient in zip(parameters, gradients, strict=True):
        before = getattr(parameter, "main_grad", None)
        if before is None:
            before = parameter.grad
        elif hasattr(parameter, "grad_added_to_main_grad"):
            parameter.grad_added_to_main_grad = True
        if before is not None:
            present.append(before)
            additions.append(gradient)
        else:
            parameter.grad = gradient
        hooked = hooked or bool(parameter._post_accumulate_grad_hooks)
    if present:
        torch._foreach_add_(present, additions)
    if hooked:
        for parameter in parameters:
            for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
                hook(parameter)
