"""From a model and a sample to stages that run the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipex.errors import InputError, PipexError, headline
from pipex.hugging_face.conventions import no_cache, refuse_untied
from pipex.hugging_face.narrow import has_values, narrow
from pipex.partition.own_forward.arguments import Arguments
from pipex.partition.own_forward.crossing import Form, forms_of
from pipex.partition.own_forward.kept import Unwritten, own_attributes
from pipex.partition.own_forward.layer_lists import layer_paths
from pipex.partition.own_forward.loss import loss_in
from pipex.partition.own_forward.loss_check import in_mode, problem_with_loss
from pipex.partition.own_forward.random_numbers import seeds_from
from pipex.partition.own_forward.record import Record, Seed, record
from pipex.partition.own_forward.rehearsal import Need, Rehearsal
from pipex.partition.own_forward.stage import Course, ModelStage, cut_units
from pipex.partition.own_forward.stage_tree import Places
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
    arguments = Arguments(sample, no_cache(model))
    with _random_numbers_kept(model):
        runs = model if has_values(model) else narrow(model)
        with _untouched(runs):
            seed = seeds_from(0, next((p.device for p in runs.parameters()), torch.device("cpu")))
            learnt = _learn(runs, layers, arguments, seed)
            stages = learnt.cut(model, counts)
            if verify:
                verified = verify_stages(runs, stages if runs is model else learnt.cut(runs, counts), learnt.record,
                                         arguments, seed)  # fmt: skip
                problem = problem_with_loss(runs, arguments) if stages[-1].loss_seen else ""
                for stage in stages:
                    stage.verified, stage.loss_problem = verified, problem
    arguments.let_go()
    return stages


@dataclass(frozen=True, slots=True)
class _Learnt:
    """What a forward has shown."""

    layers: Sequence[str] | None
    arguments: Arguments
    record: Record
    chain: tuple[Form, ...]
    needs: tuple[Need, ...]

    def cut(self, model: nn.Module, counts: Counts) -> list[ModelStage]:
        """Stages of the model, or of a wider one."""
        parted = part(model, layer_paths(model, self.layers))
        units = make_units(self.record, parted, self.needs)
        places = Places.of(model, parted, self.record.set_within)
        loss_seen = loss_in(self.record.live) is not None
        course = Course(self.arguments, self.chain, self.record.units, self.needs, places, loss_seen)
        return cut_units(units, counts(units), model, course)


def _learn(model: nn.Module, layers: Sequence[str] | None, arguments: Arguments, seed: Seed) -> _Learnt:
    learnt = _learn_in_this_mode(model, layers, arguments, seed)
    with in_mode(model, not model.training):
        try:
            args, kwargs = arguments.sample()
            with torch.no_grad(), Unwritten(model):
                model(*args, **kwargs)
            other = _learn_in_this_mode(model, layers, arguments, seed)
        except Exception:  # there it runs on other samples, or not at all; if it is asked to, it is said then
            return learnt
    if other.chain != learnt.chain:
        return learnt
    return replace(learnt, needs=tuple(map(Need.both, learnt.needs, other.needs)))


def _learn_in_this_mode(model: nn.Module, layers: Sequence[str] | None, arguments: Arguments, seed: Seed) -> _Learnt:
    parted = part(model, layer_paths(model, layers))
    try:
        with torch.enable_grad():
            seen = record(model, parted, arguments, seed)
    except PipexError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot run on the sample", got=headline(error),
            needed="a batch as those of training, on the model's device",
        ) from error  # fmt: skip
    chain = forms_of(seen)
    places = Places.of(model, parted, seen.set_within)
    rehearsal = Rehearsal(model, parted, places, seen, chain, arguments.sample, seed)
    needs = tuple(rehearsal.need(unit) for unit in range(len(seen.units)))
    return _Learnt(layers, arguments, seen, chain, needs)


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(sorted(devices, key=str)):
        yield


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Around forwards that are not to be seen: puts back what the model keeps."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    kept = [(module, own_attributes(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, before in kept:  # forwards and rehearsals may tell modules something
            for name in own_attributes(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
