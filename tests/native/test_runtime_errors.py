"""What CUDA's own errors become (csrc/cuda/runtime.cpp)."""

from __future__ import annotations

import ctypes

import pytest
from built import shared_library

pytest.importorskip("pipex._cuda", reason="built without CUDA kernels")

NO_DEVICE, INVALID_VALUE, NO_KERNEL_IMAGE = 100, 1, 209  # cudaError_t


def test_kernels_for_other_gpus_are_named_as_such() -> None:
    library = ctypes.CDLL(str(shared_library("tests/native/no_kernel_image.cpp", "csrc/cuda/runtime.cpp")))

    def thrown_for(error: int) -> str:
        text = ctypes.create_string_buffer(500)
        library.thrown_for(error, text, ctypes.c_ulong(500))
        return text.value.decode()

    assert thrown_for(NO_KERNEL_IMAGE).startswith("NativeUnavailable: pipex was built for other GPUs")
    assert thrown_for(NO_DEVICE).startswith("NativeUnavailable: this needs an NVIDIA GPU")
    assert thrown_for(INVALID_VALUE) == "CudaError: "
