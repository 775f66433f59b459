"""Compiled stages and parts of stages: their weight gradients wait, and are those of the compiled unsplit backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_stages import (
    ROWS,
    WIDTH,
    Block,
    blocks,
    check,
    each,
    first,
    same,
    start,
    step,
    whole,
    wrapped,
)  # fmt: skip
from regimes import bf16, checkpointed, plain, shares, within
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipex.backward import Splitter

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks at it
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # inductor, when it is imported
]


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
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


class Biased(nn.Module):
    """Two parameters have one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(WIDTH)) for _ in range(2))
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight) + self.one + self.two


class Placed(nn.Module):
    """Two parameters have the output's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(ROWS, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one + self.two


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
        self.words, self.places = nn.Embedding(11, WIDTH), nn.Embedding(12, WIDTH)
        self.out = nn.Linear(WIDTH, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        words = self.words((x.detach()[:, 0] * 5).long() % 11) + self.places(torch.arange(x.shape[0]))
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
    "one gradient of two parameters": {"build": Biased},
    "frozen": {"build": frozen},
    "images": {"build": Images},
    "words": {"build": Words, "needs_gradient": False},
    "plain layers between": {"build": mixed_with_eager, "how": only_blocks},
    "tied over layers": {"build": tied_over_layers, "how": only_blocks},
    "micro-batches of other sizes": {"rows": (6, 9)},
    "micro-batches of other sizes, each": {"rows": (6, 9), "how": each, "call": in_turn},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build", [blocks, Tied, Images, Checkpointing, Autocasting])
def test_products_of_weight_gradients_are_made_in_w(build: Callable[[], nn.Module], backend: str) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    found = shares(lambda: whole(build(), backend), plain, x, warm_up=True)
    assert found.in_input + found.in_weight == found.whole, "nothing is computed twice"
    assert found.whole > found.for_inputs, "something is counted"
    assert found.deferred == 1


def test_parameters_with_one_gradient_have_their_own_memory() -> None:
    """Also where no hook waits for it."""
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    module, wanted = start(Placed, whole, "aot_eager"), start(Placed, lambda module, _: module, "")
    splitter = Splitter.of(module)
    for _ in range(3):
        wanted(x).sum().backward()
        step(splitter, module, x)
    same([p.grad for p in module.parameters()], [p.grad for p in wanted.parameters()])


def test_a_graph_that_is_cut_is_right_without_a_tape() -> None:
    """It uses nothing by which the compiler would know whether there is one."""
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    module, wanted = start(Placed, whole, "aot_eager"), start(Placed, lambda module, _: module, "")
    step(Splitter.of(module), module, x)
    module.zero_grad()
    same(torch.autograd.grad(module(x).square().sum(), x), torch.autograd.grad(wanted(x).square().sum(), x))
    module(x).square().sum().backward()
    wanted(x).square().sum().backward()
    same([p.grad for p in module.parameters()], [p.grad for p in wanted.parameters()])


@pytest.mark.parametrize("name", STAGES)
def test_in_regimes(name: str) -> None:
    check(**STAGES[name])


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_in_regimes_of_inductor(name: str) -> None:
    check(**STAGES[name], backend="inductor")


class Ends(nn.Module):
    """Outputs of many kinds: of which some have no gradient, that are views of inputs, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.one(x)
        return y, self.two(y), self.three(y).argmax(-1), x.t(), self.two.weight, self.three.weight.t(), y.view(-1), 3


def of_ends(module: nn.Module, x: Tensor) -> Tensor:
    y, z, index, turned, weight, other, flat, three = module(x)
    return (y * index[:, None]).sum() + turned.sum() + (weight + other).square().sum() + flat.sum() * three + z[0].sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_of_many_kinds(backend: str) -> None:
    """Parameters that are outputs have a graph of their own outside, and autograd sums what comes to them."""
    torch._dynamo.reset()
    check(Ends, call=of_ends, backend=backend, at_once=1)


def test_some_outputs_without_a_gradient() -> None:
    check(Ends, call=lambda module, x: module(x)[1])


def test_dropout_draws_what_it_draws_unsplit() -> None:
    """A dropout's mask is drawn in the forward."""

    def call(module: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return module(x)

    check(Dropping, call=call)
    check(Dropping, call=call, backend="inductor")
    check(Dropping, call=lambda module, x: checkpointed(module, x), how=each)


def test_sizes_that_were_said_to_change() -> None:
    def call(module: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 0)
        return module(x)

    for backend in ("aot_eager", "inductor"):
        check(call=call, rows=(6, 9), backend=backend)
        check(build=Words, call=call, rows=(6, 9), backend=backend, needs_gradient=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_penalty_outside_of_what_is_compiled(backend: str) -> None:
    """Gradients of one parameter come in the order of autograd; from the second step on all of them in I."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).square().mean() + module[0].up.weight.square().sum()  # type: ignore[index,union-attr]

    xs = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(3)]
    wanted, module = start(blocks, whole, backend), start(blocks, whole, backend)
    splitter = Splitter.of(module)
    for turn, x in enumerate(xs):
        loss(wanted, x).backward()
        module.zero_grad()
        before = [p.grad for p in module.parameters()]
        with splitter.record() as tape:
            y = loss(module, x)
        tape.backward_input([y], [None], [x])
        early = {name for name, p in module.named_parameters() if p.grad is not None}
        assert before == [None] * 12
        assert early == (set() if turn == 0 else {"0.up.weight"})
        tape.backward_weight()
        same([p.grad for p in module.parameters()], [p.grad for p in wanted.parameters()])
        wanted.zero_grad()


def test_what_is_compiled_without_a_tape_stays_so() -> None:
    """Once each with and without a tape, and for an evaluation; then never again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = blocks()
    module.compile(backend=counter)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    splitter = Splitter.of(module)

    def plainly() -> None:
        module(x).sum().backward()

    def evaluate() -> None:
        with torch.no_grad():
            module(x)

    for _ in range(3):
        plainly()
        step(splitter, module, x)
        evaluate()
        step(splitter, module, x)
    assert counter.frame_count == 3


def test_what_was_compiled_before_waits_too() -> None:
    module = whole(blocks(), "aot_eager")
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    module(x).sum().backward()
    module.zero_grad()
    splitter = Splitter.of(module)
    with splitter.record() as tape:
        y = module(x)
    tape.backward_input([y], [torch.ones_like(y)], [x])
    assert all(p.grad is None for p in module.parameters())
    tape.backward_weight()
    assert all(p.grad is not None for p in module.parameters())


def test_a_sequence_that_the_compiler_skips_is_recorded_as_any_other() -> None:
    """It compiles nothing that is torch's own, nor what stands in its place."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def build() -> nn.Module:
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Conv1d(1, 1, 3))
        module.compile(backend=counter)
        return module

    check(build, how=lambda module, _: module, call=lambda module, x: module(x[:, None])[:, 0])
    assert counter.frame_count == 0


def test_two_passes_over_one_forward() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    reference = start(blocks, lambda module, _: module, "")
    module = start(blocks, whole, "inductor")
    y = reference(x)
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    with Splitter.of(module).record(lambda tape: tape.backward_weight()) as _:
        y = module(x)
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], [p.grad for p in reference.parameters()])
