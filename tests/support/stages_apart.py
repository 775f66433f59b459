"""The stages of a model, one after the other in one process, as ranks run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tangled_model import LISTS, UNITS, batch
from torch import Tensor, nn

import pipex
from pipex.partition import Stage
from pipex.partition.stage import Keywords

Result = tuple[Tensor, dict[str, Tensor]]
"""Loss, and gradients by name."""


def counts_of(ends: Sequence[int]) -> list[int]:
    return [b - a for a, b in zip((0, *ends), (*ends, UNITS), strict=True)]


def split(model: nn.Module, ends: Sequence[int] = (2, 4, 6), **options: Any) -> list[Stage]:
    return pipex.split_model(model, len(ends) + 1, counts_of(ends), sample=batch(), layers=LISTS, **options)


def apart(model: nn.Module, stages: Sequence[Stage], given: dict[str, Tensor]) -> Result:
    """Forward and backward of one stage after the other, as ranks do it."""
    inputs: tuple[Any, ...] = (Keywords(given),)
    sent: list[tuple[tuple[Tensor, ...], list[Tensor]]] = []
    output: Any = None
    for stage in stages:
        generator, first = torch.default_generator, stage.first_layer
        stage.before_layer = lambda position, generator=generator, first=first: generator.manual_seed(first + position)
        output = stage(*inputs)
        if stage is not stages[-1]:
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in output]
            sent.append((output, leaves))
            inputs = tuple(t.view_as(t) for t in leaves)
    return output["loss"].detach(), gradients(model, output["loss"], sent)


def gradients(
    model: nn.Module, loss: Tensor, sent: Sequence[tuple[tuple[Tensor, ...], list[Tensor]]] = ()
) -> dict[str, Tensor]:
    """Of the loss, through what was sent between stages."""
    model.zero_grad()
    loss.backward()
    for output, leaves in reversed(sent):
        pairs = [(o, x.grad) for o, x in zip(output, leaves, strict=True) if o.requires_grad and x.grad is not None]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(got: Result, needed: Result) -> None:
    assert torch.equal(got[0], needed[0])
    assert got[1].keys() == needed[1].keys()
    for name, gradient in needed[1].items():
        assert torch.allclose(got[1][name], gradient, rtol=1e-6, atol=1e-9), name  # that of a tied one
        assert torch.equal(got[1][name], gradient) or name in ("embed.weight", "stacks.start"), name
