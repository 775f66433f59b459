"""For which GPUs CUDA kernels are built, and what is said where they are not (cmake/cuda_targets.cmake)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
SCRIPT = f"""\
include({ROOT}/cmake/cuda_targets.cmake)
pipex_cuda_targets(targets why_not)
message("[${{targets}}] ${{why_not}}")
"""
KNOWN = "sm_80\nsm_86\nsm_90\nsm_100\n"
ALL = "[80-real;90a-real;100] \n"


class Machine:
    """What answers for ``nvidia-smi`` and for ``nvcc`` where targets are decided."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "decide.cmake").write_text(SCRIPT)

    def _answer(self, program: str, answer: str | None, code: int = 0) -> Path:
        path = self._folder / program
        path.unlink(missing_ok=True)
        if answer is not None:
            path.write_text(f"#!/bin/sh\nprintf '{answer}'\nexit {code}\n")
            path.chmod(0o755)
        return path

    def decide(
        self, setting: str, gpus: str | None, *, nvcc: str | None = KNOWN, code: int = 0, archs: str = "",
        cmake: str = "",
    ) -> tuple[int, str]:  # fmt: skip
        """Exit code, and what was said: ``[targets] why not``."""
        assert CMAKE is not None, "tests/requirements.txt has cmake"
        self._answer("nvidia-smi", gpus, code)
        compiler = self._answer("nvcc", nvcc)
        command = [CMAKE, f"-DPIPEX_CUDA={setting}", f"-DCMAKE_CUDA_ARCHITECTURES={cmake}",
                   f"-DCMAKE_CUDA_COMPILER={compiler if compiler.exists() else ''}",
                   "-P", str(self._folder / "decide.cmake")]  # fmt: skip
        environment = {"PATH": f"{self._folder}:/usr/bin:/bin", "CUDAARCHS": archs}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_auto_builds_for_the_gpus_that_are_there(machine: Machine) -> None:
    assert machine.decide("AUTO", "9.0\n9.0\n8.6\n") == (0, "[90;86] \n")
    assert machine.decide("AUTO", "10.0\n") == (0, "[100] \n")


@pytest.mark.parametrize(("gpus", "code"), [(None, 0), ("", 0), ("NVIDIA-SMI 535.54 has failed\n", 9), ("[N/A]\n", 0)])
def test_auto_builds_none_where_there_is_no_gpu_and_says_how_to_get_them(
    machine: Machine, gpus: str | None, code: int
) -> None:
    done, said = machine.decide("AUTO", gpus, code=code)
    assert done == 0
    assert said.startswith("[] nvidia-smi found no GPU on the machine that built pipex")
    assert "PIPEX_CUDA=ON" in said
    assert "CUDAARCHS=" in said


def test_on_builds_for_all_wherever_it_is(machine: Machine) -> None:
    assert machine.decide("ON", None) == (0, ALL)
    assert machine.decide("ON", "8.6\n") == (0, ALL)


def test_off_builds_none(machine: Machine) -> None:
    assert machine.decide("OFF", "9.0\n", archs="90") == (0, "[] PIPEX_CUDA=OFF\n")


@pytest.mark.parametrize("setting", ["AUTO", "ON"])
def test_what_the_user_lists_is_built(machine: Machine, setting: str) -> None:
    assert machine.decide(setting, "9.0\n", archs="80;90") == (0, "[80;90] \n")
    assert machine.decide(setting, None, archs="all-major") == (0, "[all-major] \n")
    assert machine.decide(setting, None, cmake="100-virtual", archs="80") == (0, "[100-virtual] \n")


def test_auto_does_without_what_the_compiler_lacks(machine: Machine) -> None:
    done, said = machine.decide("AUTO", "12.0\n")
    assert (done, said[:2]) == (0, "[]")
    assert "does not know sm_120" in said
    done, said = machine.decide("AUTO", "9.0\n", nvcc=None)
    assert (done, said[:2]) == (0, "[]")
    assert "no CUDA compiler was found" in said


@pytest.mark.parametrize(("setting", "archs"), [("ON", ""), ("ON", "90"), ("AUTO", "90")])
def test_what_was_asked_for_is_built_or_the_build_ends(machine: Machine, setting: str, archs: str) -> None:
    for nvcc, why in ((None, "no CUDA compiler was found"), ("sm_80\nsm_900\n", "does not know sm_90")):
        done, said = machine.decide(setting, "9.0\n", archs=archs, nvcc=nvcc)
        assert done != 0
        assert why in " ".join(said.split())


def test_another_setting_is_refused(machine: Machine) -> None:
    done, said = machine.decide("1", None)
    assert done != 0
    assert "needed: AUTO, ON or OFF" in said


def test_reasons_can_be_definitions_for_the_compiler(machine: Machine) -> None:
    """CMake would take a semicolon for the end of one."""
    for gpus, nvcc in ((None, KNOWN), ("9.0\n", None), ("12.0\n", KNOWN)):
        assert ";" not in machine.decide("AUTO", gpus, nvcc=nvcc)[1]
