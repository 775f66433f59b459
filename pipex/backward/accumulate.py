"""Adds gradients to ``param.grad`` as autograd's AccumulateGrad does, hooks included."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def accumulate(gradients: Mapping[Tensor, Tensor], *, owned: bool) -> None:
    """Adds each gradient to its parameter's ``.grad``, then runs the post-accumulate hooks.

    Args:
        gradients: by leaf tensor, of its shape and dtype: the whole gradient of this backward.
        owned: the gradients are fresh memory that nobody else sees, so the first one may become ``.grad`` itself.
    """
    present: list[Tensor] = []
    additions: list[Tensor] = []
    for parameter, gradient in gradients.items():
        before = parameter.grad
        if before is not None:
            present.append(before)
            additions.append(gradient)
        else:
            parameter.grad = gradient if owned else torch.empty_like(parameter).copy_(gradient)
    if present:
        torch._foreach_add_(present, additions)
    for parameter in gradients:
        hooks = parameter._post_accumulate_grad_hooks
        if hooks:
            for hook in list(hooks.values()):
                hook(parameter)
