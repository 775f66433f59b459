"""Stages of DTensors: their weight gradients wait, and come out of W as autograd would have left them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import persistent
import pytest
import replicated_steps as steps
import torch
import torch.nn.functional as F
from host_world import launch
from parallel_modules import (
    ROWS,
    TOKENS,
    WIDTH,
    WORDS,
    Block,
    distributed,
    parallel_block,
    parallel_mlp,
    parallel_model,
)
from regimes import REGIMES, digest
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch_group import in_group

import pipex
from pipex.backward import activated
from pipex.backward.splitter import Splitter
from pipex.backward.tape import Tape
from pipex.backward.torch_internals import part_of
from pipex.bench.deferred import Products

ORDER = "F0 F1 I0 I1 W0 W1 F2 I2 W2"
AMONG = {"_c10d_functional", "c10d"}


class Exchanges(TorchDispatchMode):
    """Lists what ranks exchange, those of DTensors' operations included."""

    def __init__(self, seen: list[tuple[str, str]]) -> None:
        super().__init__()
        self.seen, self.now = seen, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it does to the parts comes by here
        name = func.overloadpacket.__name__
        if func.namespace in AMONG and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.seen.append((self.now, name))
        return func(*args, **(kwargs or {}))


class Job(NamedTuple):
    """Three micro-batches.

    Attributes:
        build: of a mesh over which layers are parallel.
        products: how many gradients of weights a micro-batch has that wait.
        regime: in which the module is called.
        mesh: sizes; over the first of two FSDP2 shards.
        words: whether it is called with tokens and ends in a loss.
        reshard: as FSDP2's.
        known: micro-batches until it is known that a weight has other uses too, whose gradients do not wait.
        gathered: how often FSDP2 gathers for a W what that reads.
    """

    build: Callable[[DeviceMesh], nn.Module]
    products: int
    regime: str = "plain"
    mesh: tuple[int, ...] = (2,)
    words: bool = False
    reshard: bool = True
    known: int = 3
    gathered: int = 0

    @property
    def waits(self) -> int:
        return self.known * self.products


class Found(NamedTuple):
    """Of one rank.

    Attributes:
        gradients: by name of the parameter, its placements, strides, and this rank's bits.
        others: outputs and gradients of inputs.
        products: of each kind of action.
        exchanges: with the kind of action, in order.
        heard: by kind of hook and name of the parameter, the gradients that it saw.
    """

    gradients: dict[str, Any]
    others: list[Any]
    products: dict[str, int]
    exchanges: list[tuple[str, str]]
    heard: dict[tuple[str, str], list[Any]]


def known(tensor: Tensor | None) -> Any:
    """All there is to know of one."""
    if isinstance(tensor, DTensor):
        return str(tensor.placements), tensor.stride(), digest(tensor.to_local())
    return digest(tensor)


def listen(module: nn.Module) -> dict[tuple[str, str], list[Any]]:
    heard: dict[tuple[str, str], list[Any]] = {}
    for name, parameter in ((name, p) for name, p in module.named_parameters() if p.requires_grad):
        seen = heard["accumulated", name] = []
        parameter.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(known(p.grad)))
        seen = heard["gradient", name] = []
        parameter.register_hook(lambda gradient, seen=seen: seen.append(known(gradient)))
    return heard


@contextmanager
def counted(exchanges: Exchanges, products: Counter[str], now: str) -> Iterator[None]:
    exchanges.now = now
    with exchanges, Products() as these:
        yield
    products[now] += these.count


