"""Plans whose weights change within a step: PipeDream and PipeDream-2BW have the bits of plain torch, which keeps
a list of all versions of each stage's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import device_world
import group_world
import host_world
import pytest
import torch
import torch.nn.functional as F
from cases import case
from random_models import digest
from torch import Tensor, nn

import pipex
from pipex.errors import PipexError
from pipex.plan import Action, Kind, Plan, validate
from pipex.plan.memory import with_promise

WIDTH, STEPS = 6, 10
Cell = tuple[str, int, int, int]
"""family, ranks, micro-batches, updates; the family may have its backwards split"""

CELLS: list[Cell] = [
    *(("pipedream", ranks, m, m) for ranks, m in product((2, 4), range(2, 9))),
    *(("pipedream split", ranks, 5, 5) for ranks in (2, 4)),
    *(("pipedream-2bw", 2, m, u) for m, u in ((2, 1), (3, 1), (4, 1), (4, 2), (6, 2), (6, 3), (8, 4))),
    *(("pipedream-2bw", 4, m, u) for m, u in ((4, 1), (7, 1), (8, 2), (12, 3))),
    *((f"pipedream-2bw {how}", ranks, 8, 2) for ranks in (2, 4) for how in ("split", "recomputed", "offloaded")),
]


def plan_of(cell: Cell) -> Plan:
    name, ranks, microbatches, updates = cell
    family, *split = name.split()
    options = {} if family == "pipedream" else {"updates": updates}
    plan = pipex.build(family, ranks, microbatches, **options)
    if split and split != ["split"]:
        plan = with_promise(dataclasses.replace(plan, **{split[0]: tuple(range(ranks))}))
    elif split:
        plan = dataclasses.replace(
            plan, orders=tuple(tuple(p for a in order for p in halves(a)) for order in plan.orders)
        )
    validate(plan)
    return plan


def halves(action: Action) -> list[Action]:
    return [action._replace(kind=k) for k in (Kind.I, Kind.W)] if action.kind is Kind.B else [action]


class Gain(nn.Module):
    """Saves the parameter itself for its backward, where a linear layer saves a view."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((WIDTH,), 1.1))
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.frozen


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + torch.tanh(self.linear(torch.tanh(self.linear(x)))))
        return y


