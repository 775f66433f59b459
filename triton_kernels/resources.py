"""What each shipped kernel costs on a GPU, found by compiling it; no GPU is needed.

The compiler reports neither spills nor shared memory beyond what a launch may have, so these are counted in what it
made: by Triton's own cuobjdump and nvdisasm, in the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import native_specialize_impl
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from pipex.triton_kernels.launch import Launch
from pipex.triton_kernels.variants import Variant, variants

TOOLS = Path(nvidia.__file__).parent / "bin"

# Bytes of shared memory that one block may have (CUDA programming guide, table "Technical specifications").
SHARED_LIMIT = {80: 166_912, 90: 232_448}


@dataclass(frozen=True)
class Resources:
    """What one variant costs on one architecture.

    Attributes:
        kernel, variant: which one; see ``variants``.
        capability: 80 or 90.
        triton: the compiler's version.
        registers: per thread.
        shared: bytes of shared memory per block.
        shared_limit: bytes that a block may have there.
        stack: bytes of stack per thread.
        spills: instructions that read or write spilled registers.
        wgmma: Hopper's matrix instructions.
        wgmma_from_registers: those of them whose left operand is in registers (see ``tiles.multiply``).
        mma: older matrix instructions.
        tma_loads, tma_stores: copies by the tensor memory accelerator.
        async_copies: copies from global to shared memory without it, ``wide`` of them 16 bytes long.
        shallow_buffers: tiles in shared memory that wgmma may still read while the next copy overwrites them, because
            the compiler gave them fewer buffers than the pipeline has stages (see ``weight_gradient_kernel.ONES``).
    """

    kernel: str
    variant: str
    capability: int
    triton: str
    registers: int
    shared: int
    shared_limit: int
    stack: int
    spills: int
    wgmma: int
    wgmma_from_registers: int
    mma: int
    tma_loads: int
    tma_stores: int
    async_copies: int
    async_copies_wide: int
    shallow_buffers: int


def compile_launch(launch: Launch, capability: int) -> Any:
    """The compiled kernel that this launch would use on an sm_``capability`` GPU.

    Types, constants and alignment are found by the same function of Triton that finds them when a kernel is launched.
    """
    kernel = launch.kernel
    values = {name: (launch.arguments | launch.constants)[name] for name in kernel.arg_names}
    found = [
        ("constexpr", value)
        if name in launch.constants
        else native_specialize_impl(nvidia.CUDABackend, value, False, True, True)
        for name, value in values.items()
    ]
    types = [kind for kind, _ in found]
    hints = ["" if kind == "constexpr" else hint for kind, hint in found]
    constants = find_paths_if(types, lambda _, kind: kind == "constexpr")
    hinted = find_paths_if(hints, lambda _, hint: isinstance(hint, str))
    source = ASTSource(
        kernel,
        dict(zip(values, types, strict=True)),
        {path: get_iterable_path(list(values.values()), path) for path in constants},
        {path: nvidia.CUDABackend.parse_attr(get_iterable_path(hints, path)) for path in hinted},
    )
    return triton.compile(source, GPUTarget("cuda", capability, 32), launch.options)


def measure(variant: Variant, capability: int) -> Resources:
    """Compiles one variant and reads what it costs."""
    launch = variant.launch((capability // 10, capability % 10))
    compiled = compile_launch(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "--print-code", file.name)

    wgmma = len(re.findall(r"\bHGMMA\b", code))
    tiles = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", compiled.asm["ttgir"])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Resources(
        kernel=compiled.metadata.name,
        variant=variant.name,
        capability=capability,
        triton=triton.__version__,
        registers=_figure("REG", usage),
        shared=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT[capability],
        stack=_figure("STACK", usage),
        spills=count(r"\b(?:LDL|STL)\b"),
        wgmma=wgmma,
        wgmma_from_registers=count(r"\bHGMMA\S* R\d+, R\d+"),
        mma=count(r"\bHMMA\b"),
        tma_loads=count(r"\bUTMALDG\b"),
        tma_stores=count(r"\bUTMASTG\b"),
        async_copies=count(r"\bLDGSTS\b"),
        async_copies_wide=count(r"\bLDGSTS\S*\.128\b"),
        shallow_buffers=sum(int(depth) < launch.stages for depth in tiles) if wgmma else 0,
    )


def resources(capabilities: Sequence[int] = (90, 80)) -> list[Resources]:
    """All variants on all these architectures; a minute or two where Triton's cache has none of them."""
    return [
        measure(variant, capability)
        for capability in capabilities
        for variant in variants()
        if capability in variant.capabilities
    ]


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _figure(name: str, usage: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found, usage
    return int(found[1])
