"""Runs tests with the torch of this environment, and writes how they ended into a table of versions.

python tests/torch_versions.py docs/torch-versions.md [pytest's arguments ...]
"""

from __future__ import annotations

import platform
import sys
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
import torch

RULE = "|---|---|---|---|---|---|\n"


class Outcomes:
    """How tests ended: as xdist's controller sees it, too."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.counts["failed"] += report.failed


def with_row(text: str, row: str) -> str:
    """The page with this row in place of that of the same torch and Python, the newest first."""
    before, after = text.split(RULE)
    rows = after[: after.index("\n\n") + 1].splitlines(keepends=True) if after.startswith("|") else []
    rest = after.removeprefix("".join(rows))
    key = row.split("|")[1:3]
    rows = [other for other in rows if other.split("|")[1:3] != key] + [row]
    rows.sort(key=lambda row: [list(map(int, cell.split("."))) for cell in row.split("|")[1:3]], reverse=True)
    return before + RULE + "".join(rows) + rest


def main(page: Path, arguments: list[str]) -> int:
    outcomes = Outcomes()
    status = int(pytest.main(arguments, plugins=[outcomes]))
    counts = [outcomes.counts[name] for name in ("passed", "failed", "skipped")]
    if status not in (0, 1) or not counts[0]:
        return status or 1  # interrupted, or nothing ran
    version, python = torch.__version__.split("+")[0], platform.python_version()
    row = " | ".join([version, python, *(f"{count:,}" for count in counts), date.today().isoformat()])
    page.write_text(with_row(page.read_text(), f"| {row} |\n"))
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
