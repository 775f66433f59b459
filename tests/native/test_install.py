"""What setup.py asks CMake for, and what it leaves in the package."""

from __future__ import annotations

import runpy
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import pytest

setuptools = pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Builds for a plain install below ``tmp_path``; returns the commands that would have run."""
    commands: list[list[str]] = []
    pybind11 = types.ModuleType("pybind11")
    pybind11.get_cmake_dir = lambda: "pybind11's"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pybind11", pybind11)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    module = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    command = module["CMakeBuild"](setuptools.Distribution())
    command.inplace, command.build_lib, command.build_temp = False, str(tmp_path / "lib"), str(tmp_path / "temp")
    command.editable_mode = False

    def run() -> list[list[str]]:
        commands.clear()
        command.run()
        return commands

    return run


def test_an_install_without_cuda_kernels_leaves_none_of_an_earlier_one(build: Any, tmp_path: Path) -> None:
    package = tmp_path / "lib" / "pipex"
    package.mkdir(parents=True)
    this, another = package / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", package / "_cuda.cpython-30-other.so"
    for module in (this, another):
        module.touch()
    configure, _ = build()
    assert f"-DPIPEX_OUTPUT={package}" in configure
    assert not this.exists()
    assert another.exists(), "of another interpreter"


def test_settings_reach_cmake_as_its_users_give_them(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-DPIPEX_CUDA=AUTO" in build()[0]
    monkeypatch.setenv("PIPEX_CUDA", "ON")
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_CUDA_ARCHITECTURES='80;90' -DCMAKE_UNITY_BUILD=OFF")
    configure = build()[0]
    assert "-DPIPEX_CUDA=ON" in configure
    assert configure[-2:] == ["-DCMAKE_CUDA_ARCHITECTURES=80;90", "-DCMAKE_UNITY_BUILD=OFF"]
