"""C++ that only tests need: compiled once for all processes and runs, again when a source, flag or compiler changes."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "tests"
KEPT_SECONDS = 7 * 24 * 3600.0  # since it was last used


def compiled(command: Sequence[str | Path], sources: Sequence[Path], suffix: str) -> Path:
    """What ``command``, a compiler and all its flags, makes of these sources.

    Raises:
        subprocess.CalledProcessError: it fails; ``stderr`` says why.
    """
    key = _key([*map(str, command), suffix], sources)
    return _made(key, suffix, lambda to: [*command, *sources, "-o", to])


def together(command: Sequence[str | Path], sources: Sequence[Path], suffix: str) -> Path:
    """As ``compiled``, of the sources as one: most of the time goes into the headers that they share."""
    key = _key([*map(str, command), suffix, "together"], sources)
    one = CACHE / f"{key}.cpp"

    def with_all(to: Path) -> list[str | Path]:
        one.write_text("".join(f'#include "{source}"\n' for source in sources))
        return [*command, one, "-o", to]

    return _made(key, suffix, with_all)


def shared_library(*sources: str) -> Path:
    """A library of sources, by path from the root, with the CUDA headers that the module was built with."""
    nvcc = os.environ.get("CUDACXX", "nvcc")  # for its include path only: these sources are plain C++
    flags = ["-x", "c++", "-std=c++20", "-O1", "--cudart", "none", "-shared", "-Xcompiler", "-fPIC,-Wall,-Werror"]
    return compiled([nvcc, *flags, "-I", ROOT / "csrc"], [ROOT / source for source in sources], ".so")


def _made(key: str, suffix: str, command: Callable[[Path], Sequence[str | Path]]) -> Path:
    made = CACHE / f"{key}{suffix}"
    with _locked(CACHE / f"{key}.lock"):
        if not made.exists():
            _forget_old()
            part = CACHE / f"{key}.part{suffix}"
            subprocess.run(command(part), check=True, capture_output=True, text=True)
            part.rename(made)
        os.utime(made)
    return made


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    """Other processes wait: they need the same."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield


def _forget_old() -> None:
    """What another process is about to use, or has forgotten meanwhile, is left to it."""
    for path in CACHE.iterdir():
        if path.suffix != ".lock":
            lock = CACHE / f"{path.name.partition('.')[0]}.lock"
            with suppress(BlockingIOError, FileNotFoundError), _locked(lock, fcntl.LOCK_NB):
                if path.stat().st_mtime < time.time() - KEPT_SECONDS:
                    path.unlink()


def _key(words: Sequence[str], sources: Iterable[Path]) -> str:
    """Of all that a result depends on. A source may lie in any folder: its name and what it says count."""
    seen = hashlib.sha256(f"{_surroundings()} {_version(words[0])}".encode())
    for word in [*words, *(source.name for source in sources)]:
        seen.update(word.encode() + b"\0")
    for source in sources:
        seen.update(source.read_bytes())
    return seen.hexdigest()[:32]


@functools.cache
def _surroundings() -> str:
    """Everything that sources may include, and the compiler that nvcc calls for C++."""
    seen = hashlib.sha256()
    for folder in ("csrc", "tests/native"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".cpp", ".hpp", ".cu", ".cuh", ".h"):
                seen.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return f"{seen.hexdigest()} {_version(os.environ.get('NVCC_CCBIN', 'g++'))} {ROOT}"


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
