"""What layers cost: sizes against their formulas, times on a clock that the layers move themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_kinds import WIDTH, opaque
from torch import Tensor, nn

from pipex.backward import Tape
from pipex.errors import InputError, UnsupportedModule
from pipex.partition import profile as module
from pipex.partition import profile_layers, profile_split
from pipex.partition.profile import WARM_UP


class Pair(nn.Module):
    """Takes and returns two tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) + carry, carry * 2


class Model(nn.Module):
    """A bit of everything: integer input, tied weights, buffers, dropout, in-place operations, a frozen layer."""

    pipeline_layers = ("embed", "body", "head")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        frozen = nn.Linear(6, 6).requires_grad_(False)
        self.body = nn.Sequential(
            nn.Linear(6, 6), nn.ReLU(inplace=True), nn.BatchNorm1d(6), nn.Dropout(0.5), frozen, nn.Tanh()
        )
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def mean(output: Any, target: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output).mean()


def test_layers_are_called_as_in_the_model() -> None:
    costs = profile_layers(Model(), torch.randint(11, (8,)), torch.randint(11, (8,)), cross_entropy, passes=1)
    assert [layer.name for layer in costs.layers] == ["embed", *(f"body.{i}" for i in range(6)), "head"]
    assert "int64[8]" in costs.about
    assert "cpu, 1 thread," in costs.about
    shared = nn.Linear(3, 3)
    twice = profile_layers(nn.Sequential(shared, nn.Tanh(), shared), torch.randn(2, 3), 0, mean, passes=1)
    assert [layer.name for layer in twice.layers] == ["0", "1", "0"]


def test_bytes_are_those_of_the_formulas() -> None:
    """float32: 4 bytes each; 5 samples."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3, bias=False))
    first, tanh, last = profile_layers(model, torch.randn(5, 8), torch.randn(5, 3), F.mse_loss, passes=1).layers
    x, h, y = 5 * 8 * 4, 5 * 16 * 4, 5 * 3 * 4
    assert (first.parameters, first.output) == ((8 * 16 + 16) * 4, h)
    assert first.activation == x
    assert first.deferred == x + h  # its input, and the gradient of its output
    assert (tanh.parameters, tanh.output, tanh.deferred) == (0, h, 0)
    assert tanh.activation == h  # counted as its input; its output, which it saves, is the next layer's input
    assert last.parameters == 3 * 16 * 4
    assert last.activation == h + 2 * y  # the input, and what the loss saves: its input and the target
    assert last.deferred == h + y


def test_half_precision_and_integers_have_their_own_sizes() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    costs = profile_layers(model, torch.randint(10, (3,)), None, mean, passes=1)
    embed, _ = costs.layers
    assert (embed.parameters, embed.output, embed.activation) == (10 * 4 * 2, 3 * 4 * 2, 3 * 8)


def test_a_slice_of_a_batch_counts_as_itself() -> None:
    batch = torch.randn(100, 8)
    costs = profile_layers(nn.Sequential(nn.Linear(8, 2)), batch[10:15], torch.randn(5, 2), F.mse_loss, passes=1)
    assert costs.layers[0].deferred == 5 * 8 * 4 + 5 * 2 * 4


class Ticks:
    """Stands for ``perf_counter``: time passes only where ``pass_`` says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


TICKS = Ticks()


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_takes = backward
        TICKS.now += forward
        return x * 1

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        TICKS.now += ctx.backward_takes
        return dy, None, None


