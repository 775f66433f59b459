"""Memory for stages of a model that was made on the meta device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipex.errors import UnsupportedModule
from pipex.partition.room import room_for
from pipex.partition.stage import Stage
from pipex.torch_internals import buffers_of, non_persistent_of, parameters_of


def materialize(stages: Sequence[Stage], device: torch.device) -> bool:
    """Gives the tensors of stages that are on the meta device memory on another one, without values; what several
    modules share stays one tensor.

    Returns:
        whether there were any.

    Raises:
        UnsupportedModule: one of them is a buffer that no checkpoint will have a value for.
        StageTooLarge: there is not so much memory.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # by id, with what it is made for, whose id nobody else has meanwhile
    for stage in stages:  # all of them before anything is changed
        for path, module in stage.layers.named_modules():
            for name, buffer in buffers_of(module).items():
                if buffer is not None and buffer.is_meta and name in non_persistent_of(module):
                    raise UnsupportedModule(
                        f"{stage.called(f'{path}.{name}')} has no values, and is in no checkpoint",
                        got="a buffer on the meta device that is not persistent", needed="one with values",
                        fix="compute it in the forward, or build the model layer by layer with pipex.build_stages",
                    )  # fmt: skip
    for stage in stages:
        with room_for(stage, device):
            for module in stage.layers.modules():
                for held in (parameters_of(module), buffers_of(module)):
                    for name, tensor in held.items():
                        if tensor is not None and not nn.parameter.is_lazy(tensor) and tensor.is_meta:
                            made.setdefault(id(tensor), (tensor, _empty(tensor, device)))
                            held[name] = made[id(tensor)][1]  # type: ignore[assignment]
    return bool(made)


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    memory = torch.empty_like(tensor, device=device)
    return nn.Parameter(memory, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else memory
