"""Evaluation between steps, of modules whose ``train`` and ``eval`` do something, beside plain torch."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import host_world
import pytest
import torch
from plain_loop import LOSS, Found, assert_same, backward, data, parameters_of, pipeline, plain
from torch import Tensor, nn

from pipex.partition import split_model
from pipex.runtime import modes


class Adapted(nn.Linear):
    """A frozen weight and an adapter, which is merged into it for evaluation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False
        self.merges = 0

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode is self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
            self.merges += 1
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + x @ self.a.T @ self.b.T


class Untold(Adapted):
    """Its ``training`` never changes."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.training = True
        return self


class Held(nn.Sequential):
    """Its normalization stays in evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self[1].eval()
        return self


def adapted() -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Sequential(Adapted(6, 8), nn.Dropout(0.0)), Untold(8, 8), Held(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8)), Adapted(8, 3),
    )  # fmt: skip
    model.train()
    model[3][0].eval()
    return model


def train() -> Found:
    pipe, values = pipeline("1f1b", adapted), []
    for step in range(3):
        values += [pipe.step(*data(step)), pipe.evaluate(*data(10 + step))]
    return values, parameters_of(pipe)


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_evaluation_between_steps_does_what_eval_and_train_do(ranks: int) -> None:
    model, values = adapted(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        values.append(backward(model, data(step), LOSS))
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        x, y = data(10 + step)
        with torch.no_grad():
            parts = [LOSS(model(a), b) * (len(a) / 6) for a, b in zip(x.split(2), y.split(2), strict=True)]
        values.append((parts[0] + parts[1] + parts[2]).item())
        model.train()
        model[3][0].eval()
    merges = [module.merges for module in model.modules() if isinstance(module, Adapted)]
    assert merges == [6, 6, 6]
    expected = plain(model, values)[1] | dict(model.named_buffers())
    assert_same(host_world.launch(train, ranks), (values, expected))


def test_every_module_is_in_its_mode_again_and_one_that_was_not_to_change_has_not() -> None:
    model = adapted()
    model[0].train(False)  # merged, and to stay so
    model[0][1].train()
    model[2][0].eval()
    stages = split_model(model, 2)
    before = copy.deepcopy(model.state_dict())
    found = [(name, module.training) for name, module in model.named_modules() if name]
    merges = model[0][0].merges
    with modes.evaluation(stages, nullcontext):
        assert not any(module.training for name, module in model.named_modules() if name and name != "1")
    assert [(name, module.training) for name, module in model.named_modules() if name] == found
    assert model[0][0].merges == merges
    for name, tensor in model[0].state_dict().items():
        assert torch.equal(tensor, before[f"0.{name}"]), name
