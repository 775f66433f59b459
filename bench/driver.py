"""Interleaved measurements: every provider takes its turn in every round, so that whatever disturbs this machine
disturbs all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often to measure: ``warmups`` rounds that are thrown away, then ``samples`` that count."""

    samples: int
    warmups: int

    def interleave(self, providers: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
        """The samples of each provider, which is called once per round, in the mapping's order."""
        samples: dict[str, list[float]] = {name: [] for name in providers}
        for number in range(self.warmups + self.samples):
            for name, measure in providers.items():
                sample = measure()
                if number >= self.warmups:
                    samples[name].append(sample)
        return samples


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one provider's samples, in their unit."""

    p20: float
    p50: float
    p80: float


def quantiles(samples: Sequence[float]) -> Quantiles:
    """By linear interpolation between samples, the extremes included."""
    if len(samples) == 1:
        return Quantiles(samples[0], samples[0], samples[0])
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Quantiles(tenths[1], tenths[4], tenths[7])
