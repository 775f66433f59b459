"""The logic of ``make gpu-check``, with small commands in the place of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipex.bench import gpu_check
from pipex.bench.gpu_check import Step, check, run_step, steps

GPU, NO_GPU = {"gpu": "abacus"}, {"gpu": None}


def python(code: str, **rest: Any) -> Step:
    return Step(rest.pop("name", "step"), [sys.executable, "-c", code], rest.pop("seconds", 30), **rest)


def test_a_failing_step_is_recorded_and_the_rest_still_runs(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    bad = python("import sys; print('before'); print('because', file=sys.stderr); sys.exit(3)", name="bad")
    report = check([bad, python("", name="good")], GPU, 60, path)
    assert json.loads(path.read_text()) == report
    assert os.listdir(tmp_path) == ["report.json"]
    assert report["passed"] is False
    assert [(s["step"], s["passed"], s["problem"]) for s in report["steps"]] == [
        ("bad", False, "exit code 3"),
        ("good", True, ""),
    ]
    assert report["steps"][0]["tail"] == "before\nbecause\n"


def test_all_steps_that_pass_are_a_pass(tmp_path: Path) -> None:
    assert check([python(""), python("")], GPU, 60, tmp_path / "report.json")["passed"] is True


def test_a_step_that_takes_too_long_ends_with_all_its_processes(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    begin = time.monotonic()
    result = run_step(python(code), 3, {})
    assert time.monotonic() - begin < 20
    assert (result["passed"], result["problem"]) == (False, "took longer than 3 s")
    status = Path(f"/proc/{child.read_text()}/status")
    deadline = time.monotonic() + 20
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        os.sched_yield()
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_no_time_left_is_said(tmp_path: Path) -> None:
    report = check([python("raise SystemExit(1)")], GPU, 0, tmp_path / "report.json")
    assert report["steps"][0]["problem"] == "not run: no time left"


def test_without_a_gpu_only_what_needs_none_runs(tmp_path: Path) -> None:
    report = check([python(""), python("", needs_gpu=False)], NO_GPU, 60, tmp_path / "report.json")
    assert [s["problem"] for s in report["steps"]] == ["not run: there is no GPU", ""]
    assert report["passed"] is False


def test_a_program_that_is_not_there_is_a_failed_step(tmp_path: Path) -> None:
    result = run_step(Step("step", [str(tmp_path / "nothing")], 5), 5, {})
    assert result["problem"].startswith("cannot start: ")


@pytest.mark.parametrize("code", [0, 1])
def test_rows_of_a_bench_are_kept_even_where_it_missed_a_floor(code: int, tmp_path: Path) -> None:
    line = json.dumps({"environment": {"cpu": "abacus"}, "rows": [{"case": "4K"}]})
    step = python(f"print('table'); print({line!r}); raise SystemExit({code})", read=gpu_check._bench("p2p"))
    report = check([step], GPU, 60, tmp_path / "report.json")
    assert report["benches"] == {"p2p": {"environment": {"cpu": "abacus"}, "rows": [{"case": "4K"}]}}
    assert report["passed"] is (code == 0)


@pytest.mark.parametrize("output", ["", "no JSON", "[]", '{"rows": []}'])
def test_a_bench_without_rows_failed(output: str, tmp_path: Path) -> None:
    step = python(f"print({output!r})", read=gpu_check._bench("p2p"))
    assert "no JSON" in check([step], GPU, 60, tmp_path / "report.json")["steps"][0]["problem"]


TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip
def test_skipped(): pass
"""


@pytest.mark.parametrize(
    ("keyword", "counts", "problem"),
    [
        ("good or skipped", (2, 1, 0, 1), ""),
        ("test", (3, 1, 1, 1), "exit code 1"),
        ("skipped", (1, 0, 0, 1), "no test ran; 1 were skipped"),
    ],
)
def test_the_summary_of_the_tests(
    keyword: str, counts: tuple[int, ...], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (step,) = (step for step in steps(tmp_path) if step.name == "tests")
    command = ["test_it.py" if part == "tests/gpu" else part for part in step.command]
    step = Step("tests", [*command, "-k", keyword], 60, read=step.read)
    report = check([step], GPU, 60, tmp_path / "report.json")
    tests = report["tests"]
    assert tuple(tests[name] for name in ("tests", "passed", "failed", "skipped")) == counts
    assert report["steps"][0]["problem"] == problem
    assert [("test_bad" in f["test"], "1 == 2" in f["message"]) for f in tests["failures"]] == [(True, True)] * counts[
        2
    ]


def test_tests_that_left_no_results_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pytest left no results"):
        gpu_check._tests(tmp_path / "tests.xml", {})


def test_it_says_that_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "environment", lambda: NO_GPU)
    monkeypatch.setattr(gpu_check, "steps", lambda _: [python("")])
    assert gpu_check.main(["--out", str(tmp_path / "report.json")]) == 1
    output = capsys.readouterr()
    assert "there is no GPU" in output.err
    assert "FAILED" in output.out


def test_the_environment_names_versions_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = gpu_check.environment()
    assert re.match(r"\d+\.\d+", facts["torch"])
    assert facts["gpu"] is None
    assert {"date", "python", "triton", "driver_version", "nvcc"} <= set(facts)


def test_all_steps_together_are_within_the_time() -> None:
    assert gpu_check.SECONDS < 9 * 60


def test_the_make_recipe_starts_it() -> None:
    done = subprocess.run(
        ["make", "-n", "gpu-check", "PYTHON=snake", "REPORT=there.json"], cwd=gpu_check.ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "snake -m pipex.bench.gpu_check --out there.json" in done.stdout.splitlines()  # make inside make says more


def test_the_tests_of_the_gpu_load_without_the_project_s_settings(tmp_path: Path) -> None:
    step = next(step for step in gpu_check.steps(tmp_path) if step.name == "tests")
    done = subprocess.run(
        [*step.command, "--collect-only", "-q"], env=os.environ | step.environment, cwd=gpu_check.ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_exact_pipelines_have_the_bits_of_one_process" in done.stdout
