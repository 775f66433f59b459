"""Programs that are built with a sanitizer when tests run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from built import ROOT, compiled, together

HARNESS = ROOT / "tests/native/sanitized"
SIMULATOR = ROOT / "tests/native/simulated_cuda"
HOST = [
    HARNESS / "one_mapping.cpp",
    *(
        ROOT / "csrc/host" / f"{name}.cpp"
        for name in ("ring", "mailbox", "message", "lender", "member", "control", "watch", "futex", "copy", "process")
    ),
]
LAYOUT = ROOT / "csrc/host/ring_layout.cpp"  # compiled alone, since tests replace it

# To compile takes longer than to run: for the checks of memory twice as long with optimization, for those of threads no
# longer.
THREADS = ("-fsanitize=thread", "-O1")
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0")
BOTH = [pytest.param(THREADS, id="threads"), pytest.param(MEMORY, id="memory")]

Flags = tuple[str, ...]


OPTIONS = ["g++", "-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc", "-I", SIMULATOR]


def program(flags: Flags, *parts: Path | Sequence[Path]) -> Path:
    """A list of sources is compiled as one."""
    skip_without(flags)
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(lambda part: _compiled([*flags, "-c"], part, ".o"), parts))
    return compiled(["g++", *flags], objects, ".exe")


def shared_object(flags: Flags, sources: Sequence[Path]) -> Path:
    skip_without(flags)
    return _compiled([*flags, "-fPIC", "-shared", "-Wl,-z,nodelete"], sources, ".so")


def _compiled(flags: Sequence[str], part: Path | Sequence[Path], suffix: str) -> Path:
    command = [*OPTIONS, *flags]
    return compiled(command, [part], suffix) if isinstance(part, Path) else together(command, part, suffix)


def skip_without(flags: Flags) -> None:
    try:
        compiled(["g++", *flags], [HARNESS / "nothing.cpp"], ".exe")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"g++ cannot build with {flags[0]}: {error.stderr.strip().splitlines()[-1]}")


def run(program: Path, *arguments: object, environment: Mapping[str, str] | None = None) -> (
    subprocess.CompletedProcess[str]
):  # fmt: skip
    command = [str(program), *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if "unexpected memory mapping" in done.stderr:  # more address randomization than this compiler's runtime can take
        done = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, env=variables)
    return done


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""


def broken(folder: Path, source: Path, right: str, wrong: str, *, times: int = 1) -> Path:
    """A source with a mistake in so many places."""
    text = source.read_text()
    assert text.count(right) == times
    path = folder / source.name
    path.write_text(text.replace(right, wrong))
    return path
