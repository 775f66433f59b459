"""From a model and a sample to stages that run the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipex.errors import InputError, PipexError, headline
from pipex.partition.conventions import no_cache, refuse_untied
from pipex.partition.own_forward.arguments import Arguments
from pipex.partition.own_forward.crossing import forms_of
from pipex.partition.own_forward.layer_lists import layer_paths
from pipex.partition.own_forward.loss import has_loss
from pipex.partition.own_forward.record import record
from pipex.partition.own_forward.rehearsal import Rehearsal
from pipex.partition.own_forward.stage import Course, ModelStage, cut_units
from pipex.partition.own_forward.stage_tree import Places
from pipex.partition.own_forward.stand_ins import stand_ins
from pipex.partition.own_forward.tree import part
from pipex.partition.own_forward.units import make_units
from pipex.partition.own_forward.verify import verify_stages

Counts = Callable[[Sequence[nn.Module]], Sequence[int]]
"""Of the units of a model how many each stage gets."""


def split_by_forward(
    model: nn.Module, counts: Counts, sample: Any, layers: Sequence[str] | None, verify: bool
) -> list[ModelStage]:
    """The stages. Arguments and errors as of ``split_model``."""
    refuse_untied([model])
    if verify and any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            "a model without values has nothing to verify its stages with", got="one on the meta device",
            needed="verify=False", fix="verify the stages of a smaller configuration of it instead",
        )  # fmt: skip
    paths = layer_paths(model, layers)
    parted = part(model, paths)
    arguments = Arguments(sample, no_cache(model))
    with _untouched(model, arguments.tensors):
        with stand_ins(model):
            args, kwargs = arguments.sample()
            try:
                with torch.enable_grad():
                    seen = record(model, parted, args, kwargs, seed)
            except PipexError:
                raise
            except Exception as error:
                raise InputError(
                    f"{type(model).__name__} cannot run on the sample", got=headline(error),
                    needed="a batch as those of training, on the model's device",
                ) from error  # fmt: skip
            chain = forms_of(seen)
            places = Places.of(model, parted)
            rehearsal = Rehearsal(model, parted, places, seen, chain, arguments.sample, arguments.floats, seed)
            needs = tuple(rehearsal.need(unit) for unit in range(len(seen.units)))
        units = make_units(seen, parted, needs)
        course = Course(arguments, chain, seen.units, needs, places, has_loss(seen.live))
        stages = cut_units(units, counts(units), model, course)
        if verify:
            verify_stages(model, stages, seen, arguments, seed)
    return stages


def seed(number: int) -> None:
    """Seeds torch's generators with it."""
    torch.manual_seed(number)


@contextmanager
def _untouched(model: nn.Module, sample: Sequence[Tensor]) -> Iterator[None]:
    """Around forwards that are not to be seen: puts back random numbers and what the model keeps."""
    devices = {t.device for t in (*model.parameters(), *sample) if t.is_cuda}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    gradients = [(p, p.grad) for p in model.parameters()]
    with torch.random.fork_rng(sorted(devices, key=str)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for parameter, gradient in gradients:
                parameter.grad = gradient
