"""A benchmark of two builds of pipex by turns, such as this one and the one before a change.

    pip install --no-deps --target=before CHECKOUT
    python -m pipex.bench.builds before step --shapes 64x4

Every round runs ``pipex bench BENCHMARK --json OPTIONS...`` once in each build, the other build first in every second
round. For each row that both report, and each figure in it, the medians over the rounds are printed, and this build's
over the other one's: below 1 this build takes less. A benchmark that fails in either build, as on a wrong result, ends
the comparison. For steps of two equal stages ``net_us_per_action`` is worked out here from step and compute, the same
way for both builds, since a build may not report it: a plan of m micro-batches leaves (m + 1)/m of the compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pipex
from pipex.errors import InputError

THIS = Path(pipex.__file__).parent.parent

Figures = dict[tuple[str, str], dict[str, float]]
"""By case and provider."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipex.bench.builds", description="Two builds of pipex by turns.")
    parser.add_argument("other", metavar="FOLDER", type=Path, help="with the other build's package in it")
    parser.add_argument("--rounds", metavar="COUNT", type=int, default=5, help="runs of each build (default: 5)")
    parser.add_argument("benchmark", metavar="BENCHMARK", help="of pipex bench")
    parser.add_argument("options", metavar="OPTION", nargs=argparse.REMAINDER, help="its options")
    options = parser.parse_args(arguments)
    if not (options.other / "pipex" / "__init__.py").is_file():
        raise InputError("no build of pipex there", got=options.other, needed="a folder with the package pipex in it",
                         fix="pip install --no-deps --target=FOLDER the other version")  # fmt: skip
    builds = {"other": options.other.resolve(), "this": THIS}
    runs: dict[str, list[Figures]] = {name: [] for name in builds}
    for number in range(options.rounds):
        for name in sorted(builds, reverse=bool(number % 2)):
            runs[name].append(_run(builds[name], [options.benchmark, "--json", *options.options]))
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
    for line in comparison(runs["this"], runs["other"]):
        print(line)
    return 0


def _run(build: Path, arguments: Sequence[str]) -> Figures:
    done = subprocess.run(
        [sys.executable, "-m", "pipex", "bench", *arguments],
        cwd=build,  # where -m looks first
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return figures(json.loads(done.stdout.splitlines()[-1])["rows"])


def figures(rows: Sequence[Mapping[str, Any]]) -> Figures:
    """The numbers of a benchmark's rows."""
    found: Figures = {}
    for row in rows:
        own = {name: value for name, value in row.items() if isinstance(value, float)}
        if "compute_us" in own and own["step_us"] > own["compute_us"]:
            microbatches = round((own["step_us"] - own["compute_us"]) / own["overhead_us_per_action"]) // 2
            bound = own["compute_us"] * (microbatches + 1) / microbatches
            own["net_us_per_action"] = (own["step_us"] - bound) / (2 * microbatches)
        found[row["case"], row["provider"]] = own
    return found


def comparison(this: Sequence[Figures], other: Sequence[Figures]) -> list[str]:
    """A line per figure that every run of both builds has."""
    lines = [f"{'case':>20} {'provider':>10} {'figure':>24} {'other':>10} {'this':>10} {'this/other':>10}"]
    for case, provider in this[0]:
        every = [run.get((case, provider), {}) for run in (*this, *other)]
        for name in this[0][case, provider]:
            if all(name in run for run in every):
                new, old = (statistics.median(run[case, provider][name] for run in runs) for runs in (this, other))
                ratio = f"{new / old:10.3f}" if old else f"{'-':>10}"
                lines.append(f"{case:>20} {provider:>10} {name:>24} {old:10.4g} {new:10.4g} {ratio}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
