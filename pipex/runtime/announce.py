"""Finds out what will travel between the stages, before the first message does.

Every stage in turn runs one forward without gradients, on zeros of the announced form (stage 0: on the real
micro-batch), for each size that a micro-batch has. Buffers and random numbers are put back afterwards. The same run
shows which layers draw random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipex.plan import Placement
from pipex.runtime import seeding
from pipex.runtime.agreement import share
from pipex.runtime.stage_runner import StageRunner, output_tensors
from pipex.transport.interface import Form, TensorForm, World, form_of


@dataclass(slots=True)
class Forms:
    """The messages of one micro-batch, by stage.

    Attributes:
        activation: what it receives from the stage before it.
        gradient: what it receives from the stage after it: one gradient per floating tensor of its output.
    """

    activation: dict[int, Form] = field(default_factory=dict)
    gradient: dict[int, Form] = field(default_factory=dict)


def announce(
    world: World,
    placement: Placement,
    runners: Mapping[int, StageRunner],
    samples: Mapping[int, tuple[Any, ...] | None],
    device: torch.device,
) -> dict[int, Forms]:
    """Collective. Returns the forms by micro-batch size, the same on every rank.

    Args:
        placement: which rank holds which stage.
        samples: for each micro-batch size a real micro-batch; None where this rank does not hold the first stage.
    """
    result = {size: Forms() for size in samples}
    (pipe,) = placement.pipes
    for stage in pipe:
        rank, after = placement.rank_of(stage), placement.after(stage)
        own = {}
        if rank == world.rank:
            for size, sample in samples.items():
                inputs = sample if runners[stage].first else _zeros(result[size].activation[stage], device)
                assert inputs is not None
                own[size] = _encode(_probe(runners[stage], inputs, device))
        if after is None:  # nothing to announce, but its random layers had to be found too
            break
        for size, encoded in share(world, "the announcement", own)[rank].items():
            form = _decode(encoded)
            forms = result[int(size)]
            forms.activation[after] = form
            forms.gradient[stage] = tuple(t for t in form if t.differentiable)
    return result


def _probe(runner: StageRunner, inputs: tuple[Any, ...], device: torch.device) -> Form:
    """One forward, layer by layer; returns the form of its output and notes the layers that draw random numbers."""
    generator = seeding.generator(device)
    drawing = set()

    @contextmanager
    def watched(position: int) -> Iterator[None]:
        before = generator.get_state()
        yield
        if not torch.equal(before, generator.get_state()):
            drawing.add(position)

    with torch.no_grad(), _buffers_kept(runner.stage), seeding.seeded(device, 0):
        output = runner.stage.run(inputs, watched)
    runner.random_layers |= drawing
    return () if runner.last else form_of(output_tensors(runner.stage, output))


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _zeros(form: Form, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(t.shape, dtype=t.dtype, device=device) for t in form)


def _encode(form: Form) -> list[tuple[list[int], str]]:
    return [(list(t.shape), str(t.dtype).removeprefix("torch.")) for t in form]


def _decode(encoded: Sequence[tuple[Sequence[int], str]]) -> Form:
    return tuple(TensorForm(tuple(shape), getattr(torch, dtype)) for shape, dtype in encoded)
