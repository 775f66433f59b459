"""Stages that FSDP2 shards: their weight gradients wait, and are reduced behind a stage's last W."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import persistent
import pytest
import torch
import torch.nn.functional as F
from replicated_steps import (
    WIDTH,
    Adapted,
    Around,
    Block,
    Cast,
    Checkpointed,
    Job,
    Products,
    Seen,
    Spare,
    check,
    looking,
    mine_of,
    results,
)
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch_group import in_group

from pipex.backward.splitter import Splitter
from pipex.backward.tape import Tape

LOW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(module: nn.Module, mesh: DeviceMesh, seen: Seen, **options: Any) -> nn.Module:
    """Every block by itself, and the rest of the stage."""
    for part in module.modules():
        if isinstance(part, Spare):
            fully_shard([part.first, part.spare], mesh=mesh, **options)
        elif isinstance(part, Block) and options:
            fully_shard(part, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.hooks.update([name]))
    return module


def replicated(module: nn.Module, mesh: DeviceMesh, seen: Seen) -> nn.Module:
    """By what FSDP2 has for that."""
    replicate(module, mesh=mesh)
    return module


JOBS = {
    "whole stages": Job(sharded),
    "blocks that are gathered anew": Job(partial(sharded, reshard_after_forward=True)),
    "blocks in bfloat16": Job(partial(sharded, mp_policy=LOW)),
    "groups that run in part": Job(sharded, block=Spare),
    "gradients that are accumulated over steps": Job(partial(sharded, mp_policy=LOW), clear=False),
    "weights made of parameters": Job(sharded, block=Adapted),
    "autocast": Job(sharded, block=Cast),
    "checkpoints": Job(partial(sharded, reshard_after_forward=True), block=Checkpointed),
    "checkpoints around blocks": Job(partial(sharded, reshard_after_forward=True, mp_policy=LOW), block=Around),
    "replicas of what is sharded": Job(partial(sharded, mp_policy=LOW), data=(2, 2)),
    "replicas": Job(replicated),
    "a V": Job(partial(sharded, mp_policy=LOW), pipe=2, schedule="ZBVZeroBubble", dtype=torch.bfloat16),
    "interleaved": Job(sharded, pipe=2, schedule="InterleavedZeroBubble"),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_weight_gradients_wait_and_have_the_bits_of_torch_s_whole_backward(tmp_path: Path, job: Job) -> None:
    ours, theirs = results(job, tmp_path / "store")
    check(ours, theirs, whole=bool(job.schedule))
    for our, their in zip(ours, theirs, strict=True):
        assert kinds(our, "foreach_all_gather") == kinds(their, "foreach_all_gather")
        assert kinds(our, "foreach_reduce") == kinds(their, "foreach_reduce") > 0
        assert ("foreach_reduce", "") in our.events, "in the schedule's own action"
        assert not {("foreach_reduce", "I"), ("foreach_reduce", "W"), ("foreach_all_gather", "W")} & set(our.events)


def test_the_parameters_of_a_stage_are_gathered_once(tmp_path: Path) -> None:
    for seen in results(Job(sharded, steps=3), tmp_path / "store")[0]:
        assert kinds(seen, "foreach_all_gather") == 2 * 3  # of two stages


class Pair(nn.Module):
    """A weight that is made of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.b @ self.a))


