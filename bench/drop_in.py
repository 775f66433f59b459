"""A training step of torch.distributed.pipelining, with and without ``pipex.drop_in()``.

    pipex   torch's schedule inside of pipex.drop_in()
    torch   the same schedule as it is

Both run in the same processes over Gloo on the loopback interface, in the same rounds: two chunks per rank, four
transformer blocks per stage, and twice as many micro-batches as stages, so that every W that the schedule moves is a
part of the step. Putting the replacements in and out again is not timed. A step's time is the slowest rank's.

Regimes: ``fp32``, the stages as they are; ``autocast``, every block under bfloat16 autocast; ``checkpointed``, every
block in an activation checkpoint; ``fsdp2``, two replicas of the pipeline, each stage in FSDP2 over both and each block
in a group of its own.

Before anything is timed, and after every step, the gradients are compared with those of one process: plain autograd,
one micro-batch after the other, summed in the order in which the schedule has this rank's W. pipex's must be equal bit
by bit, torch's within ``TOLERANCE``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from pipex.backward.drop_in import drop_in
from pipex.bench import regimes, torch_group
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.environment import environment
from pipex.bench.options import add_common, floors_of, rounds_of
from pipex.bench.report import Row, finish
from pipex.bench.step import TimedStep
from pipex.errors import InputError
from pipex.models.transformer import Block, ModelConfig
from pipex.runtime.launch import launch
from pipex.runtime.worlds import current_world
from pipex.transport.interface import World

PROVIDER, PEER = "pipex", "torch"
CHUNKS = 2  # per rank; ZBV has no other
BLOCKS = 4  # per stage
SHAPE = (2, 16, 64)  # of a micro-batch: sequences, positions, width
THREADS = 1  # of each rank: a width of 64 has nothing to share out
TOLERANCE = 1e-5
"""Largest error of torch's gradients, relative to the tensor's largest element."""

SCHEDULES: dict[str, type[PipelineScheduleMulti]] = {
    "zbv": ScheduleZBVZeroBubble,
    "interleaved-zb": ScheduleInterleavedZeroBubble,
}
"""pipex's name of a schedule -> torch's class."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``pipex bench drop-in``."""
    parser.description = "A training step of torch.distributed.pipelining (Gloo), with and without pipex.drop_in()."
    parser.add_argument("--schedules", default="zbv,interleaved-zb", help="of zbv and interleaved-zb (default: both)")
    parser.add_argument("--ranks", metavar="COUNT,...", default="2,4",
                        help="of two chunks each; a case is SCHEDULE/RANKS (default: 2,4)")  # fmt: skip
    parser.add_argument("--regimes", default="fp32", help=f"of {', '.join(REGIMES)} (default: fp32); a case of another "
                        "one is SCHEDULE/RANKS/REGIME")  # fmt: skip
    add_common(parser, samples=20, floor="how many times faster drop_in() must make a step, such as zbv/2=1.4")


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code."""
    rounds, chosen = rounds_of(options), cases(options.schedules, options.ranks, options.regimes)
    floors = floors_of(options, PROVIDER, [case.name for case in chosen])
    return finish(environment(THREADS), measure(chosen, rounds), floors, as_json=options.json)


@dataclass(frozen=True, slots=True)
class Case:
    """A schedule on a number of ranks, which each replica of the pipeline has, in a regime."""

    schedule: str
    ranks: int
    regime: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.schedule}/{self.ranks}" + ("" if self.regime == "fp32" else f"/{self.regime}")

    @property
    def replicas(self) -> int:
        return 2 if self.regime == "fsdp2" else 1

    @property
    def stages(self) -> int:
        return CHUNKS * self.ranks

    @property
    def microbatches(self) -> int:
        return 2 * self.stages

    def stages_of(self, rank: int) -> list[int]:
        """Their indices, in the order in which torch's schedule wants them."""
        if self.schedule == "zbv":
            return [rank, self.stages - 1 - rank]
        return list(range(rank, self.stages, self.ranks))

    def modules(self) -> list[nn.Module]:
        """Of all stages; the same weights on every call."""
        config = ModelConfig(width=SHAPE[2], heads=4, layers=BLOCKS, context=SHAPE[1])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            wrapped = REGIMES[self.regime]
            return [nn.Sequential(*(wrapped(Block(config)) for _ in range(BLOCKS))) for _ in range(self.stages)]

    def batch(self, replica: int) -> tuple[Tensor, Tensor]:
        """Input and target, the same on every call."""
        generator = torch.Generator().manual_seed(1 + replica)
        shape = (self.microbatches * SHAPE[0], *SHAPE[1:])
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def cases(schedules: str, ranks: str, named: str = "fp32") -> list[Case]:
    """Every schedule on every number of ranks in every regime, from texts such as ``zbv,interleaved-zb`` and ``2,4``.

    Raises:
        InputError: a schedule that does not split its backward or that torch does not have, too few ranks, or no such
            regime.
    """
    found = []
    chosen = named.split(",")
    regimes.check(chosen, list(REGIMES))
    for count in ranks.split(","):
        if not (count.isdecimal() and int(count) > 1):
            raise InputError("not a number of ranks", got=repr(count), needed="at least 2")
        for schedule in schedules.split(","):
            if schedule not in SCHEDULES:
                raise InputError("not a schedule of torch's that splits its backward", got=repr(schedule),
                                 needed=f"one of {', '.join(SCHEDULES)}")  # fmt: skip
            found += [Case(schedule, int(count), regime) for regime in chosen]
    return found


