"""``make gpu-check``: all that needs a GPU, on a machine that has little else, with one JSON file as the result.

It builds the native modules in place, without network or environment, runs tests/gpu and measures:

    {"environment": {...}, "passed": bool, "steps": [{"step", "passed", "seconds", "problem", "tail"}, ...],
     "tests": {step: {"tests", "passed", "failed", "skipped", "failures", "noted"}},
     "benches": {bench: {"environment", "rows"}}}

What says whether numbers are right comes first. A step that fails or takes too long is recorded, with what it had found
until then, and the rest still runs. The file is rewritten after each step, so that an interrupted check leaves what it
has found. Imports the standard library only: torch may be what is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 520  # for everything
TAIL = 4000  # characters of a step's output that are kept
FAILURES = 50  # failed tests whose messages are kept
SIZES = ("4K", "16K", "64K", "256K", "1M", "4M", "16M", "64M")
MESSAGE, DETAIL = 500, 2500  # characters of each: of what was raised, and of where and what the ranks said

VERSIONS = """
import json, platform
facts = {"python": platform.python_version()}
for name in ("torch", "triton"):
    try:
        facts[name] = __import__(name).__version__
    except Exception as error:
        facts[name] = f"{type(error).__name__}: {error}"
facts["gpu"] = None
try:
    import torch
    facts["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        facts["gpu"] = device.name
        facts["gpu_memory_gib"] = round(device.total_memory / 2**30, 1)
        facts["multiprocessors"] = device.multi_processor_count
except Exception as error:
    facts["gpu_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(facts))
"""
QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


@dataclass(frozen=True)
class Step:
    """A command, the most seconds that it may take, and what becomes of its output.

    Attributes:
        read: gets the standard output and the report, also of a command that was killed; raises ValueError where what
            it needs is not there.
    """

    name: str
    command: list[str]
    seconds: float
    needs_gpu: bool = True
    read: Callable[[str, dict[str, Any]], None] | None = None
    environment: dict[str, str] = field(default_factory=dict)


def steps(scratch: Path) -> list[Step]:
    """All steps; ``scratch`` is a folder for their files."""
    python = sys.executable
    # The project's own pytest settings ask for plug-ins that a bare machine lacks. A test that hangs shows where.
    pytest = [python, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib",
              "-p", "no:cacheprovider", "-v", "--tb=short", "-o", "junit_logging=system-err",
              "-o", "faulthandler_timeout=60"]  # fmt: skip
    for_tests = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
        "PYTHONUNBUFFERED": "1",  # what a killed run has said must be there
    }
    transport = [f"tests/gpu/test_{what}.py" for what in ("transport", "pipeline")]

    def tests(name: str, seconds: float, *arguments: str) -> Step:
        results = scratch / f"{name}.xml"
        command = [*pytest, "-m", "gpu", *arguments, f"--junitxml={results}"]
        return Step(name, command, seconds, read=_tests(name, results), environment=for_tests)

    def bench(name: str, seconds: float, *arguments: str) -> Step:
        command = [python, "-m", "pipex", "bench", *arguments, "--json"]
        return Step(name, command, seconds, read=_bench(name))

    p2p = ["p2p", "--transport", "device", "-n", "20", "--max-send-us", _every(5, SIZES),
           "--min-copy-share", "64M=0.9"]  # fmt: skip
    shared = ["--device", "cuda", "--virtual-devices", "--ranks", "4", "-n", "10", "--schedules"]
    found = [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 150, needs_gpu=False,
             environment={"PIPEX_CUDA": "ON" if shutil.which("nvcc") else "AUTO"}),
        tests("kernels", 110, "tests/gpu", *(f"--ignore={path}" for path in transport)),
        tests("transport", 170, *transport),
        bench("p2p", 50, *p2p, "--max-sms", _every(0, SIZES)),
        # Ranks that take turns on a GPU wait for their turn, too; with a share of it each they wait for messages alone.
        bench("p2p-shared", 50, *p2p, "--virtual-devices", "--max-us", _every(10, SIZES[:3]),
              "--max-gemm-slowdown", _every(0.03, SIZES)),
        bench("pipeline", 120, "pipeline", *shared, "gpipe,1f1b,zb-h1,zbv",
              "--max-misprediction", "zb-h1/2048x2048=0.1", "--min-speedup", "zb-h1/2048x2048=1"),
        bench("overlap", 120, "overlap", *shared, "1f1b,zb-h1",
              "--max-exposed-share", _every(0.02, ["1f1b/2048x2048", "zb-h1/2048x2048"])),
        bench("backward", 60, "backward", "--device", "cuda"),
        bench("gemm", 150, "gemm"),
    ]  # fmt: skip
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99", *pytest, "tests/gpu/test_kernels.py"]
        # Or a buffer's neighbour looks like its own memory.
        caching = for_tests | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Step("memcheck", [*command, "-k", "small"], 90, environment=caching))
    return found


def _every(limit: float, cases: Sequence[str]) -> str:
    """A floor or ceiling for each case."""
    return ",".join(f"{case}={limit:g}" for case in cases)


def _tests(step: str, results: Path) -> Callable[[str, dict[str, Any]], None]:
    def read(output: str, report: dict[str, Any]) -> None:
        try:
            report["tests"][step] = found = _of_results(results)
        except (OSError, ElementTree.ParseError) as error:
            if counts := _of_output(output):
                report["tests"][step] = counts
            raise ValueError(f"pytest left no results: {error}") from None
        if found["skipped"] == found["tests"]:
            raise ValueError(f"no test ran; {found['skipped']} were skipped")

    return read


def _of_results(path: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(path).iter("testcase"))
    failures, noted = [], {}
    for case in cases:
        name = f"{case.get('classname')}.{case.get('name')}"
        if properties := {each.get("name"): each.get("value") for each in case.iter("property")}:
            noted[name] = properties
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                detail = (found.text or "")[-DETAIL:] + case.findtext("system-err", "")[-DETAIL:]
                message = (found.get("message") or "")[:MESSAGE]
                failures.append({"test": name, "message": message, "detail": detail})
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "tests": len(cases), "passed": len(cases) - skipped - len(failures), "failed": len(failures),
        "skipped": skipped, "failures": failures[:FAILURES], "noted": noted,
    }  # fmt: skip


def _of_output(output: str) -> dict[str, Any]:
    """The same of a run that was killed, from what ``pytest -v`` had printed; and in which test it was."""
    ended = dict(re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", output, re.MULTILINE))
    hung = re.findall(r"^(\S+::\S.*?) *\Z", output, re.MULTILINE)
    if not ended and not hung:
        return {}
    count = list(ended.values()).count
    failures = [
        {"test": test, "message": "", "detail": ""} for test, how in ended.items() if how in ("FAILED", "ERROR")
    ]
    failures += [{"test": test, "message": "it had not ended", "detail": ""} for test in hung]
    return {
        "tests": len(ended) + len(hung), "passed": count("PASSED"), "failed": len(failures),
        "skipped": count("SKIPPED"), "failures": failures[:FAILURES], "noted": {},
    }  # fmt: skip


def _bench(name: str) -> Callable[[str, dict[str, Any]], None]:
    def read(output: str, report: dict[str, Any]) -> None:
        lines = output.splitlines()
        try:
            result = json.loads(lines[-1])
            report["benches"][name] = {"environment": result["environment"], "rows": result["rows"]}
        except (IndexError, KeyError, TypeError, ValueError):
            raise ValueError("it printed no JSON as its last line") from None

    return read


def environment() -> dict[str, Any]:
    """This machine and these versions; where something is missing, the value says so. ``gpu`` is None without one."""
    facts: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    found = _said([sys.executable, "-c", VERSIONS]).splitlines()
    try:
        facts |= json.loads(found[-1])
    except (IndexError, ValueError):
        facts |= {"gpu": None, "versions": "\n".join(found)[-TAIL:]}
    smi = _said(["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]).splitlines()
    values = [value.strip() for value in smi[0].split(",")] if smi else []
    facts |= dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else {"driver_version": "unknown"}
    facts["nvcc"] = (_said(["nvcc", "--version"]).splitlines() or ["not found"])[-1]
    return facts


def _said(command: list[str]) -> str:
    """Standard output of a short command, empty where it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def run_step(step: Step, seconds: float, report: dict[str, Any]) -> dict[str, Any]:
    """Runs one step for at most ``seconds``; its own processes end with it."""
    begin, problem = time.monotonic(), ""
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        code: int | None = None
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                env=os.environ | step.environment,
            )  # fmt: skip
        except OSError as error:
            problem = f"cannot start: {error}"
        else:
            try:
                code = process.wait(max(0.0, seconds))
                problem = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                problem = f"took longer than {seconds:.0f} s"
            finally:
                if code is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        output, errors = (_text(file) for file in (out, err))
    if step.read is not None:
        try:
            step.read(output, report)
        except ValueError as error:
            problem = f"{problem}: {error}" if problem else str(error)
    elif code and (lines := (output + errors).split("\n")[-2:-1]):
        problem += f": {lines[0]}"
    tail = (output + errors)[-TAIL:] if problem else ""
    return {"step": step.name, "passed": not problem, "seconds": round(time.monotonic() - begin, 1),
            "problem": problem, "tail": tail}  # fmt: skip


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read())


