"""Steps of torch's pipelines whose stages are replicated or sharded, with our split backward or whole without it, and
what ran where."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import persistent
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch_group import in_group

import pipex
from pipex.backward.splitter import Splitter

WORDS, WIDTH, LENGTH, CLASSES = 11, 8, 3, 5  # no product of I has the shape of a weight
CPU = torch.device("cpu")
ALONE = "0F0 1F0 1I0 0I0 0F1 1F1 1I1 1W0 0I1 0W0 0F2 1F2 1I2 0I2 0W1 1W1 0F3 1F3 1I3 0I3 1W2 1W3 0W2 0W3"
"""Of a rank that is a pipeline of two stages by itself: no W stands directly behind its I."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.twice = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.twice(torch.tanh(self.twice(x))) * 1.5


class Spare(nn.Module):
    """Two layers, of which only one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare = Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + x


class Adapted(Block):
    """With a weight that is made of two parameters, which are weights themselves too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + F.linear(torch.tanh(x), self.b @ self.a) + F.linear(F.linear(x, self.a), self.b)


class Cast(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Around(nn.Module):
    """A checkpoint around a module that may be sharded by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1).float(), target.flatten())


def build(count: int, block: Callable[[], nn.Module] = Block) -> list[nn.Module]:
    torch.manual_seed(0)
    middle = [nn.Sequential(block(), block()) for _ in range(count - 2)]
    return [nn.Sequential(nn.Embedding(WORDS, WIDTH), block()), *middle,
            nn.Sequential(block(), nn.Linear(WIDTH, CLASSES))]  # fmt: skip


Wrap = Callable[[nn.Module, DeviceMesh, "Seen"], nn.Module]
"""Replicates or shards a stage; may leave notes in what is seen."""


@dataclass(frozen=True)
class Job:
    """What the ranks run.

    Attributes:
        data: sizes of the dimensions of the mesh over which stages are replicated or sharded.
        pipe: ranks of a pipeline.
        clear: whether gradients are cleared between steps.
        dtype: of what stages send each other.
        fused: whether products are made together, as on a GPU.
        parallel: whether the ranks of the last dimension of data have the same data, and parts of every layer.
    """

    wrap: Wrap
    data: tuple[int, ...] = (2,)
    pipe: int = 1
    schedule: str = ""
    steps: int = 2
    clear: bool = True
    block: Callable[[], nn.Module] = Block
    dtype: torch.dtype = torch.float32
    fused: bool = False
    parallel: bool = False

    @property
    def world(self) -> int:
        size = self.pipe
        for extent in self.data:
            size *= extent
        return size


@dataclass
class Seen:
    """What a rank has seen.

    Attributes:
        gradients: per step, of every parameter of its stages this rank's part.
        events: what came to pass, in order, with the kind of the action that ran then ("" for none): products that are
            gradients of weights, what was noted, and the ends of actions.
        hooks: per parameter how often hooks on it ran.
    """

    gradients: list[list[Any]] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)
    hooks: Counter[str] = field(default_factory=Counter)
    now: str = ""

    def note(self, event: str) -> None:
        self.events.append((event, self.now))

    @property
    def products(self) -> Counter[str]:
        """Per kind of action how many gradients of weights were made."""
        return Counter(now for event, now in self.events if event == "product")


class Products(TorchDispatchMode):
    """Counts products of the shapes of weights."""

    def __init__(self, seen: Seen, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.seen, self.shapes = seen, shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS and tuple(out.shape) in self.shapes:
            self.seen.note("product")
        return out


PRODUCTS = {
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.embedding_dense_backward.default,
}  # fmt: skip


def unsplit(order: list[Any]) -> list[Any]:
    """The same order with whole backwards in the place of I's."""
    found = []
    for action in order:
        text = "" if action is None else str(action)
        if action is not None and action.sub_actions is not None:
            found += unsplit(list(action.sub_actions))
        elif "I" in text:
            found.append(schedules._Action.from_str(text.replace("I", "B")))
        elif "W" not in text and action is not None:
            found.append(action)
    return found


@contextmanager
def looking(seen: Seen, shapes: set[tuple[int, ...]]) -> Iterator[None]:
    """Sees what the actions of stages do."""

    def looked_at(kind: str, name: str) -> Any:
        def act(self: PipelineStage, *args: Any, **kwargs: Any) -> None:
            whole = kind == "I" and kwargs.get("full_backward", True)
            seen.now = "B" if whole else kind
            with Products(seen, shapes):
                getattr(super(PipelineStage, self), name)(*args, **kwargs)
            seen.note(f"{seen.now}{self.stage_index}")
            seen.now = ""

        return mock.patch.object(PipelineStage, name, act)

    def noted(name: str) -> Any:
        function = getattr(_fsdp_param_group, name)

        def act(*args: Any, **kwargs: Any) -> Any:
            seen.note(name)
            found = function(*args, **kwargs)
            if name == "foreach_reduce":
                reduced.append(weakref.ref(found[0]))
            return found

        return mock.patch.object(_fsdp_param_group, name, act)

    reduced: list[weakref.ref[Tensor]] = []
    with (
        looked_at("I", "backward_one_chunk"), looked_at("W", "backward_weight_one_chunk"),
        noted("foreach_all_gather"), noted("foreach_reduce"),
    ):  # fmt: skip
        yield
    seen.note(f"{sum(buffer() is not None for buffer in reduced)} buffers held")


def run_rank(job: Job, rank: int, split: bool) -> Seen:
    names = [f"data{i}" for i in range(len(job.data))]
    mesh = init_device_mesh("cpu", (*job.data, job.pipe), mesh_dim_names=(*names, "pipe"))
    place = mesh.get_local_rank("pipe")
    replica = rank // job.pipe
    count = 2 * job.pipe
    v = job.schedule == "ZBVZeroBubble"
    indices = [place, count - 1 - place if v else job.pipe + place]
    modules = build(count, job.block)
    shapes = {tuple(p.shape) for module in modules for p in module.parameters() if p.dim() > 1}
    seen = Seen()
    mine = {i: job.wrap(modules[i], mesh[tuple(names)] if len(names) > 1 else mesh[names[0]], seen) for i in indices}
    hidden = torch.zeros(2, LENGTH, WIDTH, dtype=job.dtype, requires_grad=True)
    stages = [
        PipelineStage(
            module, i, count, CPU, group=mesh.get_group("pipe"),
            input_args=hidden if i else torch.zeros(2, LENGTH).long(),
            output_args=hidden if i < count - 1 else torch.zeros(2, LENGTH, CLASSES, dtype=job.dtype),
        )
        for i, module in mine.items()
    ]  # fmt: skip
    if job.schedule:
        orders = dict(getattr(schedules, f"Schedule{job.schedule}")(stages, 4, loss_fn=loss_fn).pipeline_order)
    else:
        orders = {0: [schedules._Action.from_str(action) for action in ALONE.split()]}
    runner = schedules._PipelineScheduleRuntime(stages, 4, loss_fn=loss_fn)
    orders = {r: [a for a in order if a is not None] if split else unsplit(order) for r, order in orders.items()}
    runner._prepare_schedule_with_comms(orders, format="compute_only")
    generator = torch.Generator().manual_seed(7 + (replica // job.data[-1] if job.parallel else replica))
    with ExitStack() as around:
        around.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        if split:
            around.enter_context(pipex.drop_in())
        if job.fused:
            around.enter_context(mock.patch.object(Splitter, "fuses", return_value=True))
        around.enter_context(looking(seen, shapes))
        for _ in range(job.steps):
            tokens = torch.randint(0, WORDS, (8, LENGTH), generator=generator)
            target = torch.randint(0, CLASSES, (8, LENGTH), generator=generator)
            arguments = (tokens,) if 0 in mine else ()
            runner.step(*arguments, target=target if count - 1 in mine else None, losses=[])
            parameters = [p for module in mine.values() for p in module.parameters()]
            seen.gradients.append([mine_of(p.grad) for p in parameters])
            if job.clear:
                for module in mine.values():
                    module.zero_grad()
    return seen


def mine_of(gradient: Tensor | None) -> Any:
    """This rank's part, as numbers."""
    if gradient is None:
        return None
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return (local.to_dense() if local.is_sparse else local).clone().numpy()


def results(job: Job, store: Path) -> tuple[list[Seen], list[Seen]]:
    """Of every rank: with our split backward, and with torch's whole one."""
    found = []
    for split in (True, False):
        where = Path(f"{store}-{split}")
        bodies = [partial(in_group, where, n, job.world, run_rank, job, n, split) for n in range(job.world)]
        found.append(persistent.ranks.results(bodies))
    return found[0], found[1]


def check(ours: list[Seen], theirs: list[Seen], whole: bool = False) -> None:
    """The same bits, no weight gradient in I (but for micro-batches that are not split), and hooks run as often."""
    for our, their in zip(ours, theirs, strict=True):
        for found, wanted in zip(our.gradients, their.gradients, strict=True):
            assert all(gradient is None or np.isfinite(gradient).all() for gradient in wanted)
            for gradient, reference in zip(found, wanted, strict=True):
                assert (gradient is None) == (reference is None)
                if gradient is not None:
                    assert gradient.tobytes() == reference.tobytes()
        assert whole or our.products["I"] == 0
        assert our.products["W"] > 0
        assert our.products.total() == their.products.total()
        assert our.hooks == their.hooks
