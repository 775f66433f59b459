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
    other_is_in: str,
    deed: Callable[[], object],
) -> Callable[[Any], None]:
    """Builds both pipelines in this order, trains each for a step, and then the ranks go on where they are told to."""

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
        pipes[fails if world.rank == culprit else other_is_in].step(data, data)

    return run


def complain() -> None:
    raise ArithmeticError("the loss is not finite")


CASES = [
    # who fails in which, in what, the other is in, the name, its micro-batch
    (0, "long", ("forward", 6), "long", "0F6", 6),
    (1, "long", ("backward", 5), "long", "1B5", 5),
    (0, "short", ("backward", 1), "short", "0I1", 1),
    (1, "short", ("backward", 0), "short", "1I0", 0),
    (0, "long", ("forward", 6), "short", "0F6", 6),  # the other waits for a message that will not come
    (0, "short", ("forward", 1), "long", "0F1", 1),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("built", [("long", "short"), ("short", "long")], ids="-".join)
@pytest.mark.parametrize(("culprit", "fails", "place", "other_is_in", "action", "microbatch"), CASES)
def test_an_exception_is_named_by_the_plan_in_which_it_was(
    tmp_path: Path, simulated_cuda: Path, transport: str, built: tuple[str, str], culprit: int, fails: str,
    place: tuple[str, int], other_is_in: str, action: str, microbatch: int,
) -> None:  # fmt: skip
    job = body(built, culprit, fails, place, other_is_in, complain)
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
    job = body(("long", "short"), 1, "long", ("backward", 5), "long", lambda: os.kill(os.getpid(), signal.SIGKILL))
    with start(transport, [job] * 2, tmp_path, simulated_cuda) as ranks:
        survivor = ranks.outcome(0)
    place = [survivor.get(name) for name in ("error", "rank", "step", "stage", "action", "microbatch")]
    assert place == ["PeerLost", 1, 2, 1, "1B5", 5], survivor


def test_the_launcher_names_it_too() -> None:
    job = body(("long", "short"), 1, "long", ("backward", 5), "long", complain)
    with pytest.raises(PeerFailed, match=r"rank 1 failed: ArithmeticError: .* \(step 2, stage 1, action 1B5, micro-ba"):
        pipex.launch(lambda: job(pipex.current_world()), 2)
