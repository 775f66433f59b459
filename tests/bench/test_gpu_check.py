"""The logic of ``make gpu-check``, with small commands in the place of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipex import cli
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
        ("bad", False, "exit code 3: because"),
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
import pytest, sys, time
pytestmark = pytest.mark.gpu
def test_good(record_property): record_property("found", 7)
def test_bad():
    print("what a rank said", file=sys.stderr)
    assert 1 == 2
@pytest.mark.skip
def test_skipped(): pass
"""
HANGS = """
def test_hanging():
    print("before", flush=True)
    time.sleep(600)
"""


def kernels(scratch: Path, *arguments: str, seconds: float = 60) -> Step:
    """The step of that name, with the test in ``scratch`` in the place of its own."""
    (step,) = (step for step in steps(scratch) if step.name == "kernels")
    command = ["test_it.py" if part == "tests/gpu" else part for part in step.command]
    return Step("kernels", [*command, *arguments], seconds, read=step.read, environment=step.environment)


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
    report = check([kernels(tmp_path, "-k", keyword)], GPU, 60, tmp_path / "report.json")
    tests = report["tests"]["kernels"]
    assert tuple(tests[name] for name in ("tests", "passed", "failed", "skipped")) == counts
    assert report["steps"][0]["problem"] == problem
    for failure in tests["failures"]:
        assert "test_bad" in failure["test"]
        assert "1 == 2" in failure["message"]
        assert "what a rank said" in failure["detail"]
    noted = {name.rpartition(".")[2]: found for name, found in tests["noted"].items()}
    assert noted == ({"test_good": {"found": "7"}} if counts[1] else {})


def test_of_tests_that_are_killed_the_ended_ones_count_and_the_one_that_hung_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS + HANGS)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    report = check([kernels(tmp_path, seconds=8)], GPU, 60, tmp_path / "report.json")
    assert report["steps"][0]["problem"].startswith("took longer than 8 s: pytest left no results")
    tests = report["tests"]["kernels"]
    assert [tests[name] for name in ("tests", "passed", "failed", "skipped")] == [4, 1, 2, 1]
    assert [(f["test"], f["message"]) for f in tests["failures"]] == [
        ("test_it.py::test_bad", ""),
        ("test_it.py::test_hanging", "it had not ended"),
    ]


def test_tests_that_left_no_results_failed(tmp_path: Path) -> None:
    report: dict[str, Any] = {"tests": {}}
    with pytest.raises(ValueError, match="pytest left no results"):
        gpu_check._tests("kernels", tmp_path / "kernels.xml")("", report)
    assert report == {"tests": {}}


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


@pytest.mark.parametrize(("more", "said"), [([], ""), (["STEPS=build,p2p"], " --steps build,p2p")], ids=["all", "some"])
def test_the_make_recipe_starts_it(more: list[str], said: str) -> None:
    done = subprocess.run(
        ["make", "-n", "gpu-check", "PYTHON=snake", "REPORT=there.json", *more], cwd=gpu_check.ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (
        f"snake -m pipex.bench.gpu_check --out there.json{said}" in done.stdout.splitlines()
    )  # make inside make says more


@pytest.mark.long
def test_each_test_of_the_gpu_is_in_one_step_and_loads_without_the_project_s_settings(tmp_path: Path) -> None:
    collected: dict[str, set[str]] = {}
    for step in steps(tmp_path):
        if step.name in ("kernels", "transport"):
            done = subprocess.run(
                [*step.command, "--collect-only", "-q"], env=os.environ | step.environment, cwd=gpu_check.ROOT,
                capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            collected[step.name] = set(re.findall(r"(?:::|<Function )(test_\w+)", done.stdout))
    assert "test_a_killed_rank_is_named_on_all_others_and_their_gpu_still_works" in collected["transport"]
    assert "test_two_ranks" in collected["transport"]
    assert "test_the_train_command_finds_the_bits_of_one_process" in collected["transport"]
    assert collected["kernels"]
    assert not collected["kernels"] & collected["transport"]


def test_what_is_right_is_asked_before_what_is_fast(tmp_path: Path) -> None:
    names = [step.name for step in steps(tmp_path)]
    assert names[:3] == ["build", "kernels", "transport"]
    assert sum(step.seconds for step in steps(tmp_path)[1:3]) < gpu_check.SECONDS - 150  # a build takes up to 100


def test_benches_are_asked_for_floors_that_they_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that may stop them here is that there is no GPU."""
    if shutil.which("nvidia-smi"):
        pytest.skip("here they would measure")
    benches = [step.command[step.command.index("bench") :] for step in steps(tmp_path) if "bench" in step.command]
    assert len(benches) == 6
    for command in benches:
        assert cli.main(command) == 1
        said = capsys.readouterr().err
        assert "NativeUnavailable" in said, (command, said)


def test_some_steps_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(gpu_check, "environment", lambda: GPU)

    def check(chosen: list[gpu_check.Step], *_: object) -> dict[str, bool]:
        ran.extend(step.name for step in chosen)
        return {"passed": True}

    monkeypatch.setattr(gpu_check, "check", check)
    assert gpu_check.main(["--steps", "p2p,build"]) == 0
    assert ran == ["build", "p2p"]


def test_a_step_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--steps", "p2p,snake"])
    assert "no step snake; needed some of build, kernels" in capsys.readouterr().err