class Prompted(nn.Module):
    """An operation whose input is a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.weight = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(self.prompt.view(1, WIDTH), self.weight)


def layer() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


class Loop(NamedTuple):
    """A loop without torch's schedules.

    Attributes:
        layers: between which the data is cut.
        policy: in which precision.
        sync: the micro-batches of a step that FSDP2 is told to reduce with; others wait for them.
        reshard: whether what was gathered is let go after each backward.
        exact: as of ``Splitter``.
    """

    layers: tuple[Callable[[], nn.Module], ...] = (Block, Block)
    policy: MixedPrecisionPolicy = MixedPrecisionPolicy()
    sync: frozenset[int] = frozenset({2})
    reshard: bool = True
    exact: bool | None = None
    order: str = "F0 F1 I0 F2 I1 W0 I2 W1 W2"


def trained(rank: int, loop: Loop, split: bool) -> tuple[list[Any], Seen]:
    """Gradients after two steps of three micro-batches."""
    mesh, seen = init_device_mesh("cpu", (2,)), Seen()
    torch.manual_seed(0)
    module = nn.Sequential(*(make() for make in loop.layers))
    shapes = {tuple(p.shape) for p in module.parameters() if p.dim() > 1}
    for part in (*module, module):
        fully_shard(part, mesh=mesh, mp_policy=loop.policy)
    module.set_reshard_after_backward(loop.reshard)
    splitter = Splitter.of(module, loop.exact)
    generator = torch.Generator().manual_seed(rank)
    tapes: dict[int, tuple[Tape, Tensor, Tensor]] = {}
    order = loop.order if split else re.sub(r"W\d", "", loop.order).replace("I", "B")
    with looking(seen, shapes):
        for action in 2 * order.split():
            seen.now, microbatch = action[0], int(action[1])
            if seen.now == "F":
                x = torch.randn(4, WIDTH, generator=generator).requires_grad_()
                tape = splitter.record()
                with tape if split else nullcontext():
                    tapes[microbatch] = tape, x, module(x)
                continue
            module.set_requires_gradient_sync(microbatch in loop.sync)
            module.set_is_last_backward(microbatch == 2)
            tape, x, y = tapes[microbatch]
            with Products(seen, shapes):
                if seen.now == "I":
                    tape.backward_input([y], [torch.ones_like(y)], [x])
                elif seen.now == "W":
                    tape.backward_weight(more=microbatch == 1)
                    assert not loop.reshard or all(isinstance(p, DTensor) for p in module.parameters())
                else:
                    y.backward(torch.ones_like(y))
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return [mine_of(p.grad) for p in module.parameters()], seen


LOOPS = {
    "reduced once": Loop(),
    "reduced with each": Loop(sync=frozenset({0, 1, 2}), order="F0 I0 F1 W0 I1 F2 W1 I2 W2"),
    "in bfloat16": Loop(policy=LOW),
    "kept gathered": Loop(policy=LOW, reshard=False),
    "by products that may be made together": Loop(layers=(layer, layer), policy=LOW, exact=False),
    "sums of W alone": Loop(policy=LOW, order="F0 F1 F2 I0 I1 I2 W0 W1 W2"),
    "weights made of parameters": Loop(layers=(Block, Pair, Block)),
    "inputs that are parameters": Loop(layers=(Block, Prompted, Block)),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_without_a_schedule_w_reduces_as_a_backward_would(tmp_path: Path, loop: Loop) -> None:
    ours, theirs = (
        persistent.ranks.results(
            [partial(in_group, tmp_path / str(split), rank, 2, trained, rank, loop, split) for rank in range(2)]
        )
        for split in (True, False)
    )
    for (found, seen), (wanted, whole) in zip(ours, theirs, strict=True):
        for gradient, reference in zip(found, wanted, strict=True):
            assert gradient.tobytes() == reference.tobytes()
        assert seen.products["I"] == 0
        assert seen.products["W"] == whole.products["B"] > 0
        reductions = [now for name, now in seen.events if name == "foreach_reduce"]
        assert reductions == ["W"] * kinds(whole, "foreach_reduce")
        assert seen.events[-1] == ("0 buffers held", "W")


def kinds(seen: Seen, event: str) -> int:
    return sum(name == event for name, _ in seen.events)


def parts_alone(module: nn.Module, mesh: DeviceMesh, seen: Seen) -> nn.Module:
    """Without the stage around them."""
    for part in [part for part in module.modules() if isinstance(part, Block)]:
        fully_shard(part, mesh=mesh)
        for name, parameter in part.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.hooks.update([name]))
    return module


def test_parts_of_a_stage_are_reduced_with_each_micro_batch_as_torch_does(tmp_path: Path) -> None:
    check(*results(Job(parts_alone), tmp_path / "store"))
