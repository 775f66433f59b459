"""``pipex info`` says what was built, for which GPUs, and why not."""

from __future__ import annotations

import json
import sys
import types

import pytest

import pipex
from pipex import _native
from pipex.cli import main


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    def said(module: types.ModuleType | None, why_not: str) -> str:
        monkeypatch.delattr(pipex, "_cuda", raising=False)
        monkeypatch.setitem(sys.modules, "pipex._cuda", module)
        monkeypatch.setattr(_native, "without_cuda", why_not)
        assert main(["info", "--json"]) == 0
        return str(json.loads(capsys.readouterr().out)["cuda_kernels"])

    return said


def test_targets_or_the_reason(kernels) -> None:  # type: ignore[no-untyped-def]
    built = types.ModuleType("pipex._cuda")
    built.toolkit, built.architectures, built.device_count = "13.0", "80-real,100", lambda: 1  # type: ignore[attr-defined]
    assert kernels(built, "") == "built with CUDA 13.0 for 80-real,100"
    assert kernels(None, "PIPEX_CUDA=OFF") == "not built: PIPEX_CUDA=OFF"
    assert kernels(None, "").startswith("built, but not available: ")


def test_the_two_modules_of_one_build_agree() -> None:
    try:
        from pipex import _cuda
    except ImportError:
        assert _native.without_cuda
    else:
        assert not _native.without_cuda
        assert _cuda.architectures
