"""Hooks on parameters and on autograd's accumulators run as they would in one backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import Shifted, run_functions, run_split

from pipex.backward import Splitter


def test_hooks_on_the_accumulator_run() -> None:
    layer = nn.Linear(4, 4)
    calls = []
    node = layer.weight.expand_as(layer.weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: calls.append(1))
    for _ in range(3):
        run_split(layer, torch.randn(3, 4), torch.randn(3, 4))
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["register_hook", "register_prehook"])
def test_hooks_put_on_the_accumulator_while_a_stage_trains_run(kind: str) -> None:
    layer = nn.Linear(4, 4)
    splitter = Splitter.of(layer)
    calls = []
    for microbatch in range(6):
        if microbatch == 2:
            node = layer.weight.expand_as(layer.weight).grad_fn.next_functions[0][0]
            handle = getattr(node, kind)(lambda *_: calls.append(microbatch))  # noqa: B023
        if microbatch == 4:
            handle.remove()
        run_split(layer, torch.randn(3, 4), torch.randn(3, 4), splitter)
    assert calls == [2, 3]


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_put_on_a_parameter_while_a_stage_trains_run(kind: str) -> None:
    layer = nn.Linear(4, 4)
    splitter = Splitter.of(layer)
    calls = []
    for microbatch in range(4):
        if microbatch == 2:
            getattr(layer.weight, kind)(lambda _: calls.append(microbatch))  # noqa: B023
        run_split(layer, torch.randn(3, 4), torch.randn(3, 4), splitter)
    assert calls == [2, 3]


def test_gradient_hooks_run_once_over_the_functions() -> None:
    module = Shifted()
    calls: list[str] = []
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda g, name=name: calls.append(name) or 2 * g)
    whole = copy.deepcopy(module)
    for parameter in whole.parameters():
        parameter.register_hook(lambda g: 2 * g)
    x, dy = torch.randn(3, 4), torch.randn(3, 4)
    for _ in range(2):
        run_functions(module, x, dy)
        whole(x).backward(dy)
    assert sorted(calls) == sorted(2 * [name for name, _ in module.named_parameters()])
    for parameter, reference in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


def test_a_hook_registered_between_f_and_i_runs() -> None:
    layer = nn.Linear(4, 4)
    x, dy = torch.randn(3, 4), torch.randn(3, 4)
    with Splitter.of(layer).record() as tape:
        y = layer(x)
    layer.weight.register_hook(lambda g: 10 * g)
    tape.backward_input([y], [dy], [])
    tape.backward_weight()
    assert torch.equal(layer.weight.grad, 10 * (dy.t() @ x))
