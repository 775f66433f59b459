"""stage_backward and its halves by themselves: their contract, which is torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import Checkpointed, run_functions, run_split

from pipex.backward import stage_backward, stage_backward_input
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
