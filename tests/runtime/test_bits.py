"""The number contract: losses, gradients and parameters of a pipeline are those of one process, bit for bit."""

from __future__ import annotations

import hashlib
import warnings
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
from cases import sampled
from runnable_plans import APART, runnable
from torch import Tensor, nn

import pipex
import pipex.plan as plans
from pipex.models.transformer import ModelConfig, Transformer, next_token_loss
from pipex.plan import Action, Kind, Placement, Plan
from pipex.runtime.reference import OneProcess

FAMILIES = ("naive", "gpipe", "1f1b", "zb-h1")


def digest(tensor: Tensor | None) -> str:
    return (
        "none"
        if tensor is None
        else hashlib.sha256(tensor.detach().double().contiguous().numpy().tobytes()).hexdigest()
    )


class Witness:
    """An optimizer factory that notes every gradient it is given, by position in model order."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        optimizer.register_step_pre_hook(lambda *_: self.seen.append([digest(p.grad) for p in parameters]))
        return optimizer


Job = tuple[Callable[[int], Sequence[nn.Module]], Callable[[int, int], tuple[Any, Any]], Any]


def transformer(stages: int) -> Sequence[nn.Module]:
    torch.manual_seed(1)
    config = ModelConfig(width=16, heads=2, layers=max(3, stages), context=8, vocabulary=32, dropout=0.1, tied=True)
    return pipex.split_model(Transformer(config), stages)


def token_batch(step: int, samples: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 32, (samples, 9), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


class TwoOutputs(nn.Module):
    """Hands a float, an integer and two more float tensors on; nobody uses the last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.side, self.unused = nn.Linear(width, width), nn.Linear(width, 2), nn.Linear(width, 2)

    def forward(self, x: Tensor, ids: Tensor | None = None, side: Tensor | None = None, *_: Tensor) -> Any:
        if ids is None:
            ids = torch.arange(x.shape[0])
        x = torch.tanh(self.linear(x)) + ids[:, None] * 0.01
        side = self.side(x) if side is None else side + self.side(x)
        return x, ids, side, self.unused(x)


class TwoInputs(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)

    def forward(self, x: Tensor, ids: Tensor | None = None, side: Tensor | None = None, *_: Tensor) -> Tensor:
        return self.linear(x) if side is None else self.linear(x) + side.sum(1, keepdim=True)


def tuples(stages: int) -> Sequence[nn.Module]:
    torch.manual_seed(2)
    return [*(TwoOutputs(6) for _ in range(stages - 1)), TwoInputs(6)]