def measure(cases: Sequence[Case], rounds: Rounds) -> list[Row]:
    """Two rows per case."""
    ranks = {case: launch(_rank, case.ranks * case.replicas, args=(asdict(case), asdict(rounds))) for case in cases}
    return [row for case in cases for row in _rows(case, ranks[case])]


def _rows(case: Case, ranks: Sequence[Mapping[str, Any]]) -> list[Row]:
    """``ranks[r]`` is what ``_rank`` returned on rank r."""
    slowest = {
        name: quantiles([max(times) for times in zip(*(rank["samples"][name] for rank in ranks), strict=True)])
        for name in (PROVIDER, PEER)
    }
    return [
        Row(case.name, name, {"shape": SHAPE}, time, slowest[PEER].p50 / time.p50,
            all(rank["correct"][name] for rank in ranks))
        for name, time in slowest.items()
    ]  # fmt: skip


def _rank(case: Mapping[str, Any], rounds: Mapping[str, int]) -> dict[str, Any]:
    """On each rank: its samples in µs, and whether its gradients were right, by provider."""
    torch.set_num_threads(THREADS)
    world = current_world()
    with torch_group.joined(world):
        return _measure_case(world, Case(**case), Rounds(**rounds))


def _measure_case(world: World, case: Case, rounds: Rounds) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (case.replicas, case.ranks), mesh_dim_names=("replica", "pipe"))
    with_pipex, without = _Step(case, mesh), _Step(case, mesh)
    wanted = without.shards(unsplit(case, case.stages_of(mesh.get_local_rank("pipe")), without.order_of_weights()))
    steps = {
        PROVIDER: TimedStep(world, with_pipex.run, wanted, tolerance=0),
        PEER: TimedStep(world, without.run, wanted, TOLERANCE),
    }

    def sample_pipex() -> float:
        with drop_in():
            return steps[PROVIDER].sample()

    providers = {PROVIDER: sample_pipex, PEER: steps[PEER].sample}
    for sample in providers.values():
        sample()  # compares; and torch's stages tell each other their shapes in their first step
    times = rounds.interleave(providers)
    return {"samples": times, "correct": {name: step.correct for name, step in steps.items()}}


class _Step:
    """Steps of torch's schedule on this rank's stages."""

    def __init__(self, case: Case, mesh: DeviceMesh) -> None:
        modules = case.modules()
        self._rank = mesh.get_local_rank("pipe")
        mine = case.stages_of(self._rank)
        if case.regime == "fsdp2":
            for index in mine:
                for part in (*modules[index].children(), modules[index]):
                    fully_shard(part, mesh=mesh["replica"], reshard_after_forward=False)
        self._parameters = [p for index in mine for p in modules[index].parameters()]
        cpu, pipe = torch.device("cpu"), mesh.get_group("pipe")
        stages: list[Any] = [PipelineStage(modules[index], index, case.stages, cpu, group=pipe) for index in mine]
        self._schedule: Any = SCHEDULES[case.schedule](stages, case.microbatches, loss_fn=nn.functional.mse_loss)
        batch, target = case.batch(mesh.get_local_rank("replica"))
        self._inputs = (batch,) if 0 in mine else ()
        self._target = target if case.stages - 1 in mine else None

    def run(self) -> list[Tensor]:
        for parameter in self._parameters:
            parameter.grad = None
        self._schedule.step(*self._inputs, target=self._target, losses=[], return_outputs=False)
        return [_local(p.grad) for p in self._parameters if p.grad is not None]

    def shards(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """What this rank has of them."""
        return [
            _local(distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g)
            for g, p in zip(gradients, self._parameters, strict=True)
        ]

    def order_of_weights(self) -> dict[int, list[int]]:
        """Of each of this rank's stages its micro-batches, in the order in which they add to the weight gradients."""
        order: dict[int, list[int]] = {}
        for action in self._schedule.pipeline_order[self._rank]:
            if action is not None and action.computation_type.value in ("B", "W"):
                order.setdefault(action.stage_index, []).append(action.microbatch_index)
        return order


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


REGIMES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fp32": regimes.as_it_is,
    "autocast": regimes.under_autocast,
    "checkpointed": regimes.checkpointed,
    "fsdp2": regimes.as_it_is,
}
"""By name, what becomes of a block."""


def unsplit(case: Case, indices: Sequence[int], order: Mapping[int, Sequence[int]]) -> list[Tensor]:
    """Gradients of these stages, the mean over all replicas: autograd's in one process, summed over the micro-batches
    in the given order."""
    replicas = [_unsplit(case, indices, order, replica) for replica in range(case.replicas)]
    return [sum(gradients[1:], gradients[0]).div(case.replicas) for gradients in zip(*replicas, strict=True)]


def _unsplit(case: Case, indices: Sequence[int], order: Mapping[int, Sequence[int]], replica: int) -> list[Tensor]:
    modules = case.modules()
    whole = nn.Sequential(*modules)
    parameters = {index: list(modules[index].parameters()) for index in indices}
    flat = [p for index in indices for p in parameters[index]]
    made = [
        iter(torch.autograd.grad(nn.functional.mse_loss(whole(x), y), flat))
        for x, y in zip(*(data.chunk(case.microbatches) for data in case.batch(replica)), strict=True)
    ]
    found = []
    for index in indices:
        for _ in parameters[index]:
            parts = [next(gradients) for gradients in made]
            total = parts[order[index][0]].clone()
            for microbatch in order[index][1:]:
                total += parts[microbatch]
            found.append(total.div_(case.microbatches))
    return found
