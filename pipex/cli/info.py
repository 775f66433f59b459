"""``pipex info``: what was built, and what this machine can do."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
from typing import Any

from pipex import __version__
from pipex.errors import NativeUnavailable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Prints the facts."""
    found = facts()
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:20} {value}")
    return 0


def facts() -> dict[str, Any]:
    """What a bug report needs. Where something is missing, the value says why."""
    return {
        "pipex": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "shared_memory": _host_transport(),
        "cuda_kernels": _cuda_kernels(),
        "gpus": _gpus(),
        "gemms": _gemms(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _host_transport() -> str:
    try:
        importlib.import_module("pipex._native")
    except ImportError as error:
        return f"not available: {error}"
    return "built"


def _cuda_kernels() -> str:
    try:
        from pipex import _cuda
    except ImportError as error:
        return _without_cuda_kernels(error)
    return f"built with CUDA {_cuda.toolkit} for {_cuda.architectures}"


def _without_cuda_kernels(error: ImportError) -> str:
    try:
        from pipex import _native
    except ImportError:
        return "not available: nothing was built"
    return f"not built: {_native.without_cuda}" if _native.without_cuda else f"built, but not available: {error}"


def _gpus() -> int | str:
    try:
        from pipex import _cuda

        return _cuda.device_count()
    except ImportError:
        return "unknown without the CUDA kernels"
    except NativeUnavailable as error:
        return f"none: {error}"


def _gemms() -> str:
    try:
        from pipex.backward.choice import explain
    except ImportError as error:
        return f"not available: {error}"
    return explain()
