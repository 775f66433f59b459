"""Two pipelines of different plans in one world: whichever of them a rank fails in, it is named by that one's plan."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transports import TRANSPORTS, start

import pipex
from pipex.errors import PeerFailed

PLANS = {"long": ("gpipe", 8), "short": ("zb-h1", 2)}
"""The long plan has more actions on a rank than the short one has, and at no position of both the same backward."""


class Layer(nn.Module):
    """Does ``deed`` in the forward or the backward of a micro-batch of the second step, on its rank."""

    def __init__(self, microbatches: int, place: tuple[str, int] | None, deed: Callable[[], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._place, self._deed, self._microbatches, self._forwards = place, deed, microbatches, 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if torch.is_grad_enabled():
            step, microbatch = divmod(self._forwards, self._microbatches)
            self._forwards += 1
            if step == 1 and self._place == ("forward", microbatch):
                self._deed()
            if step == 1 and self._place == ("backward", microbatch):
                y.register_hook(lambda _: self._deed())
        return y


def body(
    built: tuple[str, str],
    culprit: int,
    fails: str,
    place: tuple[str, int],
    deed: Callable[[], object],
) -> Callable[[Any], None]:
    """Builds both pipelines in this order, trains each for a step, and then the one that fails for another."""

    def run(world: Any) -> None:
        pipes = {}
        for which in built:
            family, microbatches = PLANS[which]
            here = place if which == fails else None
            stages = [Layer(microbatches, here if stage == culprit else None, deed) for stage in range(2)]
            pipes[which] = pipex.Pipeline(
                stages, pipex.build(family, 2, microbatches), nn.functional.mse_loss, optimizer=torch.optim.SGD
            )
        data = torch.ones(16, 4)
        for pipe in pipes.values():
            pipe.step(data, data)
        pipes[fails].step(data, data)

    return run


def complain() -> None:
    raise ArithmeticError("the loss is not finite")


CASES = [
    # who fails in which, in what, the name, its micro-batch
    (0, "long", ("forward", 6), "0F6", 6),
    (1, "long", ("backward", 5), "1B5", 5),
    (0, "short", ("backward", 1), "0I1", 1),
    (1, "short", ("backward", 0), "1I0", 0),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("built", [("long", "short"), ("short", "long")], ids="-".join)
@pytest.mark.parametrize(("culprit", "fails", "place", "action", "microbatch"), CASES)
def test_an_exception_is_named_by_the_plan_in_which_it_was(
    tmp_path: Path, simulated_cuda: Path, transport: str, built: tuple[str, str], culprit: int, fails: str,
    place: tuple[str, int], action: str, microbatch: int,
) -> None:  # fmt: skip
    job = body(built, culprit, fails, place, complain)
    with start(transport, [job] * 2, tmp_path, simulated_cuda) as ranks:
        outcomes = [ranks.outcome(rank) for rank in range(2)]
    assert outcomes[culprit].get("error") == "ArithmeticError", outcomes
    survivor = outcomes[1 - culprit]
    assert survivor["error"] == "PeerFailed", survivor
    assert survivor["text"] == (
        f"rank {culprit} failed: ArithmeticError: the loss is not finite (step 2, stage {culprit}, action {action}, "
        f"micro-batch {microbatch})"
    )


@pytest.mark.parametrize("transport", ["host", "device"])  # between hosts nobody reads the place of a lost rank
def test_a_killed_rank_is_named_by_the_plan_in_which_it_was(
    tmp_path: Path, simulated_cuda: Path, transport: str
) -> None:
    job = body(("long", "short"), 1, "long", ("backward", 5), lambda: os.kill(os.getpid(), signal.SIGKILL))
    with start(transport, [job] * 2, tmp_path, simulated_cuda) as ranks:
        survivor = ranks.outcome(0)
    place = [survivor.get(name) for name in ("error", "rank", "step", "stage", "action", "microbatch")]
    assert place == ["PeerLost", 1, 2, 1, "1B5", 5], survivor


def test_the_launcher_names_it_too() -> None:
    job = body(("long", "short"), 1, "long", ("backward", 5), complain)
    with pytest.raises(PeerFailed, match=r"rank 1 failed: ArithmeticError: .* \(step 2, stage 1, action 1B5, micro-ba"):
        pipex.launch(lambda: job(pipex.current_world()), 2)


@pytest.mark.parametrize("plans", [("1f1b", "1f1b"), ("zb-h1", "gpipe")], ids="-".join)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_that_are_in_different_pipelines_are_told_so(
    tmp_path: Path, simulated_cuda: Path, transport: str, plans: tuple[str, str]
) -> None:
    """Of equal plans one could be taken for the other: it would train against the other's stage."""

    def run(world: Any) -> None:
        pipes = [
            pipex.Pipeline([nn.Linear(4, 4), nn.Linear(4, 4)], pipex.build(family, 2, 4), nn.functional.mse_loss,
                           optimizer=torch.optim.SGD)
            for family in plans
        ]  # fmt: skip
        data = torch.ones(16, 4)
        pipes[world.rank].step(data, data)

    with start(transport, [run] * 2, tmp_path, simulated_cuda) as ranks:
        outcomes = [ranks.outcome(rank) for rank in range(2)]
    for outcome in outcomes:
        assert outcome["error"] == "ConfigMismatch", outcomes
        assert "the pipeline, counted as they were made; got 1 on rank 0, 2 on rank 1" in outcome["text"], outcomes
