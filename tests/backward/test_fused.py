"""The contract ``fused``: as near to float64 as autograd, the same bits again, and products made together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from zoo import CASES, Reused

import pipex
from pipex.backward import Splitter, Tape, reductions
from pipex.backward import fused as fused_module
from pipex.runtime.reference import OneProcess

Call = tuple[int, int]  # layers of one call, micro-batches of each


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is asked of the products."""
    made: list[Call] = []
    add = fused_module.add_weight_gradients

    def note(dys: Sequence[Sequence[Tensor]], *rest: Any) -> None:
        made.append((len(dys), len(dys[0])))
        add(dys, *rest)

    monkeypatch.setattr(fused_module, "add_weight_gradients", note)
    return made


def train(module: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], splitter: Splitter | None = None) -> None:
    """F and I of all micro-batches, then their W's without anything in between."""
    splitter = splitter or Splitter(module.parameters(), exact=False)
    tapes: list[Tape] = []
    for x, dy in batches:
        inputs = [x.detach().requires_grad_()] if x.is_floating_point() else []
        with splitter.record() as tape:
            y = module(*(inputs or [x]))
        tape.backward_input([y], [dy], inputs)
        tapes.append(tape)
    for tape in tapes:
        tape.backward_weight(more=tape is not tapes[-1])


def autograd(module: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    for x, dy in batches:
        module(x.detach().requires_grad_(x.is_floating_point())).backward(dy)


def batches_for(module: nn.Module, make: Callable[[], Tensor], count: int = 3) -> list[tuple[Tensor, Tensor]]:
    xs = [make() for _ in range(count)]
    return [(x, torch.randn_like(module(x))) for x in xs]


def widened(batches: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.double() if x.is_floating_point() else x, dy.double()) for x, dy in batches]


def assert_as_near(found: nn.Module, peer: nn.Module, exact: nn.Module, gradient: str = "grad") -> None:
    """At most twice autograd's own error, as everywhere a kernel stands beside torch."""
    triples = zip(found.named_parameters(), peer.parameters(), exact.parameters(), strict=True)
    for (name, parameter), beside, wanted in triples:
        ours = getattr(parameter, gradient, None)
        assert (ours is None) == (wanted.grad is None), name
        if wanted.grad is not None:
            error, its_error = ((g.double() - wanted.grad).abs().max() for g in (ours, beside.grad))
            assert error <= 2 * its_error + 1e-6, f"{name}: {error} beside {its_error}"


@pytest.mark.parametrize("case", CASES)
def test_every_module_is_as_near_to_float64_as_by_autograd(case: str) -> None:
    build, make = CASES[case]
    torch.manual_seed(1)
    module = build()
    module.eval()  # running statistics would change with every forward
    batches = batches_for(module, make)
    peer, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    autograd(peer, batches)
    autograd(exact, widened(batches))
    again = copy.deepcopy(module)
    train(module, batches)
    assert_as_near(module, peer, exact)
    train(again, batches)
    for parameter, twin in zip(module.parameters(), again.parameters(), strict=True):
        assert parameter.grad is None or torch.equal(parameter.grad, twin.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("main", [True, False])
def test_short_operands_are_summed_in_a_longer_main_gradient(dtype: torch.dtype, main: bool) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(*(nn.Linear(24, 24) for _ in range(3))).to(dtype)
    batches = batches_for(module, lambda: torch.randn(2, 16, 24, dtype=dtype), count=4)
    peer, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    autograd(peer, batches)
    for x, dy in batches:  # what the layers' outputs are rounded to is not W's doing
        hidden, layers = x, list(zip(module, exact, strict=True))
        inputs = [hidden := layer(hidden).detach() for layer, _ in layers[:-1]]
        for (layer, twin), its_input in zip(reversed(layers), reversed([x, *inputs]), strict=True):
            twin(its_input.double()).backward(dy.double())
            dy = dy @ layer.weight
    if main:
        for parameter in module.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False
    train(module, batches)
    assert_as_near(module, peer, exact, "main_grad" if main else "grad")
    for parameter in module.parameters():
        assert (parameter.grad is None) == main
        assert not main or parameter.grad_added_to_main_grad


def test_layers_of_one_shape_and_all_micro_batches_go_together(calls: list[Call]) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8, bias=False))
    batches = batches_for(module, lambda: torch.randn(5, 8), count=4)
    splitter = Splitter(module.parameters(), exact=False)
    train(module, batches, splitter)
    assert calls == [(1, 3), (1, 3), (2, 3)]  # the first products are the gradients
    calls.clear()
    train(module, batches, splitter)
    assert calls == [(1, 4), (1, 4), (2, 4)]


