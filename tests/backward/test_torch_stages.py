"""What stages and schedules of torch do beside a plain step, with our backward in them: on two real ranks, against the
gradients of the whole model in one process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import persistent
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch_group import in_group

import pipex
from pipex.backward import dw_builder
from pipex.backward.tape import Tape

WORDS, WIDTH, LENGTH, RANKS = 7, 6, 3, 2
CPU = torch.device("cpu")
STEP = inspect.signature(schedules.PipelineScheduleMulti.step).parameters


class Head(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Middle(nn.Module):
    def __init__(self, linear: nn.Linear | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH) if linear is None else linear

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.tanh(self.linear(x) * scale)


def model(stages: int = 4) -> list[nn.Module]:
    """Stages of a V: the first and the last one share the table, those in the middle, where there are two, a linear."""
    torch.manual_seed(0)
    table = nn.Embedding(WORDS, WIDTH)
    middle = [Middle()]
    middle += [Middle(middle[0].linear) for _ in range(stages - 3)]
    return [module.double() for module in (table, *middle, Head(table))]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def batch(samples: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, WORDS, (samples, LENGTH), generator=torch.Generator().manual_seed(1))
    return tokens, tokens.roll(-1, 1)


def in_v(rank: int) -> list[int]:
    return [rank, 2 * RANKS - 1 - rank]


def interleaved(rank: int) -> list[int]:
    return [rank, RANKS + rank]


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a body (rank) in a process for each rank of a Gloo group; what they return."""
    number = iter(range(100))

    def run(body: Callable[..., Any], *arguments: Any) -> list[Any]:
        store = tmp_path / f"store{next(number)}"
        return persistent.ranks.results(
            [partial(in_group, store, rank, RANKS, body, rank, *arguments) for rank in range(RANKS)]
        )

    return run


def stages_for(modules: list[nn.Module], mine: list[int], **more: Any) -> list[PipelineStage]:
    return [PipelineStage(modules[i], i, len(modules), CPU, **more) for i in mine]


def gradients_of(modules: list[nn.Module], mine: list[int]) -> dict[str, list[Any]]:
    return {str(i): [p.grad.tolist() for p in modules[i].parameters()] for i in mine}


def check(found: list[dict[str, list[Any]]], whole: list[nn.Module]) -> None:
    for of_rank in found:
        for index, gradients in of_rank.items():
            for gradient, parameter in zip(gradients, whole[int(index)].parameters(), strict=True):
                torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), parameter.grad)


def one_process(microbatches: int, *, scale: float = 1.0, divided: bool = True) -> list[nn.Module]:
    """The whole model with the mean (or sum) of its micro-batches' gradients."""
    whole = model()
    tokens, target = batch(2 * microbatches)
    for x, y in zip(tokens.chunk(microbatches), target.chunk(microbatches), strict=True):
        for module in whole:
            x = module(x, scale) if isinstance(module, Middle) else module(x)
        (loss_fn(x, y) / (microbatches if divided else 1)).backward()
    return whole


def tied_step(rank: int, schedule: str, scale_grads: bool) -> dict[str, list[Any]]:
    modules, mine = model(), in_v(rank)
    runner = getattr(schedules, f"Schedule{schedule}")(
        stages_for(modules, mine), n_microbatches=4, loss_fn=loss_fn, scale_grads=scale_grads
    )
    tokens, target = batch(8)
    with pipex.drop_in():
        for _ in range(2):  # the second one finds its counts as the first did
            for index in mine:
                modules[index].zero_grad()
            runner.step(*((tokens,) if rank == 0 else ()), target=target if rank == 0 else None)
    return gradients_of(modules, mine)


@pytest.mark.parametrize(
    ("schedule", "scale_grads"), [("ZBVZeroBubble", True), ("DualPipeV", True), ("ZBVZeroBubble", False)]
)
def test_a_parameter_in_two_stages_of_a_rank_is_divided_once(
    on_ranks: Callable[..., list[Any]], schedule: str, scale_grads: bool
) -> None:
    check(on_ranks(tied_step, schedule, scale_grads), one_process(4, divided=scale_grads))


def untied(stages: int = 4) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Embedding(WORDS, WIDTH).double(), *(Middle().double() for _ in range(stages - 2)),
            nn.Linear(WIDTH, WORDS).double()]  # fmt: skip


def unsplit(microbatches: int) -> list[nn.Module]:
    whole = untied()
    tokens, target = batch(2 * microbatches)
    for x, y in zip(tokens.chunk(microbatches), target.chunk(microbatches), strict=True):
        (loss_fn(nn.Sequential(*whole)(x), y) / microbatches).backward()
    return whole


