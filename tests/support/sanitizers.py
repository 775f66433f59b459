"""Programs that are built with a sanitizer when tests run."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "tests/native/sanitized"
SIMULATOR = ROOT / "tests/native/simulated_cuda"
HOST = [
    HARNESS / "one_mapping.cpp",
    *(
        ROOT / "csrc/host" / f"{name}.cpp"
        for name in ("ring", "mailbox", "lender", "member", "control", "watch", "futex", "copy", "process")
    ),
]
LAYOUT = ROOT / "csrc/host/ring_layout.cpp"  # compiled alone, since tests replace it

# To compile takes longer than to run: for the checks of memory twice as long with optimization, for those of threads no
# longer.
THREADS = ("-fsanitize=thread", "-O1")
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0")
BOTH = [pytest.param(THREADS, id="threads"), pytest.param(MEMORY, id="memory")]

Flags = tuple[str, ...]


class Builder:
    """Compiles nothing twice. A list of sources is compiled as one: most of the time goes into the headers."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self._made: dict[tuple[object, ...], Path] = {}

    def program(self, flags: Flags, *parts: Path | Sequence[Path]) -> Path:
        self._skip_without(flags)
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(lambda part: self._object(flags, part), parts))
        key = (flags, *objects)
        if key not in self._made:
            program = self._new(".exe")
            subprocess.run(["g++", *flags, *objects, "-o", program], check=True)
            self._made[key] = program
        return self._made[key]

    def shared_object(self, flags: Flags, sources: Sequence[Path]) -> Path:
        self._skip_without(flags)
        return self._object((*flags, "-fPIC", "-shared", "-Wl,-z,nodelete"), sources)

    def _object(self, flags: Flags, part: Path | Sequence[Path]) -> Path:
        key = (flags, part if isinstance(part, Path) else tuple(part))
        if key not in self._made:
            source, target = part, self._new(".so" if "-shared" in flags else ".o")
            if not isinstance(source, Path):
                source = self._new(".cpp")
                source.write_text("".join(f'#include "{each}"\n' for each in part))
            options = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc", "-I", SIMULATOR]
            as_object = [] if "-shared" in flags else ["-c"]
            subprocess.run(["g++", *options, *flags, *as_object, source, "-o", target], check=True)
            self._made[key] = target
        return self._made[key]

    def _skip_without(self, flags: Flags) -> None:
        if (flags, "works") in self._made:
            return
        probe, program = self._new(".cpp"), self._new(".exe")
        probe.write_text("int main() {}\n")
        made = subprocess.run(["g++", *flags, probe, "-o", program], capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"g++ cannot build with {flags[0]}: {made.stderr.strip().splitlines()[-1]}")
        self._made[flags, "works"] = program

    def _new(self, suffix: str) -> Path:
        return self._folder / f"{next(self._numbers)}{suffix}"


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
