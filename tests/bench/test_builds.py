from __future__ import annotations

from pathlib import Path

import pytest

from pipex.bench import builds
from pipex.errors import InputError


def row(step: float, compute: float, **more: object) -> dict[str, object]:
    overhead = (step - compute) / 32  # 16 micro-batches
    figures = {"step_us": step, "compute_us": compute, "overhead_us_per_action": overhead}
    return {"case": "1f1b/8x2", "provider": "pipex", "shape": [2, 8], **figures, "correct": True, **more}


def test_what_a_plan_leaves_idle_is_no_overhead() -> None:
    (found,) = builds.figures([row(2000.0, 1600.0)]).values()
    assert found["net_us_per_action"] == (2000.0 - 1700.0) / 32
    (unseen,) = builds.figures([row(1600.0, 1600.0)]).values()
    assert "net_us_per_action" not in unseen


def test_medians_of_what_both_builds_report_are_compared() -> None:
    this = [builds.figures([row(step, 1600.0, new=1.0)]) for step in (2000.0, 1800.0, 9000.0)]
    other = [builds.figures([row(step, 1600.0)]) for step in (2900.0, 2000.0, 2500.0)]
    header, *lines = builds.comparison(this, other)
    assert header.split() == ["case", "provider", "figure", "other", "this", "this/other"]
    assert [line.split()[2:] for line in lines] == [
        ["step_us", "2500", "2000", "0.800"], ["compute_us", "1600", "1600", "1.000"],
        ["overhead_us_per_action", "28.12", "12.5", "0.444"], ["net_us_per_action", "25", "9.375", "0.375"],
    ]  # fmt: skip


def test_a_folder_without_a_build_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no build of pipex there"):
        builds.main([str(tmp_path), "step"])


@pytest.mark.long
def test_this_build_beside_itself(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shapes", "8x2", "-m", "2", "-n", "2", "-w", "1", "--schedules", "gpipe"]
    assert builds.main([str(builds.THIS), "--rounds", "2", "step", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {tuple(line.split()[1:3]) for line in lines[1:]} >= {("pipex", "step_us"), ("torch", "step_us")}
