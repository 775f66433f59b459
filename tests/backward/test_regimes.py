"""How much of the weight gradients waits for W, counted in operations, by kind of operation and by regime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from module_kinds import KINDS, ROWS, TOKENS, WIDTH, opaque, square
from random_modules import Drawn, differences
from regimes import REGIMES, shares
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # F.rms_norm under autocast

LEAST = 0.95

FEW = ("linear", "encoder layer", "addmm", "grouped experts", "two-dimensional convolution", "own parametrization")


def pairs() -> list[tuple[str, str]]:
    """Every kind in plain autograd and under autocast, some in every regime."""
    return [(k, r) for r in REGIMES for k in KINDS if k in FEW or r in ("plain", "bf16 autocast")]


def of_kind(kind: str, regime: str) -> Drawn:
    """Two of a kind in a row, two micro-batches under way, a hook on every parameter."""
    order = (("F", 0), ("F", 1), ("I", 0), ("I", 1), ("W", 0), ("W", 1))
    return Drawn(
        7, regime, ((kind, ("tanh",), "plain"),) * 2, (), frozen=0, hooked=0, hook_factor=1, penalized=False,
        double=False, needs_gradient=True, order=order, functions=False,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "regime"), pairs())
def test_weight_gradients_wait(kind: str, regime: str) -> None:
    x = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    found = shares(of_kind(kind, regime).build, REGIMES[regime], x)
    assert found.in_input + found.in_weight == found.whole, "nothing is computed twice"
    assert found.deferred >= LEAST


@pytest.mark.parametrize(("kind", "regime"), pairs())
def test_bits_are_those_of_autograd(kind: str, regime: str) -> None:
    assert differences(of_kind(kind, regime)) == []


@pytest.mark.parametrize(("kind", "regime"), [(k, r) for k, r in pairs() if k in FEW])
def test_hooks_see_what_they_see_unsplit(kind: str, regime: str) -> None:
    assert differences(replace(of_kind(kind, regime), hooked=1, hook_factor=0.5)) == []


@pytest.mark.parametrize("kind", FEW)
def test_weight_gradients_wait_where_the_input_needs_none(kind: str) -> None:
    """As many as behind one that does."""
    build, x = of_kind(kind, "plain").build, torch.randn(ROWS, TOKENS, WIDTH)
    found = shares(build, REGIMES["plain"], x)
    assert found.in_input + found.in_weight == found.whole
    assert found.in_weight == shares(build, REGIMES["plain"], x.clone().requires_grad_()).in_weight


def hooked(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = build()
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient: gradient * 2)
        return module

    return make


@pytest.mark.parametrize("kind", FEW)
def test_weight_gradients_wait_where_hooks_do(kind: str) -> None:
    found = shares(
        hooked(of_kind(kind, "plain").build), REGIMES["plain"], torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    )
    assert found.deferred >= LEAST


def test_what_does_not_wait_is_counted() -> None:
    """One of three."""

    def build() -> nn.Module:
        return nn.Sequential(square(), nn.Tanh(), square(), opaque())

    found = shares(build, REGIMES["plain"], torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True))
    assert found == (3, 6, 4, 2)
    assert found.deferred == pytest.approx(2 / 3)
