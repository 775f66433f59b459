"""A model of plain torch whose forward does much between its layers, and needs nothing installed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, IDS, LENGTH = 8, 20, 6


class Inner(nn.Module):
    """A layer that hands a bias on, which the first one makes."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Embedding(LENGTH, 1) if first else None

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, str]:
        if self.bias is not None:
            bias = self.bias(torch.arange(x.shape[1]))
        assert bias is not None
        return x + torch.tanh(self.linear(self.norm(x)) + bias) * mask[..., None], bias, "kept"


class Crossed(nn.Module):
    """A layer that also looks at what the first stack has come to."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, *, memory: Tensor, table: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.own(x) + self.other(memory) + table))


class Rotary(nn.Module):
    """No tensors that a checkpoint would hold."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.1, 1, WIDTH), persistent=False)

    def forward(self, length: int) -> Tensor:
        return torch.outer(torch.arange(length), self.frequencies).cos()


class Stacks(nn.Module):
    """The two stacks of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Inner(number == 0) for number in range(3))
        self.between = nn.LayerNorm(WIDTH)
        self.second = nn.ModuleList(Crossed() for _ in range(2))
        self.start = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.rotary = Rotary()

    def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        x = x * WIDTH**0.5 + self.start
        bias: Tensor | None = None
        for layer in self.first:
            x, bias, _ = layer(x, mask, bias)
        memory = self.between(x)
        x = memory.flip(1)
        for number, layer in enumerate(self.second):
            x = layer(x, memory=memory, table=table[:, :, number] + self.rotary(x.shape[1]))
        return x + self.start


class Tangled(nn.Module):
    """Embeddings that are scaled, dropped from and read once more by the head; a table that every later layer gets a
    slice of; a mask; a loss if there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(IDS, WIDTH)
        self.tables = nn.Linear(WIDTH, 2)
        self.drop = nn.Dropout(0.2)
        self.stacks = Stacks()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(ids)
        table = self.tables(x)[:, :, None, :].transpose(2, 3)  # a slice for each layer of the second stack
        x = self.stacks(self.drop(x), mask.to(x.dtype), table)
        logits = F.linear(self.norm(x), self.embed.weight)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


LISTS = ("stacks.first", "stacks.second")
UNITS = 8
"""Embedding and table, three layers, the norm between, two layers, the norm at the end."""


def tangled() -> Tangled:
    """The same one each time."""
    torch.manual_seed(0)
    return Tangled()


def batch(seed: int = 1, samples: int = 4, length: int = LENGTH) -> dict[str, Tensor]:
    """Some positions are padded, and have no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, IDS, (samples, length), generator=generator)
    mask = torch.ones(samples, length, dtype=torch.long)
    for row in range(samples):
        mask[row, length - 1 - row % 3 :] = 0
    labels = torch.randint(0, IDS, ids.shape, generator=generator).masked_fill(mask == 0, -100)
    return {"ids": ids.masked_fill(mask == 0, 0), "mask": mask, "labels": labels}
