"""torch's schedules with ``drop_in()``: the bits of torch's unsplit backward, on real ranks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
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
from torch.nn.parallel import DistributedDataParallel
from torch_group import in_group

import pipex
from pipex import torch_internals
from pipex.backward import drop_in as drop_in_module
from pipex.backward.deferral import Deferral
from pipex.backward.drop_in import Step, deferral_of, drop_in
from pipex.backward.splitter import Splitter
from pipex.backward.tape import Tape
from pipex.plan.interop import write_torch_csv

WORDS, WIDTH, HEADS, LENGTH = 11, 8, 2, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Viewed(nn.Module):
    """Its output is a view, and so is that of its linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(x.shape)


def build_stages(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    middle = [nn.Sequential(Block(), Viewed()) for _ in range(count - 2)]
    return [nn.Sequential(nn.Embedding(WORDS, WIDTH), Block()), *middle, nn.Sequential(Block(), nn.Linear(WIDTH, 5))]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class Job:
    """What the ranks run."""

    schedule: str
    ranks: int
    chunks: int
    microbatches: int
    parallel: str = ""  # around a stage: "ddp" or "fsdp", over two replicas
    csv: str = ""
    compiled: str = ""  # "in place" or "wrapped"
    fused: bool = False  # as on a GPU

    @property
    def replicas(self) -> int:
        return 2 if self.parallel else 1

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def stages_of(self, rank: int) -> list[int]:
        if self.schedule in ("ZBVZeroBubble", "DualPipeV"):
            return [rank, self.stages - 1 - rank]
        return list(range(rank, self.stages, self.ranks))

    def shapes(self, index: int) -> dict[str, Tensor]:
        hidden = torch.zeros(2, LENGTH, WIDTH, requires_grad=True)
        outputs = torch.zeros(2, LENGTH, 5) if index == self.stages - 1 else hidden
        return {"input_args": torch.zeros(2, LENGTH).long() if index == 0 else hidden, "output_args": outputs}

    def data(self, replica: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7 + replica)
        shape = (2 * self.microbatches, LENGTH)
        return torch.randint(0, WORDS, shape, generator=generator), torch.randint(0, 5, shape, generator=generator)


Answer = tuple[dict[int, list[Any]], list[tuple[str, int, int]], int]
"""The gradients per stage, this rank's backward actions, and how often W was really deferred."""


def run_rank(job: Job, rank: int, replica: int, patches: ExitStack) -> Answer:
    """Two steps."""
    deferred = 0
    run_weight = Tape.backward_weight

    def count(tape: Tape, more: bool = False) -> None:
        nonlocal deferred
        outside = torch._C._current_graph_task_id() == -1  # of any backward pass
        deferred += outside and bool(tape.targets)
        run_weight(tape, more)

    patches.enter_context(mock.patch.object(Tape, "backward_weight", count))
    if job.fused:
        patches.enter_context(mock.patch.object(Splitter, "fuses", return_value=True))
    mesh = init_device_mesh("cpu", (job.replicas, job.ranks), mesh_dim_names=("data", "pipe"))
    modules = build_stages(job.stages)
    mine = {}
    for index in job.stages_of(rank):
        module: nn.Module = modules[index]
        if job.parallel == "ddp":
            module = DistributedDataParallel(module, process_group=mesh.get_group("data"))
        elif job.parallel == "fsdp":
            fully_shard(module, mesh=mesh["data"])
        if job.compiled == "in place":
            module[0].compile(backend="aot_eager")
        elif job.compiled == "wrapped":
            module = nn.Sequential(torch.compile(module, backend="aot_eager"))
        mine[index] = module
    # torch's own look at the shapes runs the accumulators' hooks, which DDP takes for those of a step; so it is told.
    told = job.shapes if job.parallel == "ddp" else lambda index: {}
    stages = [
        PipelineStage(module, index, job.stages, torch.device("cpu"), group=mesh.get_group("pipe"), **told(index))
        for index, module in mine.items()
    ]
    single = job.schedule in ("GPipe", "1F1B")
    around = drop_in() if job.compiled == "wrapped" else None  # without it torch refuses to make such a schedule
    if job.csv:
        schedule: Any = schedules._PipelineScheduleRuntime(stages, job.microbatches, loss_fn=loss_fn)
        schedule._load_csv(job.csv, format="compute_only")
    else:
        schedule = getattr(schedules, f"Schedule{job.schedule}")(
            stages[0] if single else stages, job.microbatches, loss_fn=loss_fn
        )
    inputs, target = job.data(replica)
    with drop_in():
        deferred = 0  # its own trial does not count
        for _ in range(2):
            for module in mine.values():
                module.zero_grad()
            arguments = (inputs,) if 0 in mine else ()
            schedule.step(*arguments, target=target if job.stages - 1 in mine else None, losses=[])
    if around is not None:
        around.undo()
    found = {}
    for index, module in mine.items():
        gradients = [p.grad for p in module.parameters()]
        gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        found[index] = [None if g is None else g.numpy() for g in gradients]
    orders = [] if single else [a for a in schedule.pipeline_order_with_comms[rank] if a is not None]
    flat = [part for action in orders for part in (action.sub_actions or (action,))]
    actions = [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in flat]
    return found, actions, deferred


def rank_process(job: Job, number: int) -> Answer:
    replica, rank = divmod(number, job.ranks)
    with warnings.catch_warnings(), ExitStack() as patches:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        return run_rank(job, rank, replica, patches)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Job], list[Answer]]:
    def start(job: Job) -> list[Answer]:
        world = job.ranks * job.replicas
        return persistent.ranks.results(
            [partial(in_group, tmp_path / "store", n, world, rank_process, job, n) for n in range(world)]
        )

    return start