def stages_of(ranks: int, name: str = "") -> list[nn.Module]:
    """With running statistics, where forwards run once."""
    torch.manual_seed(ranks)
    norm = nn.LayerNorm if "recomputed" in name else nn.BatchNorm1d
    return [nn.Sequential(Twice(), Gain(), norm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(ranks)]


def data(step: int, microbatches: int) -> tuple[Tensor, Tensor]:
    """Micro-batches of two and of three samples."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, 2 * microbatches + microbatches // 2, WIDTH, generator=generator)
    return x, y


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.AdamW, lr=0.01),
}


def witness(kind: str, seen: list[str | None], parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS[kind](parameters)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(digest(p.grad) for p in parameters))
    return optimizer


def rank_train(jobs: Sequence[tuple[Cell, str]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [train(*job) for job in jobs]


def train(cell: Cell, kind: str) -> dict[str, Any]:
    plan, gradients = plan_of(cell), []
    pipeline = pipex.Pipeline(
        stages_of(cell[1], cell[0]), plan, F.mse_loss, optimizer=lambda parameters: witness(kind, gradients, parameters)
    )
    losses = [pipeline.step(*data(step, plan.microbatches)) for step in range(STEPS)]
    evaluated = pipeline.evaluate(*data(STEPS, plan.microbatches))
    (stage,) = pipeline.local_stages
    pipeline.close()
    return {"losses": losses, "evaluated": evaluated, "gradients": gradients,
            "tensors": {n: digest(t) for n, t in stage.layers[0].state_dict().items()}}  # fmt: skip


def plain(cell: Cell, kind: str) -> dict[str, Any]:
    """In one process, micro-batch by micro-batch: each on the version of each stage's weights that the papers say."""
    name, ranks, microbatches, updates = cell
    stages = stages_of(ranks, name)
    trained = [{n: p for n, p in stage.named_parameters() if p.requires_grad} for stage in stages]
    gradients: list[list[str | None]] = [[] for _ in stages]
    optimizers = [witness(kind, seen, list(held.values())) for seen, held in zip(gradients, trained, strict=True)]
    versions = [[{n: p.detach().clone() for n, p in held.items()}] for held in trained]  # of each stage
    losses = []

    def version_of(stage: int, done: int, microbatch: int) -> int:
        """``done``: updates before this step."""
        if name.startswith("pipedream-2bw"):  # W(t+1) = W(t) - lr g(W(t-1)): arXiv 2006.09503
            return max(0, done + microbatch // (microbatches // updates) - 1)
        return done + max(0, microbatch - (ranks - 1 - stage))  # arXiv 1806.03377, with a flush between steps

    for step in range(STEPS):
        x, y = data(step, microbatches)
        pieces = list(zip(x.tensor_split(microbatches), y.tensor_split(microbatches), strict=True))
        size, done, total = microbatches // updates, len(versions[0]) - 1, torch.zeros(())
        for group in range(0, microbatches, size):
            leaves = [{} for _ in stages]  # type: list[dict[int, dict[str, Tensor]]]
            samples = sum(len(piece) for piece, _ in pieces[group : group + size])
            for m in range(group, group + size):
                values, wanted = pieces[m]
                count = len(values)
                for s, stage in enumerate(stages):
                    version = version_of(s, done, m)
                    own = leaves[s].setdefault(
                        version, {n: t.clone().requires_grad_() for n, t in versions[s][version].items()}
                    )
                    values = torch.func.functional_call(stage, own, (values,))
                loss = F.mse_loss(values, wanted)
                (loss * (count / samples)).backward()
                part = loss.detach() * (count / len(x))
                total = total + part if m else part
            for s, held in enumerate(trained):
                (own,) = leaves[s].values()  # one update is of one version
                for n, p in held.items():
                    p.grad = own[n].grad
                optimizers[s].step()
                versions[s].append({n: p.detach().clone() for n, p in held.items()})
        losses.append(total.item())
    model = nn.Sequential(*stages).eval()
    with torch.no_grad():
        x, y = data(STEPS, microbatches)
        parts = [F.mse_loss(model(a), b) * (len(a) / len(x)) for a, b in
                 zip(x.tensor_split(microbatches), y.tensor_split(microbatches), strict=True)]  # fmt: skip
    return {"losses": losses, "evaluated": sum(parts[1:], parts[0]).item(), "gradients": gradients,
            "tensors": [{n: digest(t) for n, t in stage.state_dict().items()} for stage in stages]}  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_bit_of_ten_steps_is_that_of_plain_torch(ranks: int) -> None:
    """Losses, the gradients of every update, parameters, running statistics, evaluation."""
    torch.set_num_threads(1)
    jobs = [(cell, list(OPTIMIZERS)[n % 2]) for n, cell in enumerate(CELLS) if cell[1] == ranks]
    compare(jobs, host_world.launch(rank_train, ranks, args=(jobs,)))


@pytest.mark.parametrize("cell", [("pipedream split", 2, 5, 5), ("pipedream-2bw", 2, 6, 3)])
def test_over_torch_distributed_and_through_device_memory(simulated_cuda: Path, cell: Cell) -> None:
    torch.set_num_threads(1)
    launch = partial(device_world.launch, library=simulated_cuda, settings="seed=3,delay=300,poison=1")
    for world in (group_world.launch, launch):
        compare([(cell, "adam")], world(rank_train, cell[1], args=([(cell, "adam")],)))


def compare(jobs: Sequence[tuple[Cell, str]], results: list[list[dict[str, Any]]]) -> None:
    for number, job in enumerate(jobs):
        with case(*job):
            expected = plain(*job)
            assert len(set(expected["losses"])) == STEPS
            for rank, result in enumerate(results):
                found = result[number]
                assert found["losses"] == expected["losses"]
                assert found["evaluated"] == expected["evaluated"]
                assert found["gradients"] == expected["gradients"][rank]
                assert found["tensors"] == expected["tensors"][rank]


def pipeline_of(
    plan: Plan, stages: Sequence[nn.Module] | None = None, loss_fn: Any = F.mse_loss, **options: Any
) -> Any:
    options = {"optimizer": partial(torch.optim.AdamW, lr=0.01), **options}
    return pipex.Pipeline(stages or stages_of(2), plan, loss_fn, **options)


def rank_in_parts(directory: str, family: str) -> list[float]:
    """Two steps, and two more of another pipeline, which goes on from the first one's checkpoint."""
    plan = pipex.build(family, 2, 4)
    losses = []
    for part in range(2):
        pipeline = pipeline_of(plan)
        if part:
            with torch.no_grad():
                for parameter in pipeline.local_stages[0].parameters():
                    parameter.fill_(3.0)
            pipeline.load(directory)
        losses += [pipeline.step(*data(step, 4)) for step in (2 * part, 2 * part + 1)]
        assert pipeline.steps == 2 * part + 2
        pipeline.save(directory)
        pipeline.close()
    return losses


def rank_at_once(family: str) -> list[float]:
    pipeline = pipeline_of(pipex.build(family, 2, 4))
    return [pipeline.step(*data(step, 4)) for step in range(4)]


@pytest.mark.parametrize("family", ["pipedream", "pipedream-2bw"])
def test_a_checkpoint_holds_the_weights_before_the_newest(tmp_path: Path, family: str) -> None:
    in_parts = host_world.launch(rank_in_parts, 2, args=(str(tmp_path), family))
    assert in_parts == host_world.launch(rank_at_once, 2, args=(family,))


def rank_from_a_synchronous_run(directory: str) -> list[float]:
    pipeline = pipeline_of(pipex.build("1f1b", 2, 4))
    pipeline.step(*data(0, 4))
    pipeline.save(directory)
    found = []
    for steps in (0, 2):  # before the load, which leaves nothing of them
        other = pipeline_of(pipex.build("pipedream-2bw", 2, 4))
        for step in range(steps):
            other.step(*data(7 + step, 4))
        other.load(directory)
        found += [other.step(*data(1, 4)), other.step(*data(2, 4))]
    return found


def test_after_a_load_without_older_weights_the_loaded_ones_are_all_there_are(tmp_path: Path) -> None:
    first, second = host_world.launch(rank_from_a_synchronous_run, 2, args=(str(tmp_path),))
    assert first == second
    assert first[:2] == first[2:]


def rank_rolls_back(family: str) -> list[list[float]]:
    """A step on a bad batch, and the good weights put back by hand: the steps after it, and those of a fresh run."""
    pipeline = pipeline_of(pipex.build(family, 2, 4), optimizer=partial(torch.optim.SGD, lr=0.1))
    good = {n: t.clone() for n, t in pipeline.local_stages[0].state_dict().items()}
    x, y = data(0, 4)
    pipeline.step(x * float("nan"), y)
    pipeline.local_stages[0].load_state_dict(good)
    found = [[pipeline.step(*data(step, 4)) for step in (1, 2)]]
    fresh = pipeline_of(pipex.build(family, 2, 4), optimizer=partial(torch.optim.SGD, lr=0.1))
    return [*found, [fresh.step(*data(step, 4)) for step in (1, 2)]]


@pytest.mark.parametrize("family", ["pipedream", "pipedream-2bw"])
def test_weights_that_are_set_between_steps_are_those_before_the_newest_too(family: str) -> None:
    for after, fresh in host_world.launch(rank_rolls_back, 2, args=(family,)):
        assert after == fresh


def rank_autocast(cached: bool) -> list[float]:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)]  # one cast of a weight in a forward
    pipeline = pipeline_of(pipex.build("pipedream", 2, 6), stages)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        return [pipeline.step(*data(step, 6)) for step in range(3)]