def float_batch(step: int, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(samples, 6, generator=generator), torch.randn(samples, 3, generator=generator)


class ToComplex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(self.linear(x))


class FromComplex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(torch.fft.irfft(z, n=6))


def complex_stages(stages: int) -> Sequence[nn.Module]:
    assert stages == 2
    torch.manual_seed(6)
    return [ToComplex(), FromComplex()]


class Counting(nn.Module):
    """Hands on a buffer in which it counts its micro-batches, larger than what a socket takes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(1 << 22))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.count.add_(1)
        return self.linear(x), self.count


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        return self.linear(x) * (count.min() + count.max())


def counting_stages(stages: int) -> Sequence[nn.Module]:
    assert stages == 2
    torch.manual_seed(8)
    return [Counting(), Counted()]


JOBS: dict[str, Job] = {
    "counting": (counting_stages, float_batch, nn.functional.mse_loss),
    "complex": (complex_stages, float_batch, nn.functional.mse_loss),
    "transformer": (transformer, token_batch, next_token_loss),
    "tuples": (tuples, float_batch, nn.functional.mse_loss),
}


def plan_of(name: str, ranks: int, microbatches: int) -> Plan:
    """A plan of ``PLANS``, or of a family: ``"interleaved 3"`` with 3 chunks per rank."""
    if name in PLANS:
        return PLANS[name](ranks, microbatches)
    family, chunks = name.split()
    return pipex.build(family, ranks, microbatches, chunks=int(chunks))


def micro_batch_by_micro_batch(placement: Placement, microbatches: int, backward: str) -> Plan:
    """A plan of several stages per rank: forward through all of them, then back."""
    orders: list[list[Action]] = [[] for _ in range(placement.ranks)]
    down, up = range(placement.stages), range(placement.stages - 1, -1, -1)
    for microbatch in range(microbatches):
        for stages, kinds in ((down, "F"), (up, backward)):
            for stage in stages:
                orders[placement.rank_of(stage)] += [Action(stage, Kind(kind), microbatch) for kind in kinds]
    peaks = (placement.chunks,) * placement.ranks
    return Plan("by-hand", placement, microbatches, tuple(map(tuple, orders)), peaks)


PLANS: dict[str, Callable[[int, int], Plan]] = {
    **{family: partial(pipex.build, family) for family in FAMILIES},
    "two stages per rank": lambda ranks, m: micro_batch_by_micro_batch(Placement("loop", ranks, 2), m, "B"),
    "two stages per rank, v, split": lambda ranks, m: micro_batch_by_micro_batch(Placement("v", ranks, 2), m, "IW"),
}


def rank_run(job: str, family: str, ranks: int, microbatches: int, steps: int, samples: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "no gradient came to .*unused")
    build, batch, loss = JOBS[job]
    witness = Witness()
    plan = plan_of(family, ranks, microbatches)
    pipeline = pipex.Pipeline(build(plan.placement.pieces), plan, loss, optimizer=witness, clip_norm=0.5, seed=7)
    losses = [pipeline.step(*batch(step, samples)) for step in range(steps)]
    evaluated = pipeline.evaluate(*batch(steps, samples))
    parameters = {n: digest(t) for stage in pipeline.local_stages for n, t in stage.names.items()}
    return {
        "losses": losses,
        "evaluated": evaluated,
        "gradients": witness.seen,
        "parameters": parameters,
    }


def one_process(job: str, plan: Plan, steps: int, samples: int) -> dict[str, Any]:
    build, batch, loss = JOBS[job]
    witness = Witness()
    process = OneProcess(build(plan.placement.pieces), plan, loss, optimizer=witness, clip_norm=0.5, seed=7)
    losses = [process.step(*batch(step, samples)) for step in range(steps)]
    names: dict[str, Tensor] = {}
    for stage in process.stages:
        names = {**stage.names, **names}
    return {
        "losses": losses,
        "evaluated": process.evaluate(*batch(steps, samples)),
        "gradients": witness.seen,
        "parameters": {n: digest(t) for n, t in names.items()},
    }


def assert_same_bits(
    job: str, family: str, ranks: int, microbatches: int, *, steps: int, samples: int,
    launch: Callable[..., list[Any]] = host_world.launch,
) -> None:  # fmt: skip
    results = launch(rank_run, ranks, args=(job, family, ranks, microbatches, steps, samples))
    expected = one_process(job, plan_of(family, ranks, microbatches), steps, samples)
    for result in results:
        assert result["losses"] == expected["losses"]
        assert result["evaluated"] == expected["evaluated"]
        for name, found in result["parameters"].items():
            assert found == expected["parameters"][name], name
    assert set().union(*(result["parameters"] for result in results)) == set(expected["parameters"])
    for step in range(steps):
        expected_step = set(expected["gradients"][step])
        found_step = {g for result in results for g in result["gradients"][step]}
        assert found_step == expected_step, f"gradients of step {step}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_transformer_with_dropout_and_clipping(family: str, ranks: int) -> None:
    assert_same_bits("transformer", family, ranks, 3, steps=4, samples=7)


@pytest.mark.parametrize(("family", "ranks", "microbatches"), [("1f1b 1", 4, 6), ("zb-h1 1", 3, 5), ("zbv 2", 2, 5)])
def test_on_ranks_that_were_just_launched(family: str, ranks: int, microbatches: int) -> None:
    assert_same_bits("transformer", family, ranks, microbatches, steps=3, samples=11, launch=pipex.launch)


@pytest.mark.parametrize(
    ("family", "ranks", "microbatches"),
    [
        ("naive 1", 3, 3),
        ("gpipe 1", 2, 4),
        ("1f1b 1", 4, 6),
        ("zb-h1 1", 3, 5),
        ("zbv 2", 2, 5),
        ("interleaved 2", 2, 4),
    ],
)
def test_through_device_memory(simulated_cuda: Path, family: str, ranks: int, microbatches: int) -> None:
    settings = f"seed={ranks + microbatches},queues={ranks},delay=300,poison=1"
    launch = partial(device_world.launch, library=simulated_cuda, settings=settings)
    assert_same_bits("transformer", family, ranks, microbatches, steps=3, samples=11, launch=launch)


@pytest.mark.parametrize(("job", "ranks"), [("tuples", 3), ("complex", 2), ("counting", 2)])
def test_tuples_complex_tensors_and_buffers_through_device_memory(simulated_cuda: Path, job: str, ranks: int) -> None:
    launch = partial(device_world.launch, library=simulated_cuda, settings="seed=1,delay=300,poison=1")
    assert_same_bits(job, "1f1b", ranks, 4, steps=3, samples=9, launch=launch)


@pytest.mark.parametrize(
    ("job", "family", "ranks", "microbatches"),
    [
        ("transformer", "1f1b 1", 4, 6),
        ("transformer", "zb-h1 1", 4, 5),
        ("transformer", "zbv 2", 2, 5),
        ("tuples", "gpipe 1", 3, 4),
        ("complex", "1f1b 1", 2, 4),
        ("counting", "gpipe 1", 2, 4),
    ],
)
def test_over_torch_distributed(job: str, family: str, ranks: int, microbatches: int) -> None:
    assert_same_bits(job, family, ranks, microbatches, steps=3, samples=11, launch=group_world.launch)


def rank_under_way() -> list[int]:
    """How many sent tensors were under way whenever this rank ended its actions, and then a step."""
    world = pipex.current_world()
    exchange, under_way = world.exchange, []

    def watching(payload: bytes) -> list[bytes]:
        if b"the losses" in payload or b"the end of a step" in payload:
            under_way.append(len(world._sources))
        return exchange(payload)

    world.exchange = watching
    plan = pipex.build("1f1b", 2, 3)
    pipeline = pipex.Pipeline(transformer(2), plan, next_token_loss, optimizer=partial(torch.optim.SGD, lr=0.1))
    for step in range(3):
        pipeline.step(*token_batch(step, 6))
    return under_way


def test_all_that_was_sent_has_arrived_when_a_step_ends(simulated_cuda: Path) -> None:
    """Gradients of tied parameters too, which go last: a peer that dies then cannot spoil an update any more."""
    found = device_world.launch(rank_under_way, 2, library=simulated_cuda, settings="seed=1,delay=20000")
    assert found == [[0, 0] * 3] * 2


@pytest.mark.long
@pytest.mark.parametrize(("family", "ranks", "chunks", "microbatches"), runnable(range(4, 5), range(1, 3), [6]))
def test_every_family_over_torch_distributed(family: str, ranks: int, chunks: int, microbatches: int) -> None:
    launch = group_world.launch
    assert_same_bits("transformer", f"{family} {chunks}", ranks, microbatches, steps=3, samples=11, launch=launch)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("plan", ["two stages per rank", "two stages per rank, v, split"])
def test_several_stages_on_a_rank(plan: str, ranks: int) -> None:
    assert_same_bits("transformer", plan, ranks, 3, steps=3, samples=7)


@pytest.mark.parametrize(
    ("family", "ranks", "chunks", "microbatches"),
    sampled(
        runnable(range(2, 4), range(1, 5), [6]), 1,
        name="chunks", stratum=lambda case: case[:2], others=pytest.mark.long,
    ),
)  # fmt: skip
def test_every_family_that_runs(family: str, ranks: int, chunks: int, microbatches: int) -> None:
    assert_same_bits("transformer", f"{family} {chunks}", ranks, microbatches, steps=2, samples=11)


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "ranks", "chunks", "microbatches"),
    sampled(runnable(range(2, 5), range(1, 5), [3, 4, 8, 9]), 1, name="families", stratum=lambda case: case[:2]),
)
def test_every_family_that_runs_at_length(family: str, ranks: int, chunks: int, microbatches: int) -> None:
    assert_same_bits("transformer", f"{family} {chunks}", ranks, microbatches, steps=5, samples=11)


def test_no_family_is_left_out() -> None:
    run = {family for family, *_ in runnable(range(2, 5), range(1, 5), [8])}
    assert run | APART == set(plans.FAMILIES)


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_fewer_and_more_microbatches_than_ranks(microbatches: int) -> None:
    assert_same_bits("transformer", "zb-h1", 4, microbatches, steps=20, samples=8)


@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_stages_that_hand_on_tuples(family: str) -> None:
    assert_same_bits("tuples", family, 3, 4, steps=3, samples=9)


@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_complex_activations(family: str) -> None:
    assert_same_bits("complex", family, 2, 3, steps=3, samples=7)


def test_a_buffer_that_the_next_microbatch_writes_to_is_handed_on_within_a_rank() -> None:
    assert_same_bits("counting", "looped-bfs 2", 1, 4, steps=2, samples=8)


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "ranks", "microbatches"),
    sampled(product(FAMILIES, [1, 2, 3, 4], [1, 2, 3, 8]), 1, name="grid", stratum=lambda case: case[0]),
)
def test_full_grid(family: str, ranks: int, microbatches: int) -> None:
    assert_same_bits("transformer", family, ranks, microbatches, steps=20, samples=11)


def test_the_reference_is_plain_torch() -> None:
    """The reference itself against a training loop that any user would write."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    process = OneProcess(pipex.split_model(model, 2), 2, nn.functional.mse_loss, clip_norm=0.1,
                         optimizer=lambda p: torch.optim.SGD(p, lr=0.1))  # fmt: skip
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(5):
        x, y = float_batch(step, 4)
        loss = process.step(x, y)
        optimizer.zero_grad()
        expected = sum(nn.functional.mse_loss(plain(a), b) * 0.5 for a, b in zip(x.split(2), y.split(2), strict=True))
        for a, b in zip(x.split(2), y.split(2), strict=True):
            (nn.functional.mse_loss(plain(a), b) * 0.5).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        assert loss == expected.item()
    for mine, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, reference)


def test_the_mean_loss_weighs_samples_not_microbatches() -> None:
    """7 samples in 3 micro-batches: the gradient is that of the batch's mean, in float64 to rounding."""
    torch.manual_seed(3)
    model = nn.Linear(6, 3).double()
    process = OneProcess([model], 3, nn.functional.mse_loss)
    x, y = (t.double() for t in float_batch(0, 7))
    loss = process.forward_backward(x, y)
    process.reduce_gradients()
    gradient = model.weight.grad
    model.weight.grad = None
    whole = nn.functional.mse_loss(model(x), y)
    whole.backward()
    torch.testing.assert_close(gradient, model.weight.grad, rtol=1e-13, atol=1e-15)
    assert abs(loss - whole.item()) < 1e-14


def test_the_users_random_numbers_are_the_same_on_every_rank() -> None:
    results = pipex.launch(rank_draws, 3)
    assert results[0] == results[1] == results[2]


def rank_draws() -> list[float]:
    torch.manual_seed(5)
    pipeline = pipex.Pipeline(transformer(3), pipex.build("1f1b", 3, 2), next_token_loss, optimizer=torch.optim.SGD)
    torch.manual_seed(5)
    pipeline.step(*token_batch(0, 4))
    return torch.rand(3).tolist()