def trained(rank: int, job: Job, split: bool) -> Found:
    mesh = init_device_mesh("cpu", job.mesh, mesh_dim_names=("data", "model")[-len(job.mesh) :])
    module = job.build(mesh["model"])
    sharded = len(job.mesh) > 1
    if sharded:
        for part in (*(p for p in module.modules() if isinstance(p, Block)), module):
            fully_shard(part, mesh=mesh["data"], reshard_after_forward=job.reshard)
    heard = {} if sharded else listen(module)
    splitter, call = Splitter.of(module), REGIMES[job.regime]
    generator = torch.Generator().manual_seed(rank // 2 if sharded else 0)
    events: list[tuple[str, str]] = []
    exchanges, products = Exchanges(events), Counter[str]()
    under_way: dict[int, tuple[Any, Tensor, Tensor]] = {}
    others: list[Any] = []
    for action in ORDER.split():
        kind, number = action[0] if split or action[0] != "I" else "B", int(action[1])
        if kind == "W" and not split:
            continue
        if sharded:
            module.set_requires_gradient_sync(number > 0)
        with loss_parallel() if job.words and kind != "W" else nullcontext(), counted(exchanges, products, kind):
            if kind == "F":
                tokens = torch.randint(0, WORDS, (ROWS, TOKENS), generator=generator)
                x = tokens if job.words else torch.randn(ROWS, TOKENS, WIDTH, generator=generator).requires_grad_()
                with splitter.record() if split else nullcontext() as tape:
                    y = call(module, x)
                    if job.words:
                        y = F.cross_entropy(y.flatten(0, 1).float(), tokens.flatten().roll(1))
                under_way[number] = tape, x, y
                others.append(known(y))
                continue
            tape, x, y = under_way[number]
            dy = None if job.words else torch.ones_like(y)
            if kind == "W":
                tape.backward_weight()
            elif kind == "I":
                others.append([known(dx) for dx in tape.backward_input([y], [dy], [] if job.words else [x])])
            else:
                y.backward(dy)
                others.append([] if job.words else [known(x.grad)])
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    gradients = {name: known(p.grad) for name, p in module.named_parameters()}
    return Found(gradients, others, dict(products), events, heard)


def everywhere(store: Path, ranks: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    return persistent.ranks.results([partial(in_group, store, n, ranks, body, n, *arguments) for n in range(ranks)])


BLOCK, MODEL = 7, 9  # products in the one and in the other

JOBS = {
    "columns and rows, alone": Job(parallel_mlp, 2, mesh=(1,)),
    "columns and rows": Job(parallel_mlp, 2),
    "a block": Job(parallel_block, BLOCK),
    "words": Job(parallel_model, MODEL, words=True),
    "words, alone": Job(parallel_model, MODEL, mesh=(1,), words=True),
    **{f"a block, {regime}": Job(parallel_block, BLOCK, regime) for regime in REGIMES if regime != "plain"},
    "words, in bf16 autocast": Job(parallel_model, MODEL, "bf16 autocast", words=True),
    "words, checkpointed": Job(parallel_model, MODEL, "checkpointed", words=True),
    "columns and rows, sharded": Job(parallel_mlp, 2, mesh=(2, 2)),
    "a prompt, sharded": Job(partial(distributed, "prompt", Replicate(), Replicate()), 1, mesh=(2, 2), gathered=3),
    "words, sharded": Job(parallel_model, MODEL, mesh=(2, 2), words=True),
    "words, sharded, kept gathered": Job(parallel_model, MODEL, mesh=(2, 2), words=True, reshard=False),
    "words, sharded, a checkpoint within autocast": Job(
        parallel_model, MODEL, "a checkpoint within autocast", mesh=(2, 2), words=True
    ),
}


def in_turn(rank: int, jobs: tuple[Job, ...], split: bool) -> list[Found]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # F.rms_norm under autocast
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # which nobody changes
        return [trained(rank, job, split) for job in jobs]


def compare(store: Path, *jobs: Job) -> None:
    """All on the same ranks."""
    ranks = prod(jobs[0].mesh)
    ours, theirs = (everywhere(Path(f"{store}{split}"), ranks, in_turn, jobs, split) for split in (True, False))
    for n, job in enumerate(jobs):
        for our, their in zip([found[n] for found in ours], [found[n] for found in theirs], strict=True):
            assert our.gradients == their.gradients
            assert our.others == their.others
            assert our.heard == their.heard
            assert our.products.get("W", 0) == job.waits, "all of them"
            assert sum(our.products.values()) == sum(their.products.values())
            theirs_and_more = Counter(name for _, name in their.exchanges) + Counter(_allgather_base_=job.gathered)
            assert Counter(name for _, name in our.exchanges) == theirs_and_more
            if len(job.mesh) == 1:  # FSDP2's copies of the parameters differ
                assert our.exchanges == ours[0][n].exchanges, "all ranks exchange in one order"


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_weight_gradients_wait_and_are_what_autograd_leaves(tmp_path: Path, job: Job) -> None:
    compare(tmp_path / "store", job)


MORE = {
    "linear of a transposed input": 1, "linear of vectors": 8, "linear with chunks of a weight": 2, "x @ w": 1,
    "x @ w of a batch": 1, "w @ x": 1, "x @ v": 1, "addmm": 1, "baddbmm": 1, "einsum of heads": 2,
    "merged LoRA pair": 3, "own parametrization": 3, "scaled weight": 1, "cast weight": 1, "embedding": 1,
    "tied": 2, "punished": 1, "weights in parts": 2, "frozen weight": 0, "input that is a parameter": 0,
}  # fmt: skip
"""By kind, how many products make its weights' gradients, of those that are to wait."""


@pytest.mark.parametrize("kind", MORE)
def test_so_do_those_of_other_operations(tmp_path: Path, kind: str) -> None:
    of_rows = Replicate() if "vectors" in kind else Shard(1)  # torch can take no part of what is shared
    layouts = (Shard(2), "plain"), (of_rows, "bf16 autocast")  # of the input
    compare(
        tmp_path / "store",
        *(
            Job(partial(distributed, kind, by, layout), MORE[kind], regime, known=2 if kind == "punished" else 3)
            for by in (Shard(0), Shard(1))
            for layout, regime in layouts
        ),
    )


def alone(store: Path, body: Callable[[DeviceMesh], Any]) -> Any:
    return in_group(store, 0, 1, lambda: body(init_device_mesh("cpu", (1,))))


@pytest.mark.parametrize("which", ["input", "gradient"])
def test_a_part_that_is_modified_before_w_is_refused(tmp_path: Path, which: str) -> None:
    """Of neither does the DTensor know."""

    def body(mesh: DeviceMesh) -> None:
        module = parallel_mlp(mesh)
        x, dy = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, WIDTH)
        with Splitter.of(module).record() as tape:
            y = module(x)
        tape.backward_input([y], [dy], [x])
        (x.detach() if which == "input" else dy).mul_(2)
        with pytest.raises(RuntimeError, match="part of a DTensor was modified in place"):
            tape.backward_weight()

    alone(tmp_path / "store", body)


def test_no_kernel_is_given_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activated, "provider", lambda *_: activated.TRITON)

    def gradients(mesh: DeviceMesh, split: bool) -> list[Any]:
        module, x = distributed("mlp", Shard(0), Replicate(), mesh), torch.ones(ROWS, TOKENS, WIDTH, requires_grad=True)
        with Splitter.of(module, exact=False).record() if split else nullcontext() as tape:
            y = module(x)
        if split:
            tape.backward_input([y], [torch.ones_like(y)], [])
            tape.backward_weight()
        else:
            y.backward(torch.ones_like(y))
        return [known(p.grad) for p in module.parameters()]

    def body(mesh: DeviceMesh) -> None:
        assert gradients(mesh, True) == gradients(mesh, False)

    alone(tmp_path / "store", body)


