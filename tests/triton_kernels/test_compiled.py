"""Arguments of a launch as the launcher of pipex._cuda takes them, for kernels that Triton compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
_cuda = pytest.importorskip("pipex._cuda", reason="built without CUDA kernels")

from pipex.errors import InputError  # noqa: E402
from pipex.triton_kernels import compiled  # noqa: E402
from pipex.triton_kernels.input_gradient import plan_input_gradient  # noqa: E402
from pipex.triton_kernels.resources import compile_launch  # noqa: E402
from pipex.triton_kernels.weight_gradient import plan_slabs, plan_table  # noqa: E402

HOPPER, AMPERE = (9, 0), (8, 0)


def test_a_tuple_of_descriptors() -> None:
    slabs = [(torch.ones(2, 32, 64).bfloat16(), torch.ones(2, 32, 128).bfloat16()) for _ in range(2)]
    weight_grad, bias_grad = torch.ones(64, 128), torch.ones(64)
    launch = plan_slabs(slabs, weight_grad, bias_grad, False, HOPPER)
    code = compile_launch(launch, 90)
    values = compiled.values(code.src.signature, launch.arguments)
    operands = []
    for dy, x in slabs:
        operands += [dy.data_ptr(), 2, 32, 64, 2048, 64, 1, x.data_ptr(), 2, 32, 128, 4096, 128, 1]
        operands += [32, 2048, 64, 4096, 128]
    gradient = [weight_grad.data_ptr(), 64, 128, 128, 1]
    assert values == (*operands, *gradient, bias_grad.data_ptr(), 2, 128, 64, 128)
    parts = compiled.parameters(code.src.signature, code.metadata.tensordesc_meta)
    assert sum(isinstance(part, _cuda.Tile) for part in parts) == 5


def test_pointers_and_sizes_of_one_that_the_compiler_has_as_constants() -> None:
    dy, weight, out = torch.ones(1, 33).half(), torch.ones(33, 1).half(), torch.ones(1, 1).half()
    launch = plan_input_gradient(dy, weight, None, (), (out,), AMPERE)
    code = compile_launch(launch, 80)
    values = compiled.values(code.src.signature, launch.arguments)
    assert values == (dy.data_ptr(), weight.data_ptr(), out.data_ptr(), 33, 33)
    assert len(compiled.parameters(code.src.signature, code.metadata.tensordesc_meta)) == len(values)


def test_descriptors_that_are_made_on_the_device_are_refused() -> None:
    dy, weight_grad, table = torch.ones(32, 64).bfloat16(), torch.ones(64, 64), torch.ones(2, 14, dtype=torch.int64)
    code = compile_launch(plan_table(table, dy, dy, weight_grad, True, HOPPER), 90)
    with pytest.raises(InputError, match="cannot be launched without Triton: global_scratch_size"):
        compiled.check(code.metadata)