def unsplit(job: Job, replica: int, orders: dict[int, list[int]]) -> dict[int, list[Tensor]]:
    """Autograd's own gradients, one micro-batch after the other in the order of each stage, in one process."""
    modules = build_stages(job.stages)
    inputs, target = job.data(replica)
    whole = nn.Sequential(*modules)
    parameters = [p for module in modules for p in module.parameters()]
    made = [
        torch.autograd.grad(loss_fn(whole(x), y), parameters)
        for x, y in zip(inputs.chunk(job.microbatches), target.chunk(job.microbatches), strict=True)
    ]
    found: dict[int, list[Tensor]] = {}
    place = 0
    for index, module in enumerate(modules):
        order = orders.get(index) or list(range(job.microbatches))
        found[index] = []
        for _ in module.parameters():
            total = made[order[0]][place].clone()
            for microbatch in order[1:]:
                total += made[microbatch][place]
            found[index].append(total.div_(job.microbatches))
            place += 1
    return found


def orders_of(answers: list[Any]) -> dict[int, list[int]]:
    """Per stage its micro-batches in the order of their B or W."""
    orders: dict[int, list[int]] = {}
    for _, actions, _ in answers:
        for kind, stage, microbatch in actions:
            if kind in ("B", "W"):
                orders.setdefault(stage, []).append(microbatch)
    return orders


def split_in(actions: list[tuple[str, int, int]]) -> int:
    """How many I's are not directly followed by their W."""
    return sum(
        kind == "I" and following != ("W", stage, microbatch)
        for (kind, stage, microbatch), following in zip(actions, [*actions[1:], None], strict=False)
    )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [
        ("GPipe", 1), ("1F1B", 1), ("LoopedBFS", 2), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2),
        ("ZBVZeroBubble", 2), ("DualPipeV", 2),
    ],
)  # fmt: skip
def test_every_schedule_of_torch_gives_the_bits_of_the_unsplit_backward(
    run: Callable[[Job], list[Answer]], schedule: str, chunks: int, ranks: int
) -> None:
    check(run, Job(schedule, ranks, chunks, microbatches=2 * ranks))


def test_a_plan_from_a_file_gives_the_bits_of_the_unsplit_backward(
    run: Callable[[Job], list[Answer]], tmp_path: Path
) -> None:
    csv = tmp_path / "plan.csv"
    write_torch_csv(pipex.build("zb-h1", 2, 6), csv, "compute_only")
    check(run, Job("CSV", 2, 1, microbatches=6, csv=str(csv)))


def check(run: Callable[[Job], list[Answer]], job: Job) -> None:
    answers = run(job)
    wanted = unsplit(job, 0, orders_of(answers))
    for found, actions, deferred in answers:
        for index, gradients in found.items():
            for gradient, reference in zip(gradients, wanted[index], strict=True):
                assert torch.equal(torch.from_numpy(gradient), reference)
        assert deferred == 2 * split_in(actions)  # in two steps
    if "I" in {kind for _, actions, _ in answers for kind, _, _ in actions}:
        assert any(deferred for _, _, deferred in answers)


def order(text: str) -> list[Any]:
    return [schedules._Action.from_str(action) for action in text.split()]


def test_which_micro_batches_of_an_order_are_split() -> None:
    actions = [None, *order("0F0 0I0 0F1 0I1 (1F3;0W0)OVERLAP_F_B 0W1 1W0 1I2 1W2")]
    assert deferral_of(actions) == Deferral({(0, 0), (0, 1)}, {(0, 0)})


