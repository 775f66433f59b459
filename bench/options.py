"""What the options of all benchmarks share. Imports no torch, so that ``pipex tune --help`` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipex.bench.driver import Rounds
from pipex.bench.report import Floor, parse_floors
from pipex.errors import InputError


def add_rounds(parser: argparse.ArgumentParser, samples: int) -> None:
    """Declares how often is measured, and how the result is printed."""
    parser.add_argument("-n", metavar="COUNT", type=int, default=samples, help=f"samples (default: {samples})")
    parser.add_argument("-w", metavar="COUNT", type=int, default=5, help="rounds before them (default: 5)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line; the table goes to stderr"
    )


def add_common(parser: argparse.ArgumentParser, *, samples: int, floor: str) -> None:
    """Declares what every benchmark has; ``floor`` says what ``--min-ratio`` is of."""
    add_rounds(parser, samples)
    parser.add_argument("--min-ratio", metavar="CASE=RATIO,...", help=floor + "; exit 1 below")


def rounds_of(options: argparse.Namespace) -> Rounds:
    """
    Raises:
        InputError: nothing would be measured.
    """
    if options.n < 1 or options.w < 0:
        raise InputError(
            "nothing would be measured", got=f"-n {options.n} -w {options.w}", needed="-n 1 or more, -w 0 or more"
        )
    return Rounds(options.n, options.w)


def floors_of(options: argparse.Namespace, provider: str, cases: Sequence[str]) -> list[Floor]:
    """What ``--min-FIGURE`` and ``--max-FIGURE`` ask of the provider.

    Raises:
        InputError: a floor for none of ``cases``, whose names are known before anything is measured.
    """
    floors: list[Floor] = []
    for option, text in vars(options).items():
        least_or_most, _, figure = option.partition("_")
        if least_or_most in ("min", "max") and text is not None:
            floors += parse_floors(text, provider, figure, cases, most=least_or_most == "max")
    return floors
