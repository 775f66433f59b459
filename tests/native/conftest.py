"""C++ that only tests need, compiled when they run, with the CUDA headers that the module was built with."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sanitizers import Builder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def shared_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles sources, by path from the root, into one library; once per session."""
    made: dict[tuple[str, ...], Path] = {}

    def build(*sources: str) -> Path:
        if sources not in made:
            library = tmp_path_factory.mktemp("native") / "library.so"
            nvcc = os.environ.get("CUDACXX", "nvcc")  # for its include path only: these sources are plain C++
            flags = [
                "-x",
                "c++",
                "-std=c++20",
                "-O1",
                "--cudart",
                "none",
                "-shared",
                "-Xcompiler",
                "-fPIC,-Wall,-Werror",
            ]
            subprocess.run(
                [
                    nvcc,
                    *flags,
                    "-I",
                    str(ROOT / "csrc"),
                    "-o",
                    str(library),
                    *(str(ROOT / source) for source in sources),
                ],
                check=True,
            )
            made[sources] = library
        return made[sources]

    return build


@pytest.fixture
def private_copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a library that the loader takes for another one, so that its globals start afresh."""
    return lambda library: Path(shutil.copy(library, tmp_path / "private.so"))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("sanitized"))