def test_beside_plain_tensors_nothing_is_recorded(tmp_path: Path) -> None:
    """Where torch takes these for replicated, its backward must do so too, which W is not in."""

    def gradients(mesh: DeviceMesh, split: bool) -> list[Any]:
        module = distributed("linear", Shard(0), Replicate(), mesh).inner
        x = torch.ones(ROWS, TOKENS, WIDTH, requires_grad=True)
        with implicit_replication():
            with Splitter.of(module).record() if split else nullcontext() as tape:
                y = F.linear(x, module.weight.t(), module.bias) + F.linear(x, module.weight)
            if split:
                tape.backward_input([y], [torch.ones_like(y)], [x])
            else:
                y.backward(torch.ones_like(y))
        if split:
            assert tape.targets == []
            tape.backward_weight()
        return [known(p.grad) for p in module.parameters()]

    def body(mesh: DeviceMesh) -> None:
        assert gradients(mesh, True) == gradients(mesh, False)

    alone(tmp_path / "store", body)


def test_a_parameter_that_is_elsewhere_is_found_there(tmp_path: Path) -> None:
    def body(mesh: DeviceMesh) -> None:
        module = distributed("linear", Shard(0), Replicate(), mesh)
        splitter, x = Splitter.of(module), torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
        for _ in range(2):
            with splitter.record() as tape:
                y = module(x)
            assert torch.equal(y, module(x))
            tape.backward_input([y], [torch.ones_like(y)], [x])
            tape.backward_weight()
            for parameter in module.parameters():
                parameter._local_tensor = part_of(parameter) * 2  # as FSDP2 does

    alone(tmp_path / "store", body)


def test_a_bias_in_parts_goes_with_a_whole_weight(tmp_path: Path) -> None:
    """The sum is in other parts than the product, so it cannot be made in its place."""

    def body(mesh: DeviceMesh) -> None:
        module = nn.Linear(WIDTH, WIDTH)
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Replicate()]))
        module.bias = nn.Parameter(distribute_tensor(module.bias.detach(), mesh, [Shard(0)]))
        x = distribute_tensor(torch.randn(TOKENS, ROWS, WIDTH), mesh, [Replicate()]).transpose(0, 1).requires_grad_()
        wanted = module(x)
        with Splitter.of(module).record() as tape:
            y = module(x)
        assert known(y) == known(wanted)
        tape.backward_input([y], [torch.ones_like(y)], [])
        assert tape.targets == [module.bias, module.weight]

    alone(tmp_path / "store", body)


