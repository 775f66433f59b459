"""Models of Hugging Face in stages, without a forward: for what has to do with their tensors alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipex
from pipex.partition.stage import Stage, cut


class Held(nn.Module):
    """What stands in a module beside its children."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)


def pieces(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of all stacks, the largest modules outside of them, and what stands between these."""
    if isinstance(module, nn.ModuleList):
        yield from module
    elif any(isinstance(inner, nn.ModuleList) and len(inner) > 1 for inner in module.modules()):
        for child in module.children():
            yield from pieces(child)
        if any(True for _ in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
            yield Held(module)
    elif module.state_dict():
        yield module


def stages_of(model: nn.Module, plan: pipex.plan.Plan) -> list[Stage]:
    layers = list(pieces(model))
    count = plan.placement.pieces
    whole, more = divmod(len(layers), count)
    return cut(layers, [whole + (stage < more) for stage in range(count)], model)


def pipeline_of(model: nn.Module, schedule: str = "1f1b") -> pipex.Pipeline:
    plan = pipex.build(schedule, pipex.current_world().ranks, 4)
    return pipex.Pipeline(stages_of(model, plan), plan, F.mse_loss)


def change(names: Mapping[str, Tensor]) -> None:
    """As a training would, but by the names of tensors alone."""
    with torch.no_grad():
        for name, tensor in names.items():
            if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)):
                tensor.add_(
                    torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
                )


def changed(model: nn.Module) -> nn.Module:
    """The whole model, as all stages together are after ``change``."""
    saved = model.state_dict().keys()
    change({name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if name in saved})
    return model


def names_of(pipeline: pipex.Pipeline) -> dict[str, Tensor]:
    return {name: tensor for stage in pipeline.local_stages for name, tensor in stage.names.items()}
