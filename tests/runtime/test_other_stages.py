"""A rank keeps its own stages and only forms of the others, whatever users keep of the whole model."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from typing import Any
from weakref import ref

import host_world
import pytest
import resident
import torch
import torch.nn.functional as F
from random_models import digest
from torch import Tensor, nn

import pipex
from pipex.errors import PipexError
from pipex.partition import split_model, without_others


def layers(count: int, width: int, *, tied: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=n % 2 == 0) for n in range(count)))
    if tied:
        model[-1].weight = model[0].weight
    return model


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def batch(width: int, step: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, width, generator=torch.Generator().manual_seed(step))
    return x, y


def test_memory_grows_by_a_rank_s_own_stages() -> None:
    command = [sys.executable, resident.__file__, "whole"]
    for after, _, whole in json.loads(subprocess.run(command, capture_output=True, check=True).stdout):
        assert whole == 16 * 2048 * 2048 * 4
        assert after <= 1.3


def trained(keep: bool, tied: bool) -> tuple[list[float], dict[str, str | None], int]:
    world = pipex.current_world()
    model: nn.Module | None = layers(6, 8, tied=tied)
    assert model is not None
    stages = split_model(model, world.ranks)
    kept = [ref(tensor) for tensor in model.parameters()]
    pipe = pipex.Pipeline(stages, pipex.build("zb-h1", world.ranks, 4), F.mse_loss, optimizer=sgd, clip_norm=1.0)
    del stages
    if not keep:
        model = None
    gc.collect()
    losses = [pipe.step(*batch(8, step)) for step in range(3)]
    found = {name: digest(tensor) for stage in pipe.local_stages for name, tensor in stage.names.items()}
    return losses, found, sum(tensor() is not None for tensor in kept)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_model_that_the_user_lets_go_trains_as_one_that_is_kept(ranks: int, tied: bool) -> None:
    kept, gone = (host_world.launch(trained, ranks, args=(keep, tied)) for keep in (True, False))
    assert [rank[:2] for rank in kept] == [rank[:2] for rank in gone]
    everything = len(list(layers(6, 8, tied=tied).parameters()))
    assert [rank[2] for rank in kept] == [everything] * ranks
    assert all(rank[2] == len(rank[1]) < everything for rank in gone)  # its own alone


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(2, 3))
        self.register_buffer("made", torch.ones(4), persistent=False)
        self.register_buffer("none", None)
        self.register_parameter("bias", None)
        self.weight = nn.Parameter(torch.ones(5, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_skeleton_has_all_names_and_forms_and_shares_what_the_stage_shares() -> None:
    shared, model = nn.BatchNorm1d(3), layers(3, 3, tied=True)
    whole = nn.Sequential(model[0], shared, nn.Sequential(Table(), nn.LazyLinear(3)), shared, model[1], model[2])
    stages = split_model(whole, 6)
    names = [{n: (tuple(t.shape), t.dtype) for n, t in s.names.items() if "2.1" not in n} for s in stages]
    found = without_others(stages, (5,))
    assert [stage.layers is own.layers for stage, own in zip(found, stages, strict=True)] == [False] * 5 + [True]
    assert found[5] is stages[5]
    assert [{n: (tuple(t.shape), t.dtype) for n, t in s.names.items() if "2.1" not in n} for s in found] == names
    assert [list(s.state_dict()) for s in found] == [list(s.state_dict()) for s in stages]
    assert found[0].layers[0].weight is model[0].weight is stages[5].layers[0].weight
    assert found[1].layers[0] is found[3].layers[0]
    assert found[1].layers[0].weight.is_meta
    assert not found[2].layers[0].get_submodule("0").weight.requires_grad
    assert all(tensor.is_meta for tensor in (*found[4].parameters(), *found[1].buffers()))
    assert [stage.names.keys() for stage in stages] == [stage.names.keys() for stage in found]


def replace_on_one(rank: int) -> None:
    model = layers(4, 4, tied=True)
    pipe = pipex.Pipeline(split_model(model, 2), pipex.build("1f1b", 2, 2), F.mse_loss, optimizer=sgd)
    pipe.step(*batch(4, 0))
    if pipex.current_world().rank == rank:
        model[0].weight = model[3].weight = nn.Parameter(model[0].weight.detach().clone())
    pipe.step(*batch(4, 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tied_parameter_that_one_rank_alone_replaces_is_told(rank: int) -> None:
    words = "how often parameters of the stages 0, 1 were replaced"
    with pytest.raises(PipexError, match=re.escape(words)):
        host_world.launch(replace_on_one, 2, args=(rank,))


def replace_in_one_stage() -> None:
    model = layers(4, 4, tied=True)
    pipe = pipex.Pipeline(split_model(model, 2), pipex.build("1f1b", 2, 2), F.mse_loss, optimizer=sgd)
    pipe.step(*batch(4, 0))
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())  # on both ranks, but layer 0 keeps the old one
    pipe.step(*batch(4, 1))


def test_a_tied_parameter_that_is_replaced_in_one_stage_is_told() -> None:
    with pytest.raises(PipexError, match="how often parameters of the stages 0, 1 were replaced"):
        host_world.launch(replace_in_one_stage, 2)