class Stub:
    """What W asks of a stage."""

    stage_index = 0
    submod = None

    def __init__(self, *weights: drop_in_module._Weight) -> None:
        self.dw_runner = dict(enumerate(weights))


def test_a_micro_batch_without_products_makes_those_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a layer is skipped at random."""
    layer = nn.Linear(4, 3)
    splitter = Splitter(layer.parameters(), exact=False)
    x, dy = torch.randn(5, 4), torch.randn(5, 3)
    with splitter.record() as tape:
        y = layer(x)
    tape.backward_input([y], [dy], [])
    first = drop_in_module._Weight()
    first.tapes.append(tape)
    stage = Stub(first, drop_in_module._Weight())
    monkeypatch.setitem(drop_in_module._splitters, stage, splitter)
    before = drop_in_module._step.set(Step(Deferral(followed=frozenset({(0, 0)}))))
    for microbatch in range(2):
        drop_in_module._backward_weight_one_chunk(stage, microbatch)
    drop_in_module._step.reset(before)
    torch.testing.assert_close(layer.weight.grad, dy.t() @ x)


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "InterleavedZeroBubble"])
def test_fused_products_give_right_gradients(run: Callable[[Job], list[Answer]], schedule: str) -> None:
    job = Job(schedule, 2, 2, 6, fused=True)
    answers = run(job)
    wanted = unsplit(job, 0, orders_of(answers))
    for found, _, deferred in answers:
        assert deferred
        for index, gradients in found.items():
            for gradient, reference in zip(gradients, wanted[index], strict=True):
                torch.testing.assert_close(torch.from_numpy(gradient), reference)


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "Interleaved1F1B"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_data_parallel_stages_are_reduced_under_a_split_schedule(
    run: Callable[[Job], list[Answer]], schedule: str, parallel: str
) -> None:
    job = Job(schedule, 2, 2, microbatches=4, parallel=parallel)
    answers = run(job)
    both = [unsplit(job, replica, {}) for replica in range(2)]
    for found, _, _ in answers:
        for index, gradients in found.items():
            for place, gradient in enumerate(gradients):
                mean = (both[0][index][place] + both[1][index][place]) / 2
                torch.testing.assert_close(torch.from_numpy(gradient), mean, rtol=1e-5, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
def test_compiled_stages_get_their_gradients_once(run: Callable[[Job], list[Answer]], compiled: str) -> None:
    job = Job("ZBVZeroBubble", 2, 2, microbatches=4, compiled=compiled)
    answers = run(job)
    wanted = unsplit(job, 0, {})
    eager = run(Job("ZBVZeroBubble", 2, 2, microbatches=4))
    for (found, _, deferred), (_, _, of_eager) in zip(answers, eager, strict=True):
        assert deferred == of_eager > 0
        for index, gradients in found.items():
            for gradient, reference in zip(gradients, wanted[index], strict=True):
                torch.testing.assert_close(torch.from_numpy(gradient), reference, rtol=1e-5, atol=1e-7)


def functions() -> list[Any]:
    return [torch_internals.find(path) for path, *_ in torch_internals.REPLACED]


def test_everything_is_put_back() -> None:
    before = functions()
    with drop_in() as outer:
        during = functions()
        assert all(a is not b for a, b in zip(before, during, strict=True))
        inner = drop_in()
        outer.undo()
        assert functions() == during
        inner.undo()
    assert functions() == before


def test_the_trial_leaves_the_random_numbers_as_they_are() -> None:
    before = torch.get_rng_state()
    with drop_in():
        assert torch.equal(torch.get_rng_state(), before)


def test_a_torch_with_other_insides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules._PipelineStageBase, "backward_one_chunk", lambda self, chunk: None)
    needed = r"backward_one_chunk\(self, chunk\) in place of .*; needed torch 2\.11 to 2\.15"
    with pytest.raises(pipex.errors.UnsupportedModule, match=f"torch {re.escape(torch.__version__)}; got .*{needed}"):
        drop_in()


def test_a_trial_that_raises_is_refused_with_the_cause_that_torch_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("no such\n  thing")

    before = functions()
    monkeypatch.setattr(Tape, "hand_over", fail)
    with pytest.raises(pipex.errors.UnsupportedModule, match=r"RuntimeError: .* caused by LookupError: no such thing"):
        drop_in()
    assert functions() == before


def test_a_trial_that_fails_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = functions()
    monkeypatch.setattr(Tape, "backward_weight", lambda self, more=False: None)
    with pytest.raises(pipex.errors.UnsupportedModule, match="those of one backward: False"):
        drop_in()
    assert functions() == before
