"""A launch that was decided but not made: it can run on a device, or be compiled for one that is not there."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pipex.errors import InputError

HOPPER = (9, 0)


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: a ``@triton.jit`` function.
        grid: its programs, up to three numbers.
        arguments: by parameter name: tensors, descriptors, integers, floats, None, or tuples of these.
        constants: by parameter name: the ``tl.constexpr`` parameters.
        warps, stages: Triton's num_warps and num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's; multiplications and additions are fused, which Triton 3.9 wants to hear."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self, device: torch.device) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; under the interpreter Hopper's, whose way through a kernel is the longer one."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else HOPPER


def describable(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can address these: 16-byte aligned start and rows."""
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def describe(tensor: Tensor, *block: int) -> TensorDescriptor:
    """A descriptor by which a kernel copies blocks of this shape; what lies outside of the tensor reads as zero."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def upcast(dtype: torch.dtype) -> bool:
    """Whether tiles must be widened before arithmetic: the interpreter multiplies the bit patterns of bfloat16."""
    return bool(triton.knobs.runtime.interpret) and dtype is torch.bfloat16


def check_device(device: torch.device) -> None:
    """
    Raises:
        InputError: no kernel runs there.
    """
    # Under Triton's interpreter the kernels run on the CPU, which is how they are tested without a GPU. Tensors on
    # "meta" have no memory: they are compiled for, never run on.
    allowed = ("cuda", "meta", "cpu") if triton.knobs.runtime.interpret else ("cuda", "meta")
    if device.type not in allowed:
        raise InputError("a Triton kernel runs on a GPU", got=device, needed="tensors on cuda", fix="use torch")