def check(chosen: list[Step], facts: dict[str, Any], seconds: float, path: Path) -> dict[str, Any]:
    """Runs the steps in order, all within ``seconds``, and writes the report to ``path`` after each."""
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"environment": facts, "passed": False, "steps": [], "tests": {}, "benches": {}}
    for step in chosen:
        left = end - time.monotonic()
        if step.needs_gpu and facts["gpu"] is None:
            result = _not_run(step, "not run: there is no GPU")
        elif left <= 0:
            result = _not_run(step, "not run: no time left")
        else:
            result = run_step(step, min(step.seconds, left), report)
        report["steps"].append(result)
        print(f"{step.name:10} {result['seconds']:6.1f} s  {result['problem'] or 'passed'}", flush=True)
        report["passed"] = len(report["steps"]) == len(chosen) and all(s["passed"] for s in report["steps"])
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(path)
    return report


def _not_run(step: Step, problem: str) -> dict[str, Any]:
    return {"step": step.name, "passed": False, "seconds": 0.0, "problem": problem, "tail": ""}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Build, test and measure on a machine with a GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="the report (default: gpu-check.json)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all steps (default: {SECONDS})")
    parser.add_argument("--steps", metavar="STEP,...", help="only these, where the time is not enough for all")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = steps(Path(scratch))
        if options.steps is not None:
            wanted, known = options.steps.split(","), [step.name for step in chosen]
            if unknown := set(wanted) - set(known):
                parser.error(f"no step {', '.join(sorted(unknown))}; needed some of {', '.join(known)}")
            chosen = [step for step in chosen if step.name in wanted]
        facts = environment()
        if facts["gpu"] is None:
            print(
                "gpu-check: there is no GPU that torch can use; what needs one is recorded as failed", file=sys.stderr
            )
        report = check(chosen, facts, options.seconds, options.out)
    print(f"{'passed' if report['passed'] else 'FAILED'}; the report is {options.out}")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
