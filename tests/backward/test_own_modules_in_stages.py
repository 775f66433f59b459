"""Modules that make their weight gradients themselves: in pipelines, in torch's schedules, under FSDP2 and DDP."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import persistent
import plain_loop
import pytest
import torch
from delayed_linear import DelayedLinear
from own_models import WIDTH, Mixed, micro_batch, owned, twins
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn.parallel import DistributedDataParallel
from torch_group import in_group

import pipex
from pipex.backward import Splitter, dw_builder
from pipex.errors import UnsupportedModule
from pipex.partition import profile_layers


def replicated(mode: str) -> str:
    model = DistributedDataParallel(Mixed())
    whole = copy.deepcopy(model.module)
    for part in owned(whole):
        part.delayed = False
    assert Splitter.of(whole).own
    module: nn.Module = model if mode == "stage" else nn.Sequential(model)
    x, _ = micro_batch(0)
    stage = PipelineStage(module, 0, 1, torch.device("cpu"), input_args=(x,), output_args=(x,))
    with pipex.drop_in(), pytest.raises(UnsupportedModule) as refused:
        schedules.ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss).step(x, target=x)
    return str(refused.value)


@pytest.mark.parametrize("mode", ["stage", "part"])
def test_ddp_is_refused_by_name(mode: str, tmp_path: Path) -> None:
    """It would reduce a gradient that is not there yet."""
    assert re.match(r".*own makes its weight gradients by itself", in_group(tmp_path / "store", 0, 1, replicated, mode))


def sharded() -> None:
    model, whole = twins(Mixed)
    for module in (model, whole):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    splitter = Splitter.of(model)
    waiting = []
    for number in range(3):
        x, dy = micro_batch(number)
        with splitter.record() as tape:
            y = model(x)
        tape.backward_input([y], [dy], [x])
        waiting.append(tape)
        whole(x).backward(dy)
    assert model.own.calls == 0
    for tape in waiting:
        tape.backward_weight()
    for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.grad.to_local(), reference.grad.to_local()), name


def test_they_wait_under_fsdp2(tmp_path: Path) -> None:
    in_group(tmp_path / "store", 0, 1, sharded)


def small() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 6), DelayedLinear(6), nn.Tanh(), DelayedLinear(6), nn.Linear(6, 6), nn.Linear(6, 3)
    )


@pytest.mark.parametrize("family", ["zb-h1", "1f1b", "gpipe"])
def test_a_pipeline_trains_them(family: str) -> None:
    """Split and unsplit; with an evaluation in between, which leaves nothing."""
    reference = twins(small)[1]
    optimizer = plain_loop.adam(reference.parameters())
    pipe = plain_loop.pipeline(family, small)
    for step in range(3):
        loss = pipe.step(*plain_loop.data(step))
        optimizer.zero_grad()
        assert loss == plain_loop.backward(reference, plain_loop.data(step))
        optimizer.step()
        pipe.evaluate(*plain_loop.data(step))
    found = plain_loop.parameters_of(pipe)
    for name, parameter in reference.named_parameters():
        assert torch.equal(found[name], parameter), name
    pipe.close()


def test_profiling_leaves_nothing_in_their_queues() -> None:
    model = small()
    costs = profile_layers(model, torch.randn(2, 6), torch.randn(2, 3), nn.functional.mse_loss, passes=2)
    assert len(costs.layers if hasattr(costs, "layers") else costs) > 0
    assert not any(part.queue for part in owned(model))


def stages(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), DelayedLinear(WIDTH)) for _ in range(count)]


def train_in_torchs_schedule(name: str, around: str, rank: int) -> list[list[Any]]:
    """Two steps on two ranks; the gradients of this rank's stages. Shapes are found by torch."""
    mesh = init_device_mesh("cpu", (2,))
    single = name in ("GPipe", "1F1B")
    modules = stages(2 if single else 4)
    mine = {i: modules[i] for i in range(rank, len(modules), 2)}
    if around == "builder":
        made = [
            PipelineStage(m, i, len(modules), torch.device("cpu"), group=mesh.get_group(), dw_builder=dw_builder(m))
            for i, m in mine.items()
        ]
    else:
        made = [PipelineStage(m, i, len(modules), torch.device("cpu"), group=mesh.get_group()) for i, m in mine.items()]
    schedule = getattr(schedules, f"Schedule{name}")(made[0] if single else made, 4, loss_fn=nn.functional.mse_loss)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    with pipex.drop_in():
        for _ in range(2):
            schedule.step(*([x] if rank == 0 else []), target=x if len(modules) - 1 in mine else None, losses=[])
    for module in mine.values():
        assert not any(part.queue for part in owned(module))
    return [[p.grad.numpy() for p in module.parameters()] for module in mine.values()]


@pytest.mark.parametrize(
    ("name", "around"),
    [("GPipe", "drop_in"), ("1F1B", "drop_in"), ("InterleavedZeroBubble", "drop_in"),
     ("InterleavedZeroBubble", "builder")],
)  # fmt: skip
def test_torchs_schedules_have_their_gradients(name: str, around: str, tmp_path: Path) -> None:
    """Also those of the first step, though torch looks at the shapes by a backward that nobody asked for."""
    found = persistent.ranks.results(
        [partial(in_group, tmp_path / "store", n, 2, train_in_torchs_schedule, name, around, n) for n in range(2)]
    )
    modules = stages(2 if name in ("GPipe", "1F1B") else 4)
    whole = nn.Sequential(*modules)
    for part in owned(whole):
        part.delayed = False
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for part in x.chunk(4):
            nn.functional.mse_loss(whole(part), part).backward()
        for parameter in whole.parameters():
            parameter.grad.div_(4)
    for index, module in enumerate(modules):
        for gradient, parameter in zip(found[index % 2][index // 2], module.parameters(), strict=True):
            assert torch.equal(torch.from_numpy(gradient), parameter.grad)
