"""An I whose W is the rank's next action is one pass: the same bits, cheaper; what events and costs say of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex.backward import Splitter
from pipex.observe import Event, Recorder, measure
from pipex.observe import times as observed
from pipex.plan import build, simulate, unfused
from pipex.plan.actions import COMPUTE
from pipex.plan.measured import measured_costs, typical_step
from pipex.runtime.reference import OneProcess

MICROBATCHES = 8
# Of 8 micro-batches on one rank, how many each stage splits.
SPLIT = {"zb-h1": [0], "zbv": [0, 0], "v-half": [2, 1], "v-min": [8, 8], "1f1b": [0]}


def stages(count: int) -> list[nn.Sequential]:
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(count)]


def batch(step: int) -> Tensor:
    return torch.randn(2 * MICROBATCHES, 6, generator=torch.Generator().manual_seed(step))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def pipeline(family: str, **options: Any) -> pipex.Pipeline:
    plan = build(family, 1, MICROBATCHES)
    return pipex.Pipeline(
        stages(plan.placement.stages), plan, nn.functional.mse_loss, optimizer=sgd, clip_norm=0.5, **options
    )


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Splitter]:
    """A splitter for every forward that prepares for a split backward."""
    seen = []
    record = Splitter.record

    def noting(self: Splitter, **options: Any) -> Any:
        seen.append(self)
        return record(self, **options)

    monkeypatch.setattr(Splitter, "record", noting)
    return seen


@pytest.mark.parametrize("family", SPLIT)
def test_only_what_is_deferred_is_split_and_the_bits_are_one_process_s(family: str, recorded: list[Splitter]) -> None:
    pipe = pipeline(family)
    process = OneProcess(stages(len(SPLIT[family])), MICROBATCHES, nn.functional.mse_loss, optimizer=sgd, clip_norm=0.5)
    for step in range(3):
        recorded.clear()
        assert pipe.step(batch(step), batch(step + 1)) == process.step(batch(step), batch(step + 1))
        assert sorted(map(recorded.count, set(recorded))) == sorted(filter(None, SPLIT[family]))
    for stage, wanted in zip(pipe.local_stages, process.stages, strict=True):
        for one, other in zip(stage.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_stage_that_is_split_in_part_is_as_good_with_fused_products(
    assert_as_good: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Without the exact contract W adds products by itself, to what passes of autograd have added before and after."""
    pipe = pipeline("v-half", exact=False)
    single, double = (
        OneProcess([s.to(dtype) for s in stages(2)], MICROBATCHES, nn.functional.mse_loss, optimizer=sgd, clip_norm=0.5)
        for dtype in (torch.float32, torch.float64)
    )
    for step in range(2):
        pipe.step(batch(step), batch(step + 1))
        single.step(batch(step), batch(step + 1))
        double.step(batch(step).double(), batch(step + 1).double())
    for ours, of_torch, exact in zip(pipe.local_stages, single.stages, double.stages, strict=True):
        for triple in zip(ours.parameters(), of_torch.parameters(), exact.parameters(), strict=True):
            assert_as_good(*triple)


class Clock:
    """Goes on when a gradient is made, and not otherwise."""

    def __init__(self) -> None:
        self.now = 0

    def hold(self, nanoseconds: int) -> None:
        self.now += nanoseconds


class Timed(nn.Module):
    """A stage whose forward, input gradient and weight gradient take 1000, 2000 and 3000 ns of a clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)
        self._clock = clock
        self.linear.weight.register_post_accumulate_grad_hook(lambda _: clock.hold(3000))

    def forward(self, x: Tensor) -> Tensor:
        self._clock.hold(1000)
        y: Tensor = torch.tanh(self.linear(x))
        if y.requires_grad:
            y.register_hook(lambda _: self._clock.hold(2000))
        return y


def timed_events(family: str, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    clock, recorder = Clock(), Recorder(3)
    monkeypatch.setattr(observed, "monotonic_ns", lambda: clock.now)
    plan = build(family, 1, MICROBATCHES)
    torch.manual_seed(0)
    pipe = pipex.Pipeline(
        [Timed(clock) for _ in range(plan.placement.stages)], plan, nn.functional.mse_loss, optimizer=sgd,
        observer=recorder,
    )  # fmt: skip
    for step in range(3):
        pipe.step(batch(step), batch(step + 1))
    return recorder.events


@pytest.mark.parametrize("family", SPLIT)
def test_the_events_are_the_plan_s_actions_and_an_i_takes_what_it_makes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = unfused(build(family, 1, MICROBATCHES))
    names = {kind.value for kind in COMPUTE}
    events = [event for event in timed_events(family, monkeypatch) if event.kind in names]
    assert [event.name for event in events] == [str(action) for action in plan.orders[0]] * 3
    typical_step(plan, [events])  # so a trace of it is one of the plan
    for position, event in enumerate(events):
        after = events[position + 1] if position + 1 < len(events) else None
        at_once = event.kind == "I" and after is not None and after.name == event.name.replace("I", "W")
        taken = {"F": {1000}, "B": {5000}, "I": {5000} if at_once else {2000}, "W": {0, 3000}}[event.kind]
        assert event.end - event.begin in taken, event.name
        if at_once:
            assert after is not None
            assert after.end == after.begin == event.end


@pytest.mark.parametrize("family", SPLIT)
def test_costs_measured_of_it_predict_the_step_they_were_measured_of(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = timed_events(family, monkeypatch)
    plan = build(family, 1, MICROBATCHES)
    figures = measure([events], plan.placement)
    costs = measured_costs(plan, figures.action, hop=0.0)
    assert simulate(plan, costs).makespan == pytest.approx(figures.makespan, rel=1e-9)
    for stage, count in enumerate(SPLIT[family]):
        parts = costs.input_gradient[stage], costs.weight_gradient[stage]
        mostly_split = count > MICROBATCHES / 2
        assert parts == pytest.approx((2e-6, 3e-6) if mostly_split else (5e-6, 0.0)), family


def job() -> list[int]:
    counts: dict[int, int] = {}
    record = Splitter.record

    def noting(self: Splitter, **options: Any) -> Any:
        counts[id(self)] = counts.get(id(self), 0) + 1
        return record(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Splitter, "record", noting)
        pipe = pipex.Pipeline(stages(2), build("zb-h1", 2, MICROBATCHES), nn.functional.mse_loss, optimizer=sgd)
        pipe.step(batch(0), batch(1))
    return list(counts.values())


def test_a_send_between_i_and_w_keeps_them_apart() -> None:
    """The gradient leaves before W begins; the first stage sends none."""
    assert pipex.launch(job, 2) == [[], [MICROBATCHES]]