class Slow(nn.Module):
    """Takes as long as it is told; the n-th forward takes n-th of ``more`` in addition."""

    def __init__(self, forward: float, backward: float, more: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.times = forward, backward
        self.more = list(more)

    def forward(self, x: Tensor) -> Tensor:
        forward, backward = self.times
        result: Tensor = _Slow.apply(self.linear(x), forward + (self.more.pop(0) if self.more else 0.0), backward)
        return result


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    monkeypatch.setattr(module, "perf_counter", TICKS)
    return TICKS


def test_times_go_to_their_layers_and_the_loss_to_the_last(ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        slow: Tensor = _Slow.apply(output, 64.0, 128.0)
        return (slow - target).square().mean()

    weight = Tape.backward_weight

    def slow_weight(tape: Tape) -> None:
        ticks.now += sum(use.weight.numel() for use, _, _ in tape._uses)
        weight(tape)

    monkeypatch.setattr(Tape, "backward_weight", slow_weight)
    model = nn.Sequential(Slow(1.0, 2.0), Slow(4.0, 8.0), nn.Linear(2, 3), nn.Linear(3, 1))
    costs = profile_layers(model, torch.randn(4, 2), torch.randn(4, 1), loss_fn, passes=2)
    assert [layer.forward for layer in costs.layers] == [1, 4, 0, 64]
    assert [layer.input_gradient for layer in costs.layers] == [2, 8, 0, 128]
    assert [layer.weight_gradient for layer in costs.layers] == [4, 4, 6, 3]


def test_what_a_split_does_to_a_layer_is_measured_beside_whole_backwards(ticks: Ticks) -> None:
    """Of the layer in the middle the weight's gradient is made wherever autograd comes by; the last one has none."""
    model = nn.Sequential(Slow(1.0, 2.0), opaque(), Slow(4.0, 8.0), nn.Tanh())
    model[0].linear, model[2].linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    x = torch.randn(4, 5, WIDTH)
    costs, splits = profile_split(model, x, x, F.mse_loss, passes=3)
    assert [(split.waiting, split.weights) for split in splits] == [(64, 64), (0, 64), (64, 64), (0, 0)]
    assert [split.whole for split in splits] == [2, 0, 8, 0]
    assert [layer.input_gradient for layer in costs.layers] == [2, 0, 8, 0]


def test_disturbed_passes_and_the_first_ones_do_not_count(ticks: Ticks) -> None:
    forwards = 2 + WARM_UP  # two to find the sizes
    model = nn.Sequential(Slow(1.0, 0.0, more=(-1.0,) * forwards + (9.0, 2.0, 7.0)))
    costs = profile_layers(model, torch.randn(4, 2), torch.randn(4, 2), F.mse_loss, passes=3)
    assert costs.layers[0].forward == 3.0


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "objects": {name: id(value) for name, value in model.state_dict(keep_vars=True).items()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "modes": [part.training for part in model.modules()],
        "frozen": [p.requires_grad for p in model.parameters()],
        "random": torch.get_rng_state(),
        "functions": (F.linear, F.embedding),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_everything_stays_as_it_is_found(fails: bool) -> None:
    model = Model()
    model.body[4].eval()
    model.embed.weight.grad = torch.ones(11, 6)
    called: list[Tensor] = []
    model.embed.weight.register_post_accumulate_grad_hook(called.append)
    tokens = torch.randint(11, (8,))
    kept = tokens.clone()
    before = state_of(model)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return output if fails else F.cross_entropy(output, target)

    def measure() -> None:
        profile_layers(model, tokens, tokens, loss_fn, passes=2)

    if fails:
        with pytest.raises(InputError, match=r"the loss function must return a loss; got \(8, 11\)"):
            measure()
    else:
        measure()
    after = state_of(model)
    assert all(torch.equal(after["values"][name], value) for name, value in before.pop("values").items())
    assert torch.equal(after["random"], before.pop("random"))
    assert after["gradients"]["embed.weight"] is before["gradients"]["embed.weight"]
    assert torch.equal(after["gradients"]["embed.weight"], torch.ones(11, 6))
    for name in ("objects", "modes", "frozen", "functions"):
        assert after[name] == before[name], name
    assert called == []
    assert torch.equal(tokens, kept)


def test_layers_run_in_the_mode_in_which_they_are_found_and_with_gradients_where_a_stage_has_them() -> None:
    seen: list[tuple[bool, bool]] = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, x.requires_grad))
            return super().forward(x)

    model = nn.Sequential(Spy(2, 2), Spy(2, 2).eval())
    with torch.no_grad():
        costs = profile_layers(model, torch.randn(3, 2), 0, mean, passes=1)
    assert set(seen[::2]) == {(True, False)}  # the model's input is data
    assert set(seen[1::2]) == {(False, True)}
    assert all(layer.deferred > 0 for layer in costs.layers)


def test_an_input_that_a_layer_ignores_has_a_gradient_of_zeros() -> None:
    class Ignore(nn.Module):
        def forward(self, x: Tensor, carry: Tensor) -> Tensor:
            return x * 2

    model = nn.Sequential(Pair(4), Pair(4), Ignore(), nn.Linear(4, 1))
    costs = profile_layers(model, (torch.randn(2, 4), torch.randn(2, 4)), 0, mean, passes=1)
    assert [layer.deferred for layer in costs.layers] == [64, 64, 0, 32 + 8]


def test_tuples_are_passed_on_and_come_back_as_gradients(ticks: Ticks) -> None:
    model = nn.Sequential(Pair(4), Pair(4), Pair(4))
    costs = profile_layers(model, (torch.randn(2, 4), torch.randn(2, 4)), None, mean, passes=1)
    assert [layer.output for layer in costs.layers] == [64, 64, 4]
    assert [layer.deferred for layer in costs.layers] == [64, 64, 64]


def test_a_layer_before_anything_that_is_trained_has_no_backward() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    costs = profile_layers(nn.Sequential(Shift(), nn.Linear(2, 2)), torch.randn(3, 2), 0, mean, passes=1)
    assert costs.layers[0].deferred == 0
    assert costs.layers[1].deferred > 0
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    assert [layer.deferred for layer in profile_layers(frozen, torch.randn(3, 2), 0, mean, passes=1).layers] == [0, 0]


class Listing(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("error", "message", "measure"),
    [
        (UnsupportedModule, "the model cannot be cut after layer 0; got list",
         lambda: profile_layers(nn.Sequential(Listing(), nn.Linear(2, 2)), torch.randn(1, 2), 0, mean)),
        (UnsupportedModule, "Sequential cannot be copied",
         lambda: profile_layers(nn.Sequential(Locked()), torch.randn(1, 2), 0, mean)),
        (UnsupportedModule, "Linear has no list of layers that can be recognized",
         lambda: profile_layers(nn.Linear(2, 2), torch.randn(1, 2), 0, mean)),
        (InputError, "nothing would be measured; got passes=0",
         lambda: profile_layers(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2), 0, mean, passes=0)),
        (InputError, "the sample is not made of tensors; got nothing",
         lambda: profile_layers(nn.Sequential(nn.Linear(2, 2)), (), 0, mean)),
        (InputError, "the sample is not made of tensors; got Tensor, int",
         lambda: profile_layers(nn.Sequential(nn.Linear(2, 2)), (torch.randn(1), 3), 0, mean)),  # type: ignore[arg-type]
        (InputError, "the model has no layers", lambda: profile_layers(nn.Sequential(), torch.randn(1), 0, mean)),
        (InputError, "the loss function must return a loss; got float",
         lambda: profile_layers(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2), 0, lambda o, t: 1.0)),  # type: ignore[arg-type, return-value]
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(error: type[Exception], message: str, measure: Callable[[], None]) -> None:
    with pytest.raises(error) as caught:
        measure()
    assert message in str(caught.value)
