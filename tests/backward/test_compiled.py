"""Compiled stages and parts of stages: their weight gradients wait, and are those of the compiled unsplit backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from regimes import Call, bf16, checkpointed, plain, within
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipex.backward import Splitter, Tape

WIDTH, ROWS = 16, 6

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks at it
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # inductor, when it is imported
]


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.register_hook(lambda g, name=name: found.heard.setdefault(name, []).append(g.clone()))  # type: ignore[misc]


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
    """Splits two micro-batches, and compares with the compiled unsplit backward; no weight of two or more dimensions but
    ``at_once`` has its gradient before W."""
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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("how", [whole, wrapped, each, first])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_weight_gradients_wait(how: Any, backend: str, needs_gradient: bool) -> None:
    check(how=how, backend=backend, needs_gradient=needs_gradient)


def in_turn(module: nn.Module, x: Tensor) -> Tensor:
    """Every child under a checkpoint of its own."""
    for child in module.children():
        x = checkpoint(child, x, use_reentrant=False)
    return x


class Checkpointing(nn.Module):
    """Parts under checkpoints, within what is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False)
        return x


class Autocasting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = blocks()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


class Broken(nn.Module):
    """The compiler gives up in between, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        torch._dynamo.graph_break()
        return self.two(x)


class Tied(nn.Module):
    """One weight, twice in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.other(torch.tanh(self.one(x)))))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(-1, 1, 4, 4)).flatten(1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, WIDTH), nn.Embedding(ROWS, WIDTH)
        self.out = nn.Linear(WIDTH, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        words = self.words((x.detach()[:, 0] * 5).long() % 11) + self.places(torch.arange(ROWS))
        return self.out(torch.tanh(words))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def frozen() -> nn.Module:
    module = blocks()
    module[0].up.weight.requires_grad_(False)  # type: ignore[index,union-attr]
    module[1].down.requires_grad_(False)  # type: ignore[index,union-attr]
    return module


def mixed_with_eager() -> nn.Module:
    """Plain layers around two that are compiled."""
    layers = [nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*layers)


def only_blocks(module: nn.Module, backend: str) -> nn.Module:
    for child in module.children():
        if isinstance(child, Block):
            child.compile(backend=backend)
    return module


def tied_over_layers() -> nn.Module:
    """A weight of two compiled layers and of one that is not."""
    module = mixed_with_eager()
    one, two, linear = module[1], module[3], module[2]
    two.up.weight = one.up.weight  # type: ignore[union-attr]
    linear.weight = module[0].weight
    two.norm.weight = one.norm.weight  # type: ignore[union-attr]
    return module


STAGES: dict[str, dict[str, Any]] = {
    "W in the other order": {"order": "W1 W0"},
    "bf16 autocast around": {"call": bf16},
    "bf16 autocast around each": {"call": bf16, "how": each},
    "bf16 autocast within": {"build": Autocasting},
    "within a checkpoint": {"call": checkpointed},
    "each within a checkpoint": {"call": in_turn, "how": each},
    "within a checkpoint, under autocast": {"call": within(bf16, checkpointed), "how": each},
    "a checkpoint within": {"build": Checkpointing},
    "graph breaks": {"build": Broken},
    "graph breaks in a checkpoint": {"build": Broken, "call": checkpointed},
    "tied": {"build": Tied},
    "frozen": {"build": frozen},
    "images": {"build": Images},
    "words": {"build": Words, "needs_gradient": False},
    "plain layers between": {"build": mixed_with_eager, "how": only_blocks},
    "tied over layers": {"build": tied_over_layers, "how": only_blocks},
    "micro-batches of other sizes": {"rows": (6, 9)},
    "micro-batches of other sizes, each": {"rows": (6, 9), "how": each, "call": in_turn},
}


@pytest.mark.parametrize("name", STAGES)
def test_in_regimes(name: str) -> None:
    check(**STAGES[name])


@pytest.mark.parametrize("name", STAGES)
def test_in_regimes_of_inductor(name: str) -> None:
    check(**STAGES[name], backend="inductor")
