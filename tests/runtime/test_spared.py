"""Stages that are recomputed inside I, or offloaded to host memory between F and I: less memory, the same bits.

Random models with such stages are in ``test_random_models``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from typing import Any

import held_activations
import host_world
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_kinds import SIZE
from torch import Tensor, nn

import pipex
from pipex.errors import PeerFailed
from pipex.observe import Event
from pipex.plan import Plan
from pipex.plan.memory import with_promise
from pipex.plan.offload import away


def spared(family: str, ranks: int, microbatches: int, **stages: tuple[int, ...]) -> Plan:
    return with_promise(dataclasses.replace(pipex.build(family, ranks, microbatches), **stages))


def test_what_is_recomputed_or_away_is_not_in_memory() -> None:
    found = json.loads(subprocess.run([sys.executable, held_activations.__file__], check=True, text=True,
                                      capture_output=True).stdout)  # fmt: skip
    losses = {loss for _, loss in found.values()}
    assert len(losses) == 1
    whole = held_activations.LAYERS * held_activations.TENSOR
    assert found["kept"][0] > held_activations.MICROBATCHES * whole
    assert found["recomputed"][0] < 2 * whole
    assert found["offloaded"][0] < 2 * whole


class Counting(nn.Module):
    """Counts its forwards in what is not its own."""

    def __init__(self, counts: Counter[str], called: str) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(SIZE, SIZE), nn.Dropout(0.3)
        self.__dict__["note"] = partial(self._note, counts, called)

    @staticmethod
    def _note(counts: Counter[str], called: str) -> None:
        counts[called] += 1

    def forward(self, x: Tensor) -> Tensor:
        self.note()
        y: Tensor = self.dropout(torch.tanh(self.linear(x)))
        return y


def rank_count(family: str) -> tuple[dict[str, int], list[float], int, list[str]]:
    """Forwards by stage in one step, losses, activations held, and the actions in their order."""
    counts: Counter[str] = Counter()
    torch.manual_seed(0)
    plan = spared(family, 2, 4, recomputed=(0, 1)) if family else pipex.build("zb-h1", 2, 4)
    events: list[Event] = []
    pipeline = pipex.Pipeline(
        [Counting(counts, "0"), Counting(counts, "1")], plan, F.mse_loss, observer=events.append,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )  # fmt: skip
    x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1))
    losses = [pipeline.step(x, x)]
    once = dict(counts)
    losses.append(pipeline.step(x, x))
    return once, losses, pipeline.peak_activations, [e.name for e in events if e.step == 1 and e.kind in "FIWB"]


@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_a_recomputed_stage_runs_each_forward_twice_and_holds_what_the_plan_promises(family: str) -> None:
    """With dropout, whose seeds are those of the first forward; in the order of the plan."""
    results = host_world.launch(rank_count, 2, args=(family,))
    kept = host_world.launch(rank_count, 2, args=("",))
    for rank, (counts, losses, held, names) in enumerate(results):
        assert counts == {str(rank): 8}
        assert losses == kept[rank][1]
        assert held <= spared(family, 2, 4, recomputed=(0, 1)).peak_activations[rank] <= 1 + (family == "zb-h1")
        assert names == [str(action) for action in pipex.build(family, 2, 4).orders[rank]]
    assert [counts for counts, *_ in kept] == [{"0": 4}, {"1": 4}]


def rank_autocast(kind: str) -> list[float]:
    torch.manual_seed(0)
    plan = spared("1f1b", 2, 4, **({} if kind == "kept" else {kind: (0, 1)}))
    layers = [nn.Sequential(nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE)) for _ in range(2)]
    pipeline = pipex.Pipeline(layers, plan, F.mse_loss, optimizer=partial(torch.optim.AdamW, lr=0.1), clip_norm=1.0)
    x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        return [pipeline.step(x, x) for _ in range(4)]


@pytest.mark.parametrize("kind", ["recomputed", "offloaded"])
def test_autocast_is_that_of_the_first_forward(kind: str) -> None:
    expected = host_world.launch(rank_autocast, 2, args=("kept",))
    assert host_world.launch(rank_autocast, 2, args=(kind,)) == expected


class ChangesWhatIsSaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp(self.linear(x))
        return y.mul_(2) + x


def rank_changes_what_is_saved(kind: str) -> float:
    plan = spared("gpipe", 1, 3, **({} if kind == "kept" else {kind: (0,)}))
    assert kind != "offloaded" or any(one.gone < one.back for one in away(plan, 0))
    pipeline = pipex.Pipeline([ChangesWhatIsSaved()], plan, F.mse_loss, optimizer=torch.optim.SGD)
    return pipeline.step(torch.ones(6, SIZE), torch.ones(6, SIZE))


@pytest.mark.parametrize("kind", ["kept", "recomputed", "offloaded"])
def test_what_autograd_refuses_is_refused(kind: str) -> None:
    with pytest.raises(RuntimeError, match="modified"):
        host_world.launch(rank_changes_what_is_saved, 1, args=(kind,))


def rank_of_running_statistics(kind: str) -> Any:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE)), nn.Linear(SIZE, SIZE)]
    plan = spared("1f1b", 2, 4, **({} if kind == "kept" else {kind: (0,)}))
    pipeline = pipex.Pipeline(stages, plan, F.mse_loss, optimizer=torch.optim.SGD)
    x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1))
    losses = [pipeline.step(x, x) for _ in range(3)]
    return losses, stages[0][1].running_mean.tolist() if pipex.current_world().rank == 0 else None


def test_a_second_forward_that_would_change_something_again_is_refused() -> None:
    with pytest.raises(PeerFailed, match=r"BatchNorm1d \(1 of layer 0\) is in stage 0, which is recomputed, and keeps"):
        host_world.launch(rank_of_running_statistics, 2, args=("recomputed",))
    kept, offloaded = (host_world.launch(rank_of_running_statistics, 2, args=(k,)) for k in ("kept", "offloaded"))
    assert offloaded == kept


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)


class DroppedByPython(Part):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) if random.random() < 0.5 else self.linear(x)


class DroppedByNumpy(Part):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) if np.random.random() < 0.5 else self.linear(x)


class Count:
    number = 0


class CountsElsewhere(Part):
    def __init__(self) -> None:
        super().__init__()
        self.counted = Count()

    def forward(self, x: Tensor) -> Tensor:
        self.counted.number += 1
        y: Tensor = self.linear(x) * self.counted.number
        return y


class CountsInAHook(Part):
    def __init__(self) -> None:
        super().__init__()
        numbers = itertools.count(1)
        self.linear.register_forward_hook(lambda _, inputs, output: output * next(numbers))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class WritesToAWeight(Part):
    def __init__(self) -> None:
        super().__init__()
        self.linear.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)
        return x * self.linear.bias


class InPlace(Part):
    """On one of two inputs, which may be one."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a.mul_(2)
        y: Tensor = self.linear(a) + b
        return y


