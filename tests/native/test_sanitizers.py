"""The host ring's C++ under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer.

Both ends run as threads of one process over one piece of memory, since no sanitizer sees across processes; only
csrc/host/segment.cpp, which maps shared memory, is replaced (``sanitized/one_mapping.cpp``).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "tests/native/sanitized"
STRESS, HOSTILE = HARNESS / "ring_stress.cpp", HARNESS / "ring_hostile.cpp"
LAYOUT = ROOT / "csrc/host/ring_layout.cpp"  # compiled alone, since tests replace it
REST = [
    HARNESS / "one_mapping.cpp",
    *(
        ROOT / "csrc/host" / f"{name}.cpp"
        for name in ("ring", "mailbox", "lender", "member", "control", "watch", "futex", "copy", "process")
    ),
]

THREADS = ["-fsanitize=thread"]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Links a program with the ring, or with another ring_layout.cpp. Compiles nothing twice."""
    rest = tmp_path_factory.mktemp("rest") / "rest.cpp"  # one file: most of the time goes into the headers
    rest.write_text("".join(f'#include "{source}"\n' for source in REST))
    objects: dict[tuple[str, Path], Path] = {}

    def compiled(flags: list[str], source: Path) -> Path:
        target = tmp_path_factory.mktemp("object") / f"{source.stem}.o"
        options = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc"), *flags]
        subprocess.run(["g++", *options, "-c", str(source), "-o", str(target)], check=True)
        return objects.setdefault((flags[0], source), target)

    def link(flags: list[str], program: Path, layout: Path = LAYOUT) -> Path:
        linked = tmp_path_factory.mktemp("linked") / program.stem
        probe = linked.with_suffix(".cpp")
        probe.write_text("int main() {}\n")
        made = subprocess.run(["g++", *flags, str(probe), "-o", str(linked)], capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"g++ cannot build with {flags[0]}: {made.stderr.strip().splitlines()[-1]}")
        parts = [objects.get((flags[0], source)) or compiled(flags, source) for source in (rest, layout, program)]
        subprocess.run(["g++", *flags, *map(str, parts), "-o", str(linked)], check=True)
        return linked

    return link


def run(program: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:  # more address randomization than this compiler's runtime can take
        done = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True)
    return done


def broken_layout(folder: Path, right: str, wrong: str) -> Path:
    source = LAYOUT.read_text()
    assert source.count(right) == 1
    broken = folder / LAYOUT.name
    broken.write_text(source.replace(right, wrong))
    return broken


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""


@pytest.mark.parametrize("flags", [THREADS, MEMORY], ids=["threads", "memory"])
def test_messages_of_up_to_4_kib(build: Build, flags: list[str]) -> None:
    done = run(build(flags, STRESS), 20_000, 4 << 10)
    check(done)
    assert int(done.stdout) > 20_000 * (1 << 10)


@pytest.mark.long
@pytest.mark.parametrize(("messages", "most"), [(1_000_000, 4 << 10), (2_000, 16 << 20)], ids=["small", "large"])
@pytest.mark.parametrize("flags", [THREADS, MEMORY], ids=["threads", "memory"])
def test_many_messages(build: Build, flags: list[str], messages: int, most: int) -> None:
    done = run(build(flags, STRESS), messages, most)
    check(done)
    assert int(done.stdout) > messages * most // 4


@pytest.mark.parametrize(
    "access", ["store(std::uint64_t{lap_} << 32 | index", "cells_[next_].load("], ids=["store", "load"]
)
def test_a_slot_announced_without_order_is_reported(build: Build, tmp_path: Path, access: str) -> None:
    comma = ", " if "store" in access else ""
    relaxed = broken_layout(tmp_path, f"{access})", f"{access}{comma}std::memory_order_relaxed)")
    done = run(build(THREADS, STRESS, relaxed), 2_000, 4 << 10)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


def test_hostile_memory_gives_named_errors_only(build: Build) -> None:
    attempts = 100_000
    done = run(build(MEMORY, HOSTILE), attempts)
    check(done)
    outcomes = {name: int(times) for name, times in map(str.split, done.stdout.splitlines())}
    assert set(outcomes) == {"received", "HeaderMismatch", "MessageMismatch", "Aborted"}
    assert sum(outcomes.values()) == attempts
    assert min(outcomes.values()) > attempts // 100


def test_an_index_that_is_not_checked_is_reported(build: Build, tmp_path: Path) -> None:
    trusting = broken_layout(tmp_path, "lap == lap_ && index < count_", "lap == lap_")
    done = run(build(MEMORY, HOSTILE, trusting), 1_000)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