class SharedWeight(nn.Module):
    """One weight under two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class SharedBias(SharedWeight):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight, self.b.bias = nn.Parameter(torch.randn(8, 8)), self.a.bias


@pytest.mark.parametrize("build", [SharedWeight, SharedBias])
def test_no_launch_adds_to_one_gradient_twice(build: Callable[[], nn.Module], calls: list[Call]) -> None:
    module = build()
    batches = batches_for(module, lambda: torch.randn(5, 8))
    splitter = Splitter(module.parameters(), exact=False)
    whole = copy.deepcopy(module)
    for _ in range(2):
        calls.clear()
        train(module, batches, splitter)
        autograd(whole, batches)
    assert calls == [(1, 3), (1, 3)]
    for parameter, reference in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


def test_no_launch_adds_to_one_main_gradient_twice(calls: list[Call]) -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    main_grad = torch.zeros(4, 4)
    for parameter in module.parameters():
        parameter.main_grad = main_grad
    train(module, [(torch.randn(3, 4), torch.randn(3, 4))])
    assert calls == [(1, 1), (1, 1)]


def test_a_layer_used_twice_is_one_sum(calls: list[Call]) -> None:
    module = Reused()
    batches = batches_for(module, lambda: torch.randn(3, 8), count=1)
    splitter = Splitter(module.parameters(), exact=False)
    for _ in range(2):
        calls.clear()
        train(module, batches, splitter)
    assert sorted(calls) == [(1, 1), (1, 3)]


def hook_parameter(parameter: Tensor, hook: Callable[..., None]) -> None:
    parameter.register_hook(hook)


def hook_sum(parameter: Tensor, hook: Callable[..., None]) -> None:
    parameter.register_post_accumulate_grad_hook(hook)


def hook_sum_of_main_grad(parameter: Tensor, hook: Callable[..., None]) -> None:
    parameter.main_grad = torch.zeros_like(parameter)
    parameter.register_post_accumulate_grad_hook(hook)


def hook_accumulator(parameter: Tensor, hook: Callable[..., None]) -> None:
    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    parameter.kept = node  # as whoever hooks one must
    node.register_hook(hook)


@pytest.mark.parametrize("put", [hook_parameter, hook_sum, hook_sum_of_main_grad, hook_accumulator])
def test_hooks_see_every_micro_batch(put: Callable[[Tensor, Callable[..., None]], None]) -> None:
    module = nn.Linear(4, 4)
    seen: list[int] = []
    put(module.weight, lambda *_: seen.append(1))
    batches = batches_for(module, lambda: torch.randn(3, 4))
    splitter = Splitter(module.parameters(), exact=False)
    for _ in range(2):
        train(module, batches, splitter)
    assert len(seen) == 6


def test_gradients_that_products_cannot_be_added_to_are_left_to_autograd() -> None:
    module, batches = nn.Linear(4, 3), [(torch.randn(5, 4), torch.randn(5, 3)) for _ in range(2)]
    splitter = Splitter(module.parameters(), exact=False)
    train(module, batches, splitter)
    module.weight.grad = torch.zeros(4, 3).t()
    train(module, batches, splitter)
    torch.testing.assert_close(module.weight.grad, sum(dy.t() @ x for x, dy in batches))


def test_the_first_gradient_has_its_parameter_s_layout() -> None:
    module = nn.Linear(4, 3)
    module.weight = nn.Parameter(torch.randn(4, 3).t())
    train(module, [(torch.randn(5, 4), torch.randn(5, 3))])
    assert module.weight.grad.stride() == module.weight.stride()


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
def test_embeddings_are_added_to_the_rows_of_their_tokens(
    padding: int | None, main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def add(dys: Sequence[Tensor], ids: Sequence[Tensor], gradient: Tensor, padding: int) -> None:
        asked.append(len(dys))
        for dy, tokens in zip(dys, ids, strict=True):
            gradient.index_add_(0, tokens, dy * (tokens != padding)[:, None])

    monkeypatch.setattr(reductions, "serves", lambda _: True)
    monkeypatch.setattr(reductions, "add_embedding_gradient", add)
    module = nn.Embedding(11, 4, padding_idx=padding)
    twin = copy.deepcopy(module)
    if main:
        module.weight.main_grad = torch.zeros_like(module.weight)
    batches = batches_for(module, lambda: torch.randint(0, 11, (2, 9)), count=3)
    train(module, batches)
    autograd(twin, batches)
    assert asked == [3]
    torch.testing.assert_close(module.weight.main_grad if main else module.weight.grad, twin.weight.grad)


def test_an_embedding_scaled_by_frequency_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "serves", lambda _: True)
    module = nn.Embedding(11, 4, scale_grad_by_freq=True)
    twin = copy.deepcopy(module)
    batches = batches_for(module, lambda: torch.randint(0, 11, (2, 9)), count=3)
    train(module, batches)
    autograd(twin, batches)
    torch.testing.assert_close(module.weight.grad, twin.weight.grad)


def test_a_main_gradient_for_the_weight_alone() -> None:
    module = nn.Linear(4, 3, dtype=torch.bfloat16)
    module.weight.main_grad = torch.zeros(3, 4)
    # Small integers: no sum of their products is rounded.
    batches = [(torch.randint(-3, 4, (5, 4)).bfloat16(), torch.randint(-3, 4, (5, 3)).bfloat16()) for _ in range(3)]
    train(module, batches)
    assert torch.equal(module.weight.main_grad, sum(dy.float().t() @ x.float() for x, dy in batches))
    assert torch.equal(module.bias.grad, sum(dy.sum(0) for _, dy in batches))


def test_gradients_with_gaps_or_repeated_rows_are_copied() -> None:
    """As the backward of a sum or of a split hands them over."""
    module = nn.Linear(4, 3)
    splitter = Splitter(module.parameters(), exact=False)
    x = torch.randn(5, 4)
    batches = [(x, torch.ones(1, 3).expand(5, 3)), (x, torch.randn(5, 6)[:, ::2]), (x, torch.randn(3, 5).t())]
    train(module, batches, splitter)
    module.zero_grad()
    train(module, batches, splitter)
    torch.testing.assert_close(module.weight.grad, sum(dy.t() @ x for x, dy in batches))
    torch.testing.assert_close(module.bias.grad, sum(dy.sum(0) for _, dy in batches))


def layers() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)), nn.Linear(6, 2))


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def steps_of_a_rank() -> tuple[list[float], list[Call]]:
    made: list[Call] = []
    add = fused_module.add_weight_gradients

    def note(dys: Sequence[Sequence[Tensor]], *rest: Any) -> None:
        made.append((len(dys), len(dys[0])))
        add(dys, *rest)

    with (
        mock.patch.object(fused_module, "add_weight_gradients", note),
        mock.patch.object(Splitter, "fuses", return_value=True),  # as on a GPU
    ):
        ranks = pipex.current_world().ranks
        plan = pipex.build("zb-h1", ranks, 4)
        stages = pipex.split_model(layers(), ranks)
        pipe = pipex.Pipeline(stages, plan, nn.functional.mse_loss, optimizer=optimizer)
        losses = []
        for step in range(3):
            torch.manual_seed(step)
            losses.append(pipe.step(torch.randn(8, 6), torch.randn(8, 2)))
    return losses, made


def test_a_pipeline_learns_as_one_process_does() -> None:
    process = OneProcess(pipex.split_model(layers(), 2), 4, nn.functional.mse_loss, optimizer=optimizer)
    wanted = []
    for step in range(3):
        torch.manual_seed(step)
        wanted.append(process.step(torch.randn(8, 6), torch.randn(8, 2)))
    answers = pipex.launch(steps_of_a_rank, 2)
    for losses, _ in answers:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted))
    assert any(microbatches == 2 for _, microbatches in answers[1][1]), "the last two W's of rank 1 go together"


def test_what_is_left_to_a_w_that_fails_is_forgotten() -> None:
    layer = nn.Linear(4, 3)
    splitter = Splitter(layer.parameters(), exact=False)
    tapes, gradients = [], [torch.randn(5, 3) for _ in range(2)]
    for dy in gradients:
        with splitter.record() as tape:
            y = layer(torch.randn(5, 4))
        tape.backward_input([y], [dy], [])
        tapes.append(tape)
    tapes[0].backward_weight(more=True)
    gradients[1].add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        tapes[1].backward_weight()
    batches = [(torch.randn(5, 4), torch.randn(5, 3))]
    layer.zero_grad()
    train(layer, batches, splitter)
    torch.testing.assert_close(layer.weight.grad, batches[0][1].t() @ batches[0][0])


def test_a_main_gradient_of_fewer_bits() -> None:
    layer = nn.Linear(4, 3, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    x, dy = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    train(layer, [(x, dy), (x, dy)])
    torch.testing.assert_close(layer.weight.main_grad, (2 * dy.t() @ x).float())


def test_what_a_failed_step_has_left_is_forgotten() -> None:
    module, batches = nn.Linear(4, 3), [(torch.randn(5, 4), torch.randn(5, 3))]
    splitter = Splitter(module.parameters(), exact=False)
    with splitter.record() as tape:
        y = module(torch.randn(5, 4))
    tape.backward_input([y], [torch.randn(5, 3)], [])
    tape.backward_weight(more=True)
    splitter.fused.clear()
    train(module, batches, splitter)
    torch.testing.assert_close(module.weight.grad, batches[0][1].t() @ batches[0][0])
