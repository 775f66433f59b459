"""Random modules of parts of every kind, in random regimes, split in a random order and not split at all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from module_kinds import KINDS, ROWS, TOKENS, WIDTH
from regimes import REGIMES, Heard, Micro, bits, digest, listen
from torch import Tensor, nn

from pipex.backward import Splitter

GLUE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as it is": lambda x, y: y,
    "tanh": lambda x, y: y.tanh(),
    "residual": lambda x, y: x + y,
    "relu in place": lambda x, y: y.relu_(),
    "doubled in place": lambda x, y: y.mul_(2),
    "added to in place": lambda x, y: y.add_(x),
    "part in place": lambda x, y: (y[:, 1:].zero_(), y)[1],
    "transposed memory": lambda x, y: y.transpose(1, 2).contiguous().transpose(1, 2),
    "twice": lambda x, y: y + y,
    "in part": lambda x, y: torch.cat((y[:, :2], x[:, 2:]), 1),
    "not at all": lambda x, y: x + y.detach(),
    "without gradient": lambda x, y: (y.detach() + x.detach()).requires_grad_(),
    "as float32": lambda x, y: y.float(),
    "gated": lambda x, y: x * y.sigmoid(),
}
"""How the output of a part is taken up: of its input and its output."""

TIMES = (1, 1, 1, 2)


class Glued(nn.Module):
    def __init__(self, part: nn.Module, glue: tuple[str, ...]) -> None:
        super().__init__()
        self.part, self.glue = part, glue

    def forward(self, x: Tensor) -> Tensor:
        for name in self.glue:  # as often, the part is used
            x = GLUE[name](x, self.part(x))
        return x


class Penalized(nn.Module):
    """Adds something to the output that a parameter is used for directly."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + 0.1 * self.inner.get_parameter(self.name).square().mean().to(y.dtype)


@dataclass(frozen=True)
class Drawn:
    """A module and how it is trained, by its seed."""

    seed: int
    regime: str
    parts: tuple[tuple[str, tuple[str, ...], str], ...]  # kind, glue, and the regime within
    tied: tuple[tuple[int, int], ...]  # of the square matrices, by their number: this one is that one
    frozen: float
    hooked: float
    hook_factor: float
    penalized: bool
    double: bool
    needs_gradient: bool
    order: tuple[tuple[str, int], ...]
    functions: bool
    steps: int = 2

    def build(self) -> nn.Module:
        """The same on every call."""
        torch.manual_seed(self.seed)
        chance = random.Random(self.seed)
        parts = [InRegime(Glued(KINDS[kind](), glue), regime) for kind, glue, regime in self.parts]
        module: nn.Module = nn.Sequential(*parts)
        squares = [(m, n) for m in module.modules() for n, p in m._parameters.items() if p is not None and is_square(p)]
        for one, other in self.tied:
            if squares:
                (m, n), (m2, n2) = squares[one % len(squares)], squares[other % len(squares)]
                m._parameters[n] = m2._parameters[n2]
        for parameter in module.parameters():
            if chance.random() < self.frozen:
                parameter.requires_grad_(False)
        if self.penalized:
            name = chance.choice([name for name, _ in module.named_parameters()])
            module = Penalized(module, name)
        return module.double() if self.double else module

    def hooks(self, module: nn.Module) -> Heard:
        chance = random.Random(self.seed)
        trained = [n for n, p in module.named_parameters() if p.requires_grad]
        return listen(module, [n for n in trained if chance.random() < self.hooked], self.hook_factor)


class InRegime(nn.Module):
    def __init__(self, part: nn.Module, regime: str) -> None:
        super().__init__()
        self.part, self.regime = part, regime

    def forward(self, x: Tensor) -> Tensor:
        return REGIMES[self.regime](self.part, x)


def is_square(parameter: Tensor) -> bool:
    return parameter.shape == (WIDTH, WIDTH)


def draw(seed: int) -> Drawn:
    chance = random.Random(seed)
    regimes = list(REGIMES)
    inner = chance.random() < 0.3
    parts = tuple(
        (
            chance.choice(list(KINDS)),
            tuple(chance.choices(list(GLUE), k=chance.choice(TIMES))),
            chance.choice(regimes) if inner else "plain",
        )
        for _ in range(chance.choice((1, 1, 2, 2, 3, 4)))
    )
    micro_batches = chance.choice((1, 2, 3))
    return Drawn(
        seed,
        chance.choice(("plain", "plain", *regimes)),
        parts,
        tuple((chance.randrange(8), chance.randrange(8)) for _ in range(chance.choice((0, 0, 1, 2)))),
        frozen=chance.choice((0, 0, 0, 0.3)),
        hooked=chance.choice((0, 0, 0.3, 1)),
        hook_factor=chance.choice((1.0, 0.5)),
        penalized=chance.random() < 0.15,
        double=chance.random() < 0.1,
        needs_gradient=chance.random() < 0.8,
        order=tuple(draw_order(chance, micro_batches)),
        functions=chance.random() < 0.3,
    )


