"""Cases of a sweep: a sample of them, or all of them one after the other in one test."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SEED = int(os.environ.get("PIPEX_TEST_SEED", "0"))
"""Of all samples of a run: the same in every one, so that a commit fails by its own change; drawn anew at night."""


def sampled(
    cases: Iterable[Any], count: int, *, name: str, stratum: Callable[[Any], object] = lambda case: None,
    others: pytest.MarkDecorator = pytest.mark.nightly,
) -> list[Any]:  # fmt: skip
    """All cases for ``pytest.mark.parametrize``; those outside of the sample are marked.

    Args:
        cases: a case that is a tuple is one of several arguments; else wrap it into ``pytest.param``.
        count: of each stratum, so many are drawn, or all where there are fewer.
        name: of the sweep, so that each draws for itself.
        stratum: what cases must agree in to be of one stratum.
        others: the mark of those outside.
    """
    strata: dict[object, list[int]] = {}
    everything = list(cases)
    for index, case in enumerate(everything):
        strata.setdefault(stratum(case), []).append(index)
    chance = random.Random(f"{SEED} {name}")
    drawn = {index for members in strata.values() for index in chance.sample(members, min(count, len(members)))}
    return [case if index in drawn else _marked(case, others) for index, case in enumerate(everything)]


def _marked(case: Any, mark: pytest.MarkDecorator) -> Any:
    if hasattr(case, "marks"):
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, mark])
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark)


@contextmanager
def case(*what: object) -> Iterator[None]:
    """Around one of several cases of a test: it is named if it fails."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"in the case {', '.join(map(str, what))}: {error}") from error