def halved(output: Tensor, target: Tensor) -> Tensor:
    target.mul_(0.5)
    return F.mse_loss(output, target)


def rank_of_hidden_state(kind: str, layer: type[nn.Module], family: str = "1f1b") -> list[float]:
    random.seed(pipex.current_world().rank)
    np.random.seed(pipex.current_world().rank)
    torch.manual_seed(0)
    plan = spared(family, 2, 4, **({} if kind == "kept" else {kind: (0, 1)}))
    pipeline = pipex.Pipeline([layer(), layer()], plan, halved, optimizer=partial(torch.optim.SGD, lr=0.1))
    x, y = torch.randn(2, 8, SIZE, generator=torch.Generator().manual_seed(1))
    return [pipeline.step(x, y.clone()) for _ in range(3)]


@pytest.mark.parametrize("layer", [DroppedByPython, DroppedByNumpy])
def test_what_python_and_numpy_draw_is_drawn_again_alike(layer: type[nn.Module]) -> None:
    """And a loss that works in place on its target sees the target, not what it has made of it before."""
    kept = host_world.launch(rank_of_hidden_state, 2, args=("kept", layer))
    assert host_world.launch(rank_of_hidden_state, 2, args=("recomputed", layer)) == kept


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (CountsElsewhere, "its second forward gave something else than its first one"),
        (CountsInAHook, "its second forward gave something else than its first one"),
        (
            WritesToAWeight,
            r"Linear \(linear of layer \d\) is in stage \d, which is recomputed, and keeps what its forward",
        ),
    ],
)
def test_what_hides_from_its_module_is_refused(layer: type[nn.Module], words: str) -> None:
    assert host_world.launch(rank_of_hidden_state, 2, args=("kept", layer))
    with pytest.raises(PeerFailed, match=f"UnsupportedModule: .*{words}"):
        host_world.launch(rank_of_hidden_state, 2, args=("recomputed", layer))


def test_copies_of_the_model_are_not_written_to_by_a_layer_around_them() -> None:
    with pytest.raises(PeerFailed, match=r"UnsupportedModule: Linear \(linear of layer \d\) is used in the stages"):
        host_world.launch(rank_of_hidden_state, 2, args=("kept", WritesToAWeight, "chimera"))


def test_inputs_that_are_one_tensor_stay_one() -> None:
    x, y = torch.randn(2, 8, SIZE, generator=torch.Generator().manual_seed(1))
    losses = []
    for kind in ("kept", "recomputed"):
        torch.manual_seed(0)
        plan = spared("gpipe", 1, 2, **({} if kind == "kept" else {kind: (0,)}))
        own = x.clone()
        pipeline = pipex.Pipeline([InPlace()], plan, F.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1))
        losses.append(pipeline.step((own, own), y))
        assert torch.equal(own, 2 * x)  # once
    torch.manual_seed(0)
    layer = InPlace()
    expected = [F.mse_loss(layer(a, a), b) * 0.5 for a, b in zip(x.clone().chunk(2), y.chunk(2), strict=True)]
    assert losses == [sum(expected).item()] * 2
