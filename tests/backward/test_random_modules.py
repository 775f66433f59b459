"""Random modules in random regimes: I and W have the bits of autograd, and hooks see what they see there.

But where a parameter is used in recorded operations and in others: under autocast autograd adds the gradients of both
in lower precision before it casts them back, the tape those of its own; and it adds what others make in its own order.
There, and there alone, rounding may differ.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from cases import SEED, case
from random_modules import differences, draw, error, rounding

from pipex.errors import UnsupportedModule

MODULES, SAMPLE, TOGETHER = 20_000, 200, 100

REFUSED = 0.02
"""The largest share of a hundred that may be refused."""

ROUNDED = 0.02
"""The largest share of a hundred that may differ in rounding."""


def groups() -> Iterator[Any]:
    sample = random.Random(f"{SEED} random modules").sample(range(MODULES // TOGETHER), SAMPLE // TOGETHER)
    for number in range(MODULES // TOGETHER):
        yield pytest.param(number, marks=() if number in sample else pytest.mark.nightly)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of F.rms_norm under autocast
@pytest.mark.parametrize("group", list(groups()))
def test_random_modules_have_the_bits_of_autograd(group: int) -> None:
    """Those that torch runs: it refuses some, such as a change in place of what a layer has saved."""
    compared = refused = rounded = 0
    for seed in range(group * TOGETHER, (group + 1) * TOGETHER):
        drawn = draw(seed)
        with case(drawn):
            try:
                found = differences(drawn)
            except UnsupportedModule:
                refused += 1
                continue
            if found and rounding(drawn):
                assert error(drawn) < rounding(drawn)
                rounded += 1
            else:
                assert not found
            compared += found is not None
    assert compared > 0.75 * TOGETHER
    assert refused <= REFUSED * TOGETHER
    assert rounded <= ROUNDED * TOGETHER
