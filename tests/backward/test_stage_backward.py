"""stage_backward and its halves by themselves: their contract, which is torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint
from zoo import Checkpointed, run_functions, run_split

from pipex.backward import Splitter, stage_backward, stage_backward_input, stage_backward_weight
from pipex.errors import InputError, UnsupportedModule


def test_reentrant_checkpointing_is_right_on_a_tape_and_refused_by_the_functions() -> None:
    class Reentrant(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(checkpoint(self.inner, x, use_reentrant=True))

    module = Reentrant()
    whole = copy.deepcopy(module)
    x, dy = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    whole(x).backward(dy)
    run_split(module, x.detach().requires_grad_(), dy)
    for parameter, reference in zip(module.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.grad, reference.grad)
    with pytest.raises(UnsupportedModule, match="use_reentrant=False"):
        run_functions(module, x.detach().requires_grad_(), dy)


def test_the_whole_backward_takes_nested_outputs_and_empties_the_inputs() -> None:
    layer = nn.Linear(4, 4)
    x, y = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    output = {"a": (layer(x), 3), "b": [layer(y), torch.arange(3)], "c": None}
    ones = torch.ones(2, 4)
    found = stage_backward(output, {"a": (ones, None), "b": [2 * ones, None], "c": None}, [x, 5, y])
    assert torch.equal(found[0], ones @ layer.weight)
    assert found[1:] == (None, None)
    assert x.grad is None
    torch.testing.assert_close(layer.weight.grad, ones.t() @ x + 2 * ones.t() @ y)


@pytest.mark.parametrize(
    ("output", "gradient"),
    [
        (("x", "x"), ("x",)),
        ({"a": "x"}, {"b": "x"}),
        ({"a": "x"}, ["x"]),
        (("x",), "x"),
        ("x", ("x",)),
    ],
)
def test_outputs_and_gradients_of_other_structures_are_refused(output: object, gradient: object) -> None:
    def tensors(structure: object) -> object:
        if isinstance(structure, dict):
            return {key: tensors(value) for key, value in structure.items()}
        return torch.ones(2, requires_grad=True) * 1 if structure == "x" else type(structure)(map(tensors, structure))

    with pytest.raises(InputError, match="got"):
        stage_backward(tensors(output), tensors(gradient), [])


def test_gradients_of_inputs_are_added_to_those_that_are_there() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    x.grad = torch.ones(2, 4)
    (gradient,), _ = stage_backward_input([layer(x)], None, [x], layer.parameters())
    assert torch.equal(x.grad, 1 + gradient)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("halves", [True, False])
def test_an_output_that_is_freed_is_as_good_as_its_gradient_edge(prepared: bool, halves: bool) -> None:
    """As a stage of torch 2.15 keeps of what it has sent; beside one that it still has, and one without a graph."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(self.a(x))
            return y, self.b(y)

    module = Two()
    x, dy, dz = torch.randn(5, 4, requires_grad=True), torch.randn(5, 3), torch.randn(5, 2)
    wanted = torch.autograd.grad(module(x), [x, *module.parameters()], [dy, dz])
    with Splitter(module.parameters() if prepared else ()).record():
        y, z = module(x)
    edge = get_gradient_edge(z)
    del z
    if halves:
        (dx,), left = stage_backward_input((y, edge, None), (dy, dz, None), [x], module.parameters())
        assert all(parameter.grad is None for parameter in module.parameters())
        stage_backward_weight(module.parameters(), left)
    else:
        (dx,) = stage_backward((y, edge, None), (dy, dz, None), [x])
    for found, reference in zip([dx, *(p.grad for p in module.parameters())], wanted, strict=True):
        assert torch.equal(found, reference)


def test_a_gradient_edge_without_a_gradient_is_refused() -> None:
    edge = get_gradient_edge(nn.Linear(2, 2)(torch.ones(1, 2)))
    with pytest.raises(InputError, match="gradient edge needs its output's gradient; got NoneType"):
        stage_backward_input([edge], None, [], [])