def test_torch_s_halves_of_a_backward_leave_the_same(tmp_path: Path) -> None:
    def gradients(mesh: DeviceMesh, split: bool) -> list[Any]:
        module, x = parallel_block(mesh), torch.ones(ROWS, TOKENS, WIDTH, requires_grad=True)
        parameters = list(module.parameters())
        with Splitter.of(module).record() if split else nullcontext():
            y = module(x)
        if not split:
            y.backward(torch.ones_like(y))
            return [known(p.grad) for p in (x, *parameters)]
        (dx,), left = pipex.stage_backward_input([y], [torch.ones_like(y)], [x], parameters)
        assert len(left[0]["params"]) == 2, "norms"
        pipex.stage_backward_weight(parameters, left)
        return [known(dx), *(known(p.grad) for p in parameters)]

    def body(mesh: DeviceMesh) -> None:
        assert gradients(mesh, True) == gradients(mesh, False)

    alone(tmp_path / "store", body)


def parallel_stage(module: nn.Module, mesh: DeviceMesh, seen: steps.Seen) -> nn.Module:
    """Of 11 words and 5 classes no rank has as many as the other."""
    layers = {"up": ColwiseParallel(), "down": RowwiseParallel(), "twice": ColwiseParallel(output_layouts=Replicate())}
    for part in module.modules():
        if isinstance(part, steps.Block):
            parallelize_module(part, mesh, layers)
    ends = {
        name: RowwiseParallel(input_layouts=Replicate()) if name == "0" else ColwiseParallel(output_layouts=Replicate())
        for name, part in module.named_children()
        if not isinstance(part, steps.Block)
    }
    parallelize_module(module, mesh, ends)
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.hooks.update([name]))
    return module


def sharded_parallel_stage(module: nn.Module, mesh: DeviceMesh, seen: steps.Seen) -> nn.Module:
    data, model = (mesh[name] for name in mesh.mesh_dim_names or ())
    parallel_stage(module, model, seen)
    for part in module.modules():
        if isinstance(part, steps.Block):
            fully_shard(part, mesh=data)
    return fully_shard(module, mesh=data)


STEPS = {
    "interleaved": steps.Job(parallel_stage, pipe=2, schedule="InterleavedZeroBubble", parallel=True),
    "a V": steps.Job(parallel_stage, pipe=2, schedule="ZBVZeroBubble", parallel=True),
    "under autocast": steps.Job(parallel_stage, block=steps.Cast, parallel=True),
    "sharded": steps.Job(sharded_parallel_stage, data=(2, 2), parallel=True),
}


@pytest.mark.parametrize("job", STEPS.values(), ids=STEPS.keys())
def test_under_torch_s_schedules_they_wait_too(tmp_path: Path, job: steps.Job) -> None:
    steps.check(*steps.results(job, tmp_path / "store"), whole=bool(job.schedule))


def piped(store: str, parallel: bool) -> tuple[list[float], list[Any], int]:
    """Losses, parameters, and how many uses of weights were left to W, of a rank whose mesh is itself."""
    world = pipex.current_world()
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(4)]
    left = []

    def train() -> list[float]:
        if parallel:
            mesh = init_device_mesh("cpu", (1,))
            for layer in layers:
                parallelize_module(layer, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        stages = pipex.split_model(nn.Sequential(*layers), 2)
        plan = pipex.build("zb-h1", 2, microbatches=4)
        pipeline = pipex.Pipeline(stages, plan, F.mse_loss, optimizer=torch.optim.SGD)
        x = torch.randn(8, WIDTH)
        return [pipeline.step(x, x * 2) for _ in range(3)]

    def captured(tape: Tape, use: Any, dy: Tensor) -> None:
        left.append(use)
        whole(tape, use, dy)

    whole = Tape.captured
    with mock.patch.object(Tape, "captured", captured):
        losses = in_group(Path(f"{store}{world.rank}"), 0, 1, train)
    mine = layers[2 * world.rank : 2 * world.rank + 2]
    parameters = [part_of(p) if isinstance(p, DTensor) else p for layer in mine for p in layer.parameters()]
    return losses, [digest(p) for p in parameters], len(left)


def test_in_a_pipeline_of_ours_they_wait_too(tmp_path: Path) -> None:
    ours, plain = (launch(piped, 2, args=(str(tmp_path / str(parallel)), parallel)) for parallel in (True, False))
    assert ours == plain
    assert sum(left for _, _, left in ours) > 0