def draw_order(chance: random.Random, micro_batches: int) -> Iterator[tuple[str, int]]:
    """F, I and W of every micro-batch, each kind in rising order, or B in place of I and W where no W waits."""
    done = dict.fromkeys("FIW", 0)
    while done["W"] < micro_batches:
        possible = [
            kind for kind, most in (("F", micro_batches), ("I", done["F"]), ("W", done["I"])) if done[kind] < most
        ]
        kind = chance.choice(possible)
        if kind == "I" and done["I"] == done["W"] and chance.random() < 0.2:
            yield "B", done["I"]
            done["I"] += 1
            done["W"] += 1
        else:
            yield kind, done[kind]
            done[kind] += 1


def whole(drawn: Drawn) -> Iterator[dict[str, Any]]:
    """By autograd, micro-batch by micro-batch; what can be compared, after every step."""
    module = drawn.build()
    heard = drawn.hooks(module)
    for step in range(drawn.steps):
        found: dict[str, Any] = {}
        for kind, number in drawn.order:
            if kind in "WB":  # the order in which gradients are added
                x, dy = data(drawn, step, number)
                y = REGIMES[drawn.regime](module, x)
                y.backward(dy.to(y.dtype))
                found[f"output {number}"], found[f"input {number}"] = digest(y), digest(x.grad)
        yield found | {"gradients": bits(module), "heard": dict(heard), VALUES: values(module)}
        heard.clear()
        update(module)


def split(drawn: Drawn) -> Iterator[dict[str, Any]]:
    """The same by I and W, in the drawn order."""
    module = drawn.build()
    heard = drawn.hooks(module)
    splitter = Splitter.of(module)
    for step in range(drawn.steps):
        found: dict[str, Any] = {}
        micros: dict[int, Micro] = {}
        for kind, number in drawn.order:
            x, dy = data(drawn, step, number)
            if kind == "F":
                micros[number] = micro = Micro(splitter, REGIMES[drawn.regime], module, x, functions=drawn.functions)
                found[f"output {number}"] = digest(micro.y)
            elif kind in "IB":
                micro = micros[number]
                found[f"input {number}"] = digest(micro.input(dy.to(micro.y.dtype)))
            if kind in "WB":
                micros.pop(number).weight()
        yield found | {"gradients": bits(module), "heard": dict(heard), VALUES: values(module)}
        heard.clear()
        update(module)


def data(drawn: Drawn, step: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(drawn.seed * 100 + step * 10 + number)
    x, dy = torch.randn(2, ROWS, TOKENS, WIDTH, generator=generator, dtype=torch.float64 if drawn.double else None)
    return x.clone().requires_grad_(drawn.needs_gradient), dy.clone()


def update(module: nn.Module) -> None:
    """Gradients to None and values changed in place, as an optimizer does."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.grad = None
            parameter.mul_(0.9)


VALUES = "values"
"""Of gradients, for ``error``."""


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def rounding(drawn: Drawn) -> float:
    """By how much gradients may differ where a parameter may be used both in recorded operations and in others, within
    what a weight is made by or in a penalty."""
    regimes = {drawn.regime, *(regime for _, _, regime in drawn.parts)}
    if any("autocast" in regime for regime in regimes):
        return 2**-8 if drawn.tied or drawn.penalized else 0
    return 2**-22 if drawn.penalized else 0


def error(drawn: Drawn) -> float:
    """The largest distance of a gradient from autograd's, relative to its norm."""
    pairs = [
        (theirs, ours[VALUES][name])
        for step, ours in zip(whole(drawn), split(drawn), strict=True)
        for name, theirs in step[VALUES].items()
    ]
    return max(float((a.double() - b.double()).norm() / (a.double().norm() + 1e-30)) for a, b in pairs)


def differences(drawn: Drawn) -> list[str] | None:
    """What differs between the two; None where torch itself refuses.

    Raises:
        UnsupportedModule: the split is refused.
    """
    try:
        expected = list(whole(drawn))
    except (RuntimeError, NotImplementedError, IndexError):
        return None
    found = list(split(drawn))
    return [
        f"step {step} {what}: {their} in place of {our}"
        for step, (e, f) in enumerate(zip(expected, found, strict=True), 1)
        for what, our, their in _pairs(e, f)
    ]


def _pairs(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in (expected.keys() | found.keys()) - {VALUES}:
        our, their = expected.get(key), found.get(key)
        if isinstance(our, dict) and isinstance(their, dict):
            yield from ((f"{key} {k}", our.get(k), their.get(k)) for k in our.keys() | their.keys()
                        if our.get(k) != their.get(k))  # fmt: skip
        elif our != their:
            yield key, our, their
