from __future__ import annotations

import pytest
import torch

from pipex.bench.driver import Rounds, quantiles


def test_providers_take_turns_and_warm_up_rounds_do_not_count() -> None:
    calls: list[str] = []

    def provider(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = Rounds(samples=2, warmups=1).interleave({"a": lambda: provider("a"), "b": lambda: provider("b")})
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert samples == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20, 33])
def test_quantiles_are_those_of_torch(count: int) -> None:
    samples = torch.rand(count, dtype=torch.float64)
    found = quantiles(samples.tolist())
    wanted = torch.quantile(samples, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    torch.testing.assert_close(torch.tensor([found.p20, found.p50, found.p80], dtype=torch.float64), wanted)
