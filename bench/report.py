"""What a benchmark says: one row per case and provider, as a table and as JSON, and whether it passed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from pipex.bench.driver import Quantiles
from pipex.errors import InputError

PASSED, FAILED = 0, 1


@dataclass(frozen=True, slots=True)
class Row:
    """One provider in one case.

    Attributes:
        case: the name under which floors refer to it.
        size: what was worked on: ``{"bytes": 4096}`` or ``{"shape": [4, 64]}``.
        time: in microseconds.
        ratio: the peer's median / this provider's, from the same run: above 1 is faster than the peer, and the
            peer's own row has 1.
        correct: whether every result was right.
        figures: the benchmark's own columns; None where there is nothing to say.
        beyond: figures that are None because they are better than can be seen. They meet every floor.
    """

    case: str
    provider: str
    size: Mapping[str, int | Sequence[int]]
    time: Quantiles
    ratio: float
    correct: bool
    figures: Mapping[str, float | None] = field(default_factory=dict)
    beyond: Collection[str] = ()

    def as_json(self) -> dict[str, Any]:
        times = {"p50_us": self.time.p50, "p20_us": self.time.p20, "p80_us": self.time.p80}
        rounded = {name: _round(value) for name, value in {**times, "ratio": self.ratio, **self.figures}.items()}
        return {"case": self.case, "provider": self.provider, **self.size, **rounded, "correct": self.correct}


@dataclass(frozen=True, slots=True)
class Floor:
    """The least (or the most) that ``figure`` (a key of a row's JSON) of ``provider`` must be in ``case``."""

    case: str
    provider: str
    figure: str
    limit: float
    most: bool = False

    def misses(self, value: float) -> bool:
        return not (value <= self.limit if self.most else value >= self.limit)  # nor does a NaN meet it


def parse_floors(text: str, provider: str, figure: str, cases: Sequence[str], *, most: bool = False) -> list[Floor]:
    """Reads ``case=number,case=number``; ``most`` makes them ceilings.

    Raises:
        InputError: it has another form, or names a case that will not be measured.
    """
    floors = []
    for part in text.split(","):
        case, _, number = part.partition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if math.isnan(limit):  # a written one too: no figure is below or above it, so it would always hold
            raise InputError("not a floor", got=repr(part), needed=f"case=number, such as {cases[0]}=2.5")
        if case not in cases:
            raise InputError("a floor for a case that is not measured", got=case, needed=f"one of {', '.join(cases)}")
        floors.append(Floor(case, provider, figure, limit, most))
    return floors


def failures(rows: Iterable[Row], floors: Iterable[Floor]) -> list[str]:
    """A sentence for every wrong result and every floor that was missed or, for want of a figure, not shown to hold."""
    by_name = {(row.case, row.provider): row for row in rows}
    sentences = [
        f"{case}: {provider} gave a wrong result" for (case, provider), row in by_name.items() if not row.correct
    ]
    for floor in floors:
        row = by_name[floor.case, floor.provider]
        value, subject = row.as_json()[floor.figure], f"{floor.case}: {floor.figure} of {floor.provider}"
        if value is None and floor.figure not in row.beyond:
            sentences.append(f"{subject} could not be measured, and a limit of {floor.limit:g} was asked for")
        elif value is not None and floor.misses(value):
            limit = f"{'above the ceiling' if floor.most else 'below the floor'} of {floor.limit:g}"
            sentences.append(f"{subject} is {value:.4g}, {limit}")
    return sentences


def finish(environment: Mapping[str, Any], rows: Sequence[Row], floors: Iterable[Floor], *, as_json: bool) -> int:
    """Prints everything and returns the exit code: FAILED after a wrong result or a missed floor.

    With ``as_json`` standard output gets one line of JSON and the table goes to standard error.
    """
    return say(environment, [row.as_json() for row in rows], failures(rows, floors), as_json=as_json)


def say(
    environment: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    sentences: Sequence[str],
    *,
    as_json: bool,
    command: str = "pipex bench",
) -> int:
    """``finish`` for rows as they are printed, and the sentences on what failed."""
    _print_table(environment, lines, sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps({"environment": environment, "rows": lines}), flush=True)
    for sentence in sentences:
        print(f"{command}: {sentence}", file=sys.stderr)
    return FAILED if sentences else PASSED


def _print_table(environment: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], file: TextIO) -> None:
    for key, value in environment.items():
        print(f"# {key}: {value}", file=file)
    header = [key for key in lines[0] if key not in ("bytes", "shape")]  # the case says them in short
    cells = [header] + [[_text(line[key]) for key in header] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), file=file)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "WRONG"
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
