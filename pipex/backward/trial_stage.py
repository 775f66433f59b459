"""A small stage of torch's own make, tried before anything of a user's runs with ``drop_in()``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from pipex.torch_internals import prepare_alone

CPU = torch.device("cpu")


def try_split() -> None:
    """Runs F, I and W of micro-batch 0 of stage 0 through whatever torch.distributed.pipelining has now.

    Raises:
        ArithmeticError: the gradients are not those of one backward, or W was not deferred.
        Exception: whatever torch says of it.
    """
    with torch.random.fork_rng(devices=()):  # a model that is made after drop_in() begins as without it
        module = nn.Sequential(nn.Linear(3, 4, device=CPU), nn.Tanh(), nn.Linear(4, 2, device=CPU))
    x = torch.linspace(-1, 1, 6, device=CPU).reshape(2, 3)
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(module(x).sum(), parameters)
    with _some_world():
        stage = PipelineStage(module, 0, dist.get_world_size(), CPU, input_args=x, output_args=x.new_zeros(2, 2))
    stage.num_stages = stage.chunks = 1  # and so the last one, which needs no gradient from another
    stage.has_backward = True
    prepare_alone(stage)
    loss = stage.forward_one_chunk(0, (x,), {}).sum()  # 2.11 knows no default
    stage.backward_one_chunk(0, loss=loss, full_backward=False)
    deferred = all(parameter.grad is None for parameter in parameters)
    stage.backward_weight_one_chunk(0)
    right = all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(parameters, wanted, strict=True))
    if not (deferred and right):
        raise ArithmeticError(f"weight gradients in W: {deferred}, those of one backward: {right}")


def _some_world() -> AbstractContextManager[object]:
    """A stage asks for its place in the world when it is made, and does not exist without one."""
    if dist.is_initialized():
        return nullcontext()
    return mock.patch.multiple(
        dist, get_rank=lambda group=None: 0, get_world_size=lambda group=None: 1, get_backend=lambda group=None: "gloo"
    )
