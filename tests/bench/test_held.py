from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipex.bench import backward
from pipex.bench.backward import CASES, Case
from pipex.bench.held import Storages

SMALL = [case for case in CASES["cpu"] if case.name in ("mlp", "block")]


def test_a_storage_counts_once_and_while_it_exists() -> None:
    with Storages() as storages:
        kept = torch.zeros(10)
        part = kept[2:]
        freed = torch.zeros(1000)
        del freed
        assert storages.alive([]) == 40
        del kept
        assert storages.alive([]) == 40
        del part
        assert storages.alive([]) == 0


def test_parameters_and_their_gradients_do_not_count() -> None:
    weight = nn.Parameter(torch.ones(3))
    with Storages() as storages:
        alias = weight.detach()
        (2 * weight).sum().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert storages.alive([weight]) == 0
        assert storages.alive([]) == alias.nbytes + weight.grad.nbytes


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_plain_forward_holds_its_input_and_what_autograd_saves(case: Case) -> None:
    module = case.build()
    x = torch.randn(case.shape, requires_grad=True)
    parameters = {p.data_ptr() for p in module.parameters()}
    saved: dict[int, Tensor] = {x.data_ptr(): x}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    wanted = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del y
    side = backward._Side(module, x.detach(), torch.ones(case.shape), backward._Whole, case)
    assert side.held() == backward.Held(wanted, 0, 0)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_pipex_holds_the_inputs_and_output_gradients_of_its_products_until_w(case: Case) -> None:
    module = case.build()
    wanted: dict[tuple[int, str], int] = {}  # inputs that several products share count once; here none are
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            rows = torch.Size(case.shape[:-1]).numel()
            wanted[id(layer), "x"] = 4 * rows * layer.in_features
            wanted[id(layer), "dy"] = 4 * rows * layer.out_features
    side = backward._Side(module, torch.randn(case.shape), torch.randn(case.shape), backward._Pipex, case)
    held = side.held()
    assert (held.between, held.after) == (sum(wanted.values()), 0)
