"""Models of Hugging Face in pipelines whose tensors are changed as a training would."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from hf_zoo import Example
from torch import Tensor, nn

import pipex


def pipeline_of(example: Example, model: nn.Module, schedule: str = "1f1b", **options: Any) -> pipex.Pipeline:
    plan = pipex.build(schedule, pipex.current_world().ranks, 4)
    stages = pipex.split_model(model, plan, sample=example.batch(model, 0), verify=False)
    return pipex.Pipeline(stages, plan, _no_loss, **options)


def _no_loss(output: Any, target: Any) -> Tensor:
    raise AssertionError("nothing runs here")


def names_of(pipeline: pipex.Pipeline) -> dict[str, Tensor]:
    return {name: tensor for stage in pipeline.local_stages for name, tensor in stage.names.items()}


def change(names: Mapping[str, Tensor]) -> None:
    """What is trained, by the names of tensors alone."""
    with torch.no_grad():
        for name, tensor in names.items():
            if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)):
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                tensor.add_(torch.randn(tensor.shape, generator=generator))


def changed(model: nn.Module) -> nn.Module:
    """The whole model, as all stages together are after ``change``."""
    saved = model.state_dict().keys()
    change({name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if name in saved})
    return model
