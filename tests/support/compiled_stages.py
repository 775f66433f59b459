"""Stages that are compiled, and their split beside their unsplit backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from regimes import Call, plain
from torch import Tensor, nn

from pipex.backward import Splitter, Tape

WIDTH, ROWS = 16, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Together(nn.Sequential):
    """A sequence that the compiler does not skip."""

    def forward(self, x: Any) -> Any:
        return super().forward(x)


def blocks() -> nn.Module:
    return Together(Block(), Block())


def whole(module: nn.Module, backend: str) -> nn.Module:
    module.compile(backend=backend)
    return module


def wrapped(module: nn.Module, backend: str) -> nn.Module:
    return nn.Sequential(torch.compile(module, backend=backend))


def each(module: nn.Module, backend: str) -> nn.Module:
    for child in module.children():
        child.compile(backend=backend)
    return module


def first(module: nn.Module, backend: str) -> nn.Module:
    next(module.children()).compile(backend=backend)
    return module


@dataclass
class Found:
    """Of two micro-batches."""

    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    heard: dict[str, list[Tensor]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    in_input: int = 0


def hear(module: nn.Module, found: Found) -> None:
    """By hooks; autograd runs them with None where a compiled backward has no gradient for a parameter."""

    def on_gradient(name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            found.heard.setdefault(name, []).append(gradient.clone())

    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(on_gradient, name))


def start(build: Callable[[], nn.Module], how: Callable[[nn.Module, str], nn.Module], backend: str) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(1)
    module = how(build(), backend)
    torch.manual_seed(2)
    return module


def unsplit(module: nn.Module, call: Call, xs: list[Tensor], order: str = "") -> Found:
    found = Found()
    hear(module, found)
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in xs]
    outputs = [call(module, x) for x in copies]
    for y in outputs:
        torch.manual_seed(5)
        y.backward(torch.randn_like(y))
    return finish(module, found, outputs, [x.grad for x in copies])


def finish(module: nn.Module, found: Found, outputs: list[Tensor], inputs: list[Tensor | None]) -> Found:
    found.outputs, found.inputs = [y.detach() for y in outputs], inputs
    found.gradients = {name: p.grad for name, p in module.named_parameters()}
    found.buffers = dict(module.named_buffers())
    return found


def split(module: nn.Module, call: Call, xs: list[Tensor], order: str = "W0 W1") -> Found:
    found = Found()
    hear(module, found)
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in xs]
    splitter = Splitter.of(module)
    tapes: list[Tape] = []
    outputs, inputs = [], []
    for x in copies:
        with splitter.record() as tape:
            outputs.append(call(module, x))
        tapes.append(tape)
    for tape, y, x in zip(tapes, outputs, copies, strict=True):
        torch.manual_seed(5)
        inputs += tape.backward_input([y], [torch.randn_like(y)], [x] if x.requires_grad else []) or [None]
    found.in_input = sum(p.grad is not None for p in module.parameters() if p.dim() > 1)
    for place in order.split():
        tapes[int(place[1])].backward_weight()
    return finish(module, found, outputs, inputs)


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def check(
    build: Callable[[], nn.Module] = blocks,
    how: Callable[[nn.Module, str], nn.Module] = whole,
    call: Call = plain,
    backend: str = "aot_eager",
    needs_gradient: bool = True,
    rows: tuple[int, int] = (ROWS, ROWS),
    exact: bool = True,
    order: str = "W0 W1",
    at_once: int = 0,
) -> None:
    """Splits two micro-batches, and compares with the compiled unsplit backward; no weight of two or more dimensions
    but ``at_once`` has its gradient before W."""
    xs = [torch.randn(n, WIDTH, requires_grad=needs_gradient) for n in rows]
    wanted = unsplit(start(build, how, backend), call, xs)
    found = split(start(build, how, backend), call, xs, order)
    assert found.in_input == at_once
    equal = same if exact else torch.testing.assert_close
    for one, other in (
        (found.outputs, wanted.outputs),
        (found.inputs, wanted.inputs),
        (found.gradients, wanted.gradients),
        (found.buffers, wanted.buffers),
    ):
        equal(one, other)
    if order == "W0 W1":
        equal(found.heard, wanted.heard)


def step(splitter: Splitter, module: nn.Module, x: Tensor) -> None:
    with splitter.record() as tape:
        y = module(x)
    tape.backward_input([y], [torch.ones_like(y)], [x])
    tape.backward_weight()
