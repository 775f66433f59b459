"""Parameters that several stages use, against plain torch; and what would let their copies on the ranks drift apart.

With one micro-batch and two uses there are two gradients to add, so plain torch, which adds them in another order, has
the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import host_world
import pytest
import torch
import torch.nn.functional as F
from layer_kinds import SIZE, lin
from random_models import digest
from torch import Tensor, nn

import pipex

PLACES = [pytest.param("looped-bfs", 1, id="one rank"), pytest.param("1f1b", 2, id="two ranks"),
          pytest.param("zb-h1", 2, id="two ranks, split")]  # fmt: skip
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)

Found = tuple[list[float], dict[str, str | None]]
"""The losses, and a digest of every parameter by name."""


def batch(step: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 6, SIZE, SIZE, generator=torch.Generator().manual_seed(step))
    return x, y


def pipeline(model: nn.Sequential, family: str = "1f1b", microbatches: int = 1, **options: Any) -> pipex.Pipeline:
    """Of two stages."""
    ranks = pipex.current_world().ranks
    plan = pipex.build(family, ranks, microbatches, chunks=2 // ranks)
    return pipex.Pipeline(
        pipex.split_model(model, 2), plan, options.pop("loss", F.mse_loss), **{"optimizer": sgd, **options}
    )


def digests(pipe: pipex.Pipeline) -> dict[str, str | None]:
    return {name: digest(tensor) for stage in pipe.local_stages for name, tensor in stage.names.items()}


def assert_plain(found: list[Found], model: nn.Module, losses: list[float]) -> None:
    expected = {name: digest(parameter) for name, parameter in model.named_parameters()}
    for ours, parameters in found:
        assert ours == losses
        assert parameters == {name: expected[name] for name in parameters}
    assert set().union(*(parameters for _, parameters in found)) == set(expected)


def plain_step(model: nn.Module, update: torch.optim.Optimizer, step: int) -> float:
    x, y = batch(step)
    loss = F.mse_loss(model(x), y)
    loss.backward()
    update.step()
    update.zero_grad()
    return loss.item()


# Uses that come and go.


class Sided(nn.Module):
    """Adds a parameter in some of its forwards."""

    def __init__(self, side: nn.Parameter, uses: tuple[bool, ...]) -> None:
        super().__init__()
        self.inner, self.side, self.uses = lin(), side, list(uses)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        return y + self.side if self.uses.pop(0) else y


def sided(first: tuple[bool, ...], second: tuple[bool, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    side = nn.Parameter(torch.randn(SIZE))
    return nn.Sequential(Sided(side, first), Sided(side, second))


USES = ((True, False, True, False), (True, True, False, False))
"""Of the two layers in four steps: both, one on either side, none."""


def train_sided(family: str) -> tuple[Found, list[str]]:
    pipe = pipeline(sided(*USES), family)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = [pipe.step(*batch(step)) for step in range(4)]
    return (losses, digests(pipe)), [str(warning.message).partition(";")[0] for warning in told]


@pytest.mark.parametrize(("family", "ranks"), PLACES)
def test_a_tied_parameter_that_no_use_reached_has_no_gradient(family: str, ranks: int) -> None:
    """With zeros in its place, as before, momentum and weight decay moved it, and nothing was said."""
    model = sided(*USES)
    update = sgd(model.parameters())
    losses = [plain_step(model, update, step) for step in range(4)]
    found = host_world.launch(train_sided, ranks, args=(family,))
    assert_plain([result for result, _ in found], model, losses)
    assert [told for _, told in found] == [["no gradient came to 0.side"]] * ranks
