"""Parameters that stand in several stages (an embedding tied to the output head).

Each stage accumulates into its own ``.grad``; at the end of a step the accumulators are added in stage order, once,
and every rank that holds a copy makes the same optimizer step with the sum. So the sum's bits do not depend on
the schedule or on where the stages live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipex.partition import Stage, tied


@dataclass(frozen=True)
class Tie:
    """One tied parameter.

    Attributes:
        name: its canonical name in the model.
        stages: where it stands, rising; the first one owns it (checkpoints, gradient norm).
        replicas: its Parameter in each of these stages; own ``.grad``, shared memory.
    """

    name: str
    stages: tuple[int, ...]
    replicas: tuple[nn.Parameter, ...]


def separate(stages: Sequence[Stage]) -> list[Tie]:
    """Gives every stage but the first its own Parameter over the memory of each tied parameter."""
    ties = []
    for name, holders in tied(stages).items():
        original = stages[holders[0]].names[name]
        assert isinstance(original, nn.Parameter)
        replicas = [original]
        for holder in holders[1:]:
            replica = nn.Parameter(original.data, requires_grad=original.requires_grad)
            for module in stages[holder].modules():
                for key, parameter in module._parameters.items():
                    if parameter is original:
                        module._parameters[key] = replica
            replicas.append(replica)
        ties.append(Tie(name, tuple(holders), tuple(replicas)))
    return [tie for tie in ties if tie.replicas[0].requires_grad]


def accumulator(parameter: nn.Parameter) -> Tensor:
    """The gradient that a stage has accumulated; zeros where it got none."""
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    return parameter.grad


def total(accumulators: Sequence[Tensor]) -> Tensor:
    """The sum in stage order."""
    first, *rest = accumulators
    for gradient in rest:
        first = first + gradient
    return first
