"""Gates on what the compiler makes of each shipped kernel, for Hopper and Ampere; no GPU is needed.

They exist because the compiler says nothing when a kernel spills, takes more shared memory than a launch may have,
feeds a matrix instruction in a way that its assembler gets wrong, or overwrites a tile that is still being read.
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import sampled

pytest.importorskip("triton")

from pipex.triton_kernels.resources import measure
from pipex.triton_kernels.variants import Variant, variants

CASES = [
    pytest.param(variant, capability, id=f"{variant.name}, sm_{capability}")
    for capability in (90, 80)
    for variant in variants()
    if capability in variant.capabilities
]


def operation(case: Any) -> str:
    variant, _ = case.values
    return variant.name.partition(",")[0]


@pytest.mark.parametrize(
    ("variant", "capability"), sampled(CASES, 1, name="gates", stratum=operation, others=pytest.mark.long)
)
def test_gates(variant: Variant, capability: int) -> None:
    row = measure(variant, capability)
    assert row.spills == row.stack == 0, row
    assert row.shared <= row.shared_limit, row
    assert row.registers <= 255, row
    if variant.matrix and capability == 90:
        assert row.wgmma > 0, row
        assert row.mma == 0, row
        assert row.wgmma_from_registers == 0, row
        assert row.shallow_buffers == 0, row
    if variant.matrix and capability == 80:
        assert row.mma > 0, row
    if variant.matrix and variant.aligned and capability == 90:
        assert row.tma_loads > 0, row
        assert row.async_copies == 0, row
        assert row.tma_stores > 0 or "exact" in variant.name, row
    if variant.matrix and variant.aligned and capability == 80:
        assert row.async_copies == row.async_copies_wide > 0, row
