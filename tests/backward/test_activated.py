"""Linear layers on activations whose gradient is made with the product's: torch makes it here, as Triton would."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import run_functions, run_split

from pipex.backward import Splitter, activated, products, stage_backward_input
from pipex.backward.choice import TORCH, TRITON
from pipex.errors import UnsupportedModule


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The gradients that were made in a product, by the name of the activation; all that can be are."""
    made: list[str] = []
    one, two = products.input_gradient, products.swiglu_input_gradient

    def note_one(dy: Tensor, weight: Tensor, *, activation: str, z: Tensor) -> Tensor:
        made.append(activation)
        return one(dy, weight, activation=activation, z=z)

    def note_two(*operands: Tensor) -> tuple[Tensor, Tensor]:
        made.append("swiglu")
        return two(*operands)

    monkeypatch.setattr(products, "input_gradient", note_one)
    monkeypatch.setattr(products, "swiglu_input_gradient", note_two)
    monkeypatch.setattr(activated, "provider", lambda *_: TRITON)
    monkeypatch.setattr(products, "provider", lambda *_: TORCH)
    return made


class Mlp(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=bias), nn.Linear(8, 5, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Gated(nn.Module):
    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(6, 16, bias=False), nn.Linear(8, 5, bias=False)
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(up * F.silu(gate) if self.swapped else F.silu(gate) * up)


class TwoReaders(Mlp):
    """The activation's output goes past the layer too."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        return self.down(h) + h[..., :5] ** 2


class InPlaceAfter(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mul_(2).relu_()


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


MODULES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "gelu": (lambda: Mlp(F.gelu), ["gelu"]),
    "gelu_tanh": (lambda: Mlp(gelu_tanh), ["gelu_tanh"]),
    "silu": (lambda: Mlp(F.silu, bias=False), ["silu"]),
    "swiglu": (Gated, ["swiglu"]),
    "two readers": (lambda: TwoReaders(F.gelu), ["gelu"]),
    "in place after": (lambda: InPlaceAfter(F.gelu), ["gelu"]),
    "another order of the factors": (lambda: Gated(swapped=True), []),
    "no activation": (lambda: Mlp(lambda x: x), []),
    "relu": (lambda: Mlp(F.relu), []),
    "a product of others": (lambda: Mlp(lambda x: F.gelu(x) * x), []),
    "broadcast": (lambda: Mlp(lambda x: F.silu(x) * x[..., :1]), []),
    "dropout of nothing between": (lambda: Mlp(lambda x: F.dropout(F.gelu(x), 0.0)), ["gelu"]),
    "scaled": (lambda: Mlp(lambda x: F.silu(x) * 1.5), []),
    "gated by a constant": (lambda: Mlp(lambda x: F.silu(x) * torch.ones_like(x)), []),
    "frozen weight": (lambda: frozen(Mlp(F.gelu), "weight"), []),
    "frozen bias": (lambda: frozen(Mlp(F.gelu), "bias"), []),
}


def frozen(module: Mlp, name: str) -> Mlp:
    module.down.get_parameter(name).requires_grad_(False)
    return module


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (0, 6), (0, 3, 6), (2, 1, 3, 6)])
@pytest.mark.parametrize("case", MODULES)
def test_gradients_are_autograds(case: str, shape: tuple[int, ...], asked: list[str]) -> None:
    build, wanted = MODULES[case]
    torch.manual_seed(0)
    module = build().double()
    reference = copy.deepcopy(module)
    splitter = Splitter(module.parameters(), exact=False)
    for _ in range(3):
        asked.clear()
        x = torch.randn(shape, dtype=torch.float64)
        its_x, x = x.clone().requires_grad_(), x.requires_grad_()
        y = reference(its_x)
        dy = torch.randn_like(y)
        y.backward(dy)
        ours, dx = run_split(module, x, dy, splitter)
        assert asked == wanted
        torch.testing.assert_close(ours, y)
        torch.testing.assert_close(dx, its_x.grad)
    for (name, p), q in zip(module.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, msg=name)


def test_a_gradient_of_repeated_rows(asked: list[str]) -> None:
    module = Mlp(F.gelu).double()
    reference = copy.deepcopy(module)
    x = torch.randn(3, 6, dtype=torch.float64)
    reference(x).sum().backward()
    with Splitter(module.parameters(), exact=False).record() as tape:
        y = module(x).sum()
    tape.backward_input([y], [None], [])
    tape.backward_weight()
    assert asked == ["gelu"]
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_functions_with_torchs_signatures(asked: list[str]) -> None:
    module = Mlp(F.gelu).double()
    reference = copy.deepcopy(module)
    x, dy = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    its_x = x.clone().requires_grad_()
    reference(its_x).backward(dy)
    _, dx = run_functions(module, x.requires_grad_(), dy, Splitter(module.parameters(), exact=False))
    assert asked == ["gelu"]
    torch.testing.assert_close(dx, its_x.grad)
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_exact_stages_are_left_to_autograd(asked: list[str]) -> None:
    module = Mlp(F.gelu)
    run_split(module, torch.randn(3, 6, requires_grad=True), torch.randn(3, 5), Splitter(module.parameters()))
    assert asked == []


@pytest.mark.parametrize("way", ["hook", "retain"])
def test_whoever_waits_for_the_activations_gradient_gets_it(way: str, asked: list[str]) -> None:
    seen: list[Tensor] = []

    def act(z: Tensor) -> Tensor:
        h = F.gelu(z)
        if way == "hook":
            h.register_hook(seen.append)
        else:
            h.retain_grad()
            seen.append(h)
        return h

    module = Mlp(act)
    run_split(module, torch.randn(3, 6), torch.randn(3, 5), Splitter(module.parameters(), exact=False))
    assert asked == []
    assert len(seen) == 1
    assert way == "hook" or seen[0].grad is not None


@pytest.mark.usefixtures("asked")
def test_whoever_asks_for_it_too_late_is_told() -> None:
    class Late(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.up(x))
            y = self.down(h)
            h.register_hook(print)
            return y

    module = Late(F.gelu)
    with pytest.raises(UnsupportedModule, match="before the linear layer runs"):
        run_split(module, torch.randn(3, 6), torch.randn(3, 5), Splitter(module.parameters(), exact=False))


@pytest.mark.usefixtures("asked")
def test_an_input_changed_in_place_is_refused_as_by_autograd() -> None:
    class Changed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            z = self.up(x)
            h = self.act(z)
            y = self.down(h)
            z.add_(1)
            return y

    module = Changed(F.gelu)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run_split(module, torch.randn(3, 6), torch.randn(3, 5), Splitter(module.parameters(), exact=False))


def test_nothing_of_the_graph_outlives_i(asked: list[str]) -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Watched(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            z = self.up(x)
            kept.append(weakref.ref(z))
            return self.down(self.act(z))

    module = Watched(F.gelu)
    with Splitter(module.parameters(), exact=False).record() as tape:
        y = module(torch.randn(3, 6))
    tape.backward_input([y], [torch.randn(3, 5)], [])
    del y
    gc.collect()
    assert asked == ["gelu"]
    assert kept[0]() is None
    tape.backward_weight()


class ActivationAsOutput(nn.Module):
    """The pass begins at the activation's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.up(x))
        return self.down(h), h


def test_an_activation_that_the_stage_returns_too(asked: list[str]) -> None:
    module = ActivationAsOutput().double()
    reference = copy.deepcopy(module)
    x = torch.randn(3, 6, dtype=torch.float64)
    gradients = [torch.randn(3, n, dtype=torch.float64) for n in (5, 8)]
    torch.autograd.backward(reference(x), gradients)
    with Splitter(module.parameters(), exact=False).record() as tape:
        outputs = module(x)
    tape.backward_input(outputs, gradients, [])
    tape.backward_weight()
    assert asked == ["gelu"]
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("of", ["gelu", "silu", "swiglu", "swiglu's silu"])
def test_hooks_on_the_activations_node_run(of: str) -> None:
    """As Module.register_backward_hook puts them there."""
    calls: list[int] = []

    class Watched(Gated):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.both(x).chunk(2, -1)
            silu = F.silu(gate)
            h = {"gelu": F.gelu(gate), "silu": silu}.get(of, silu * up)
            (silu if of == "swiglu's silu" else h).grad_fn.register_hook(lambda *_: calls.append(1))
            return self.down(h)

    module = Watched()
    run_split(module, torch.randn(3, 6), torch.randn(3, 5), Splitter(module.parameters(), exact=False))
    assert calls == [1]


@pytest.mark.usefixtures("asked")
def test_whoever_asks_too_late_for_the_gradient_within_swiglu_is_told() -> None:
    class Late(Gated):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.both(x).chunk(2, -1)
            silu = F.silu(gate)
            y = self.down(silu * up)
            silu.register_hook(print)
            return y

    module = Late()
    with pytest.raises(UnsupportedModule, match="before the linear layer runs"):
        run_split(module, torch.randn(3, 6), torch.randn(3, 5), Splitter(module.parameters(), exact=False))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_an_activation_made_before_the_stage_gets_its_gradient(asked: list[str]) -> None:
    layer = nn.Linear(8, 5)
    x = F.gelu(torch.randn(3, 8, requires_grad=True))
    with Splitter(layer.parameters(), exact=False).record():
        y = layer(x)
    dy = torch.randn(3, 5)
    (found,), _ = stage_backward_input([y], [dy], [x], layer.parameters())
    assert asked == []
    torch.testing.assert_close(found, dy @ layer.weight)


def test_an_activation_under_a_checkpoint_is_not_computed_in_the_forward(asked: list[str]) -> None:
    runs: list[int] = []

    class Checkpointed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            def region(x: Tensor) -> Tensor:
                runs.append(1)
                return self.act(self.up(x))

            y = self.down(checkpoint(region, x, use_reentrant=False))
            assert runs == [1]
            return y

    module = Checkpointed(F.gelu)
    run_split(module, torch.randn(3, 6), torch.randn(3, 5), Splitter(module.parameters(), exact=False))
    assert asked == []