def test_autocast_casts_the_weights_of_each_version() -> None:
    """It keeps its casts by parameter, whatever memory that has by then."""
    cached, anew = (host_world.launch(rank_autocast, 2, args=(cached,)) for cached in (True, False))
    assert cached == anew


def sums(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    return F.mse_loss(output, target, reduction="sum"), target.numel()


def tied_stages() -> list[nn.Module]:
    one, other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    other.weight = one.weight
    return [one, other]


def shared_memory() -> list[nn.Module]:
    stages = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    for stage in stages:
        stage[1].weight.data = stage[0].weight.data.t()
    return list(stages)


def buffer_of_a_weight() -> list[nn.Module]:
    stages = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    for stage in stages:
        stage.register_buffer("seen", stage.weight.detach(), persistent=False)
    return list(stages)


def rank_refused(make: Callable[[Plan], Any]) -> None:
    make(pipex.build("pipedream", 2, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda plan: pipeline_of(plan, clip_norm=1.0), "InputError: this plan updates .* got clip_norm"),
        (lambda plan: pipeline_of(plan, main_weights=True), "InputError: this plan updates .* got main_weights"),
        (lambda plan: pipeline_of(plan, tied_stages()), r"UnsupportedModule: 0\.weight stands in the stages 0, 1"),
        (lambda plan: pipeline_of(plan).step(*data(0, 4), total=3), "InputError: this plan updates .* got total"),
        (lambda plan: pipeline_of(plan).step(*data(0, 4), skip_nonfinite=True), "got skip_nonfinite"),
        (lambda plan: pipeline_of(plan).forward_backward(*data(0, 4)), "InputError: .* got forward_backward"),
        (lambda plan: pipeline_of(plan).update(), "InputError: there are no gradients"),
        (lambda plan: pipeline_of(plan, loss_fn=sums).step(*data(0, 4)), "InputError: .* need the mean loss"),
        (lambda plan: pipeline_of(plan, shared_memory()).step(*data(0, 4)), "UnsupportedModule: .* share memory"),
        (
            lambda _: pipeline_of(interleaved_with_updates(), stages_of(4)),
            "InputError: .* one stage per rank; got 2 each",
        ),
    ],
)
def test_what_would_need_all_ranks_within_a_step_is_refused_by_name(make: Any, words: str) -> None:
    with pytest.raises(PipexError, match=words):
        pipex.launch(rank_refused, 2, args=(make,))


def interleaved_with_updates() -> Plan:
    """One micro-batch through two stages on each of two ranks, with an update behind each of its backwards."""
    text = ("# pipex plan 1: family=by-hand placement=loop ranks=2 chunks=2 microbatches=1 update=microbatch "
            "peak_activations=2,2\n0F0,2F0,2B0,2UPDATE0,0B0,0UPDATE0\n1F0,3F0,3B0,3UPDATE0,1B0,1UPDATE0\n")  # fmt: skip
    validate(plan := Plan.from_text(text))
    return plan


def rank_holding() -> tuple[int, int]:
    """The most versions at once, as counted whenever the optimizer steps; and what the plan promises."""
    world = pipex.current_world()
    plan = pipex.build("pipedream", 4, 9)
    held = []
    pipeline = pipeline_of(plan, stages_of(4))
    pipeline.optimizer.register_step_pre_hook(lambda *_: held.append(pipeline._parts.versions.held))
    pipeline.step(*data(0, 9))
    return max(held), plan.weight_versions[world.rank]


def test_a_rank_holds_as_many_versions_as_the_plan_says() -> None:
    assert host_world.launch(rank_holding, 4) == [(n, n) for n in (4, 3, 2, 1)]
