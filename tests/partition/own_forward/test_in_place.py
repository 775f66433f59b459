"""Models whose forward works in place on what a module has returned, between the calls that a cut can come behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex.partition.stage import Keywords


class Scaled(nn.Module):
    """The head gets what the embedding has returned, too, times 4: a power of two, and added to one other part, or the
    parts of the embedding's gradient, each made on its own stage, would be rounded otherwise than their sum is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x *= 4.0
        first = x
        for layer in self.layers:
            x = layer(torch.tanh(x))
        return self.head(x + first)


@pytest.mark.parametrize("counts", [[1, 5], [2, 4], [3, 3], [5, 1], [1, 1, 1, 1, 1, 1]])
def test_what_is_scaled_in_place_is_scaled_once_on_every_stage(counts: list[int]) -> None:
    torch.manual_seed(0)
    model, ids = Scaled(), torch.randint(0, 16, (3, 5))
    expected = model(ids)
    stages = pipex.split_model(model, len(counts), counts, sample={"ids": ids}, layers=("layers",))
    for _ in range(2):  # nothing that a stage was given is spoiled for the next forward
        inputs: tuple[Any, ...] = (Keywords(ids=ids),)
        for stage in stages:
            output = stage(*inputs)
            inputs = tuple(t.detach() for t in output) if isinstance(output, tuple) else ()
        assert torch.equal(output, expected)
