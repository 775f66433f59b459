"""A linear layer with TransformerEngine's protocol for delayed weight gradients, and its ways.

Its backward puts what weight gradients need into a queue, and autograd gets none. ``backward_dw()`` takes the oldest
entry, raises where there is none, and *assigns* the weight's gradient; the bias gets one only where it has none. With
``fused`` the weight's is added to ``main_grad`` instead. At its end run the hooks that were registered with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Queue = deque[tuple[Tensor, Tensor]]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, queue: Queue | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.queue = queue
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.queue is None:
            return dy.mm(weight), dy.t().mm(x), dy.sum(0), None
        if ctx.needs_input_grad[1]:  # a frozen weight has no entry
            ctx.queue.append((x, dy))
        return dy.mm(weight), None, None, None


class DelayedLinear(nn.Module):
    def __init__(self, width: int, *, delay_wgrad_compute: bool = True, fused: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.bias = nn.Parameter(torch.randn(width))
        self.queue: Queue = deque()
        self.hooks: list[Callable[[], None]] = []
        self.calls = 0
        self.fused = fused
        self.delayed = delay_wgrad_compute
        if self.delayed:
            for parameter in self.parameters():
                parameter.skip_backward_post_hook = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(x, self.weight, self.bias, self.queue if self.delayed else None)
        return y

    def need_backward_dw(self) -> bool:
        return self.delayed

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        self.hooks.append(hook)

    def backward_dw(self) -> None:
        if not self.need_backward_dw():
            return
        if not self.queue:
            raise RuntimeError("Pop empty queue.")
        self.calls += 1
        x, dy = self.queue.popleft()
        product = dy.t().mm(x)
        if self.fused:
            self.weight.main_grad.add_(product)
        else:
            self.weight.grad = product
        if self.bias.grad is None:
            self.bias.grad = dy.sum(0)
        for hook in self.hooks:
            hook()
