"""Builds the native modules by driving CMakeLists.txt; everything else is in pyproject.toml.

Needs a C++20 compiler only. PIPEX_CUDA=AUTO|ON|OFF and CUDAARCHS decide about the CUDA kernels (see
cmake/cuda_targets.cmake), PIPEX_STRICT=ON makes compiler warnings errors; CMAKE_ARGS go to CMake as they are.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One CMake run builds all native modules, straight into the package's folder."""

    def run(self) -> None:
        import pybind11

        target = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "pipex"
        build = Path(self.build_temp).resolve()
        # One of an earlier build is not of these sources, and this build may make none.
        (target / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        subprocess.run(
            [
                "cmake", "--fresh",  # the last build's tools may be gone: pip deletes its build environments
                "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPIPEX_OUTPUT={target}",
                f"-DPIPEX_CUDA={os.environ.get('PIPEX_CUDA', 'AUTO')}",
                f"-DPIPEX_STRICT={os.environ.get('PIPEX_STRICT', 'OFF')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            check=True,
        )  # fmt: skip
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return []


# The extension's name tells setuptools that wheels are platform-specific; CMake knows the sources.
setup(ext_modules=[Extension("pipex._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