def built_step(rank: int) -> tuple[dict[str, list[Any]], int]:
    modules, mine = untied(), interleaved(rank)
    deferred = 0
    run_weight = Tape.backward_weight

    def count(tape: Tape, more: bool = False) -> None:
        nonlocal deferred
        deferred += 1
        run_weight(tape, more)

    stages = [PipelineStage(modules[i], i, 4, CPU, dw_builder=dw_builder(modules[i])) for i in mine]
    runner = schedules.ScheduleInterleavedZeroBubble(stages, n_microbatches=4, loss_fn=loss_fn)
    tokens, target = batch(8)
    with mock.patch.object(Tape, "backward_weight", count):
        runner.step(*((tokens,) if rank == 0 else ()), target=target if rank == 1 else None)
    return gradients_of(modules, mine), deferred


def test_a_stage_with_our_dw_builder_runs_in_torch_s_schedule(on_ranks: Callable[..., list[Any]]) -> None:
    found = on_ranks(built_step)
    check([gradients for gradients, _ in found], unsplit(4))
    # Every micro-batch of both stages; torch's look at the shapes may have left some more to be asked for.
    assert all(deferred >= 8 for _, deferred in found)


def cut_step(rank: int) -> dict[str, list[Any]]:
    modules, mine = model(), in_v(rank)
    runner = schedules.ScheduleZBVZeroBubble(stages_for(modules, mine), n_microbatches=4, loss_fn=loss_fn)
    tokens, target = batch(8)
    arguments: dict[str, Any] = {"kwarg_mbs": [{} if rank == 0 else {"scale": 0.5}] * 4}
    if rank == 0:
        arguments |= {"arg_mbs": [(x,) for x in tokens.chunk(4)], "target_mbs": list(target.chunk(4))}
    with pipex.drop_in():
        runner.step(**arguments)
    return gradients_of(modules, mine)


@pytest.mark.skipif("arg_mbs" not in STEP, reason="torch 2.14 and newer take ready micro-batches")
def test_ready_micro_batches_come_through(on_ranks: Callable[..., list[Any]]) -> None:
    check(on_ranks(cut_step), one_process(4, scale=0.5))


def sharded_steps(rank: int, ours: bool) -> list[Any]:
    """Two calls of step that accumulate, the last of which reduces; each rank is a pipeline of two stages by itself."""
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("data", "pipe"))
    modules = [nn.Sequential(*untied()[:2]).float(), nn.Sequential(*untied()[2:]).float()]
    for module in modules:
        fully_shard(module, mesh=mesh["data"])
    stages = stages_for(modules, [0, 1], group=mesh.get_group("pipe"))
    runner = schedules.ScheduleInterleavedZeroBubble(stages, n_microbatches=2, loss_fn=loss_fn)
    tokens, target = batch(8)
    mine = slice(4 * rank, 4 * rank + 4)
    around = pipex.drop_in() if ours else None
    runner.step(tokens[mine], target=target[mine], finalize_gradients=False)
    runner.step(tokens[mine], target=target[mine])
    if around is not None:
        around.undo()
    gradients = [p.grad for module in modules for p in module.parameters()]
    return [g.full_tensor().tolist() if isinstance(g, DTensor) else g for g in gradients]


@pytest.mark.skipif("finalize_gradients" not in STEP, reason="torch 2.15 and newer accumulate over steps")
def test_gradients_are_accumulated_over_steps_as_torch_does(on_ranks: Callable[..., list[Any]]) -> None:
    ours, theirs = on_ranks(sharded_steps, True), on_ranks(sharded_steps, False)
    assert all(gradient is not None for gradient in ours[0])
    for found, wanted in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted))


class Seen(nn.Module):
    """Tells which of its outputs are still there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.made: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if torch.is_grad_enabled() and y.device.type == "cpu":
            self.made.append(StorageWeakRef(y.untyped_storage()))
        return y


def freeing_step(rank: int, ours: bool) -> int:
    """Most outputs of the first stage that are there at once when a backward begins."""
    modules = untied()
    modules[0] = seen = Seen(modules[0])
    runner = schedules.ScheduleInterleavedZeroBubble(
        stages_for(modules, interleaved(rank)), n_microbatches=8, loss_fn=loss_fn
    )
    tokens, target = batch(16)
    most = 0
    around = pipex.drop_in() if ours else None
    backward = PipelineStage.backward_one_chunk

    def count(self: PipelineStage, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        most = max(most, sum(not storage.expired() for storage in seen.made))
        backward(self, *args, **kwargs)

    with mock.patch.object(PipelineStage, "backward_one_chunk", count):
        runner.step(*((tokens,) if rank == 0 else ()), target=target if rank == 1 else None)
    if around is not None:
        around.undo()
    return most


@pytest.mark.skipif("finalize_gradients" not in STEP, reason="torch 2.15 and newer free outputs that are sent")
def test_outputs_that_are_sent_are_freed(on_ranks: Callable[..., list[Any]]) -> None:
    ours, theirs = on_ranks(freeing_step, True)[0], on_ranks(freeing_step, False)[0]
    assert 0 < ours <= theirs
