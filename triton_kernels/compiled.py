"""Kernels that Triton has compiled, launched without Triton (csrc/cuda/launcher).

``kernel = load(device, triton.compile(source, target=…))`` and then ``kernel.launch(*grid, stream, values(…))``, see
``pipex._cuda.Kernel``. Only facts of Triton's metadata are read, so this imports no Triton.
Needs the CUDA part of pipex.
"""

from __future__ import annotations

from typing import Any

from pipex import _cuda
from pipex.errors import InputError

SCALARS = {"i32": "i32", "i64": "i64", "fp32": "f32"}

# Triton's metadata count element types as the GPU does; the driver counts three of them otherwise: triton 3.6 to 3.9,
# backends/nvidia/driver.py, "slightly different on host vs device".
ELEMENT_TYPE_OF_DRIVER = {**{number: number for number in range(8)}, 8: 10, 9: 8, 10: 9}


def load(device: _cuda.Device, compiled: Any) -> _cuda.Kernel:
    """A kernel from what ``triton.compile`` returned. Raises InputError for what the launcher does not do."""
    metadata = compiled.metadata
    check(metadata)
    parts = parameters(compiled.src.signature, metadata.tensordesc_meta)
    return _cuda.Kernel(device, compiled.asm["cubin"], metadata.name, metadata.num_warps, metadata.shared, parts)


def check(metadata: Any) -> None:
    """Refuse what a launch would have to know more about."""
    plain = {
        "num_ctas": 1,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
    }
    for fact, value in plain.items():
        if (got := getattr(metadata, fact)) != value:
            raise InputError(
                f"kernel {metadata.name} cannot be launched without Triton: {fact}",
                got=got,
                needed=value,
                fix="tensor descriptors that are made on the device need scratch memory; pass them as arguments",
            )


def parameters(signature: dict[str, Any], tensordesc_meta: list[dict[str, Any]]) -> list[str | _cuda.Tile]:
    """What ``pipex._cuda.Kernel`` needs to know of a signature (``compiled.src.signature``) and its descriptors."""
    tiles = iter(tensordesc_meta)
    result: list[str | _cuda.Tile] = []
    for kind in flat(tuple(signature.values())):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            result.append("pointer")
        elif kind.startswith("tensordesc"):
            result.append(tile(kind, next(tiles, None)))
        elif kind in SCALARS:
            result.append(SCALARS[kind])
        else:
            raise InputError(
                "a kernel's parameter is of a kind that the launcher does not know",
                got=kind,
                needed="a pointer, a tensor descriptor, " + ", ".join(SCALARS),
            )
    return result


def values(signature: dict[str, Any], arguments: dict[str, Any]) -> tuple[int | float, ...]:
    """What ``pipex._cuda.Kernel.launch`` takes for a launch's arguments, by name, in the order of the signature.

    Constants are left out; a tensor is its address, a descriptor its address, shape and strides in elements.
    """
    result: list[int | float] = []

    def add(kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for pair in zip(kind, value, strict=True):
                add(*pair)
        elif kind.startswith("tensordesc"):
            result.extend((value.base.data_ptr(), *value.shape, *value.strides))
        elif kind.startswith("*"):
            result.append(value.data_ptr())
        elif kind != "constexpr":
            result.append(value)

    for name, kind in signature.items():
        add(kind, arguments.get(name))  # compile-time parameters are not among a launch's arguments
    return tuple(result)


def flat(kinds: tuple[Any, ...]) -> list[str]:
    """Tuples among the arguments count as if their members were arguments."""
    return [inner for kind in kinds for inner in (flat(kind) if isinstance(kind, tuple) else [kind])]


def tile(kind: str, meta: dict[str, Any] | None) -> _cuda.Tile:
    if meta is None or meta["fp4_padded"] or meta.get("is_im2col", False):
        raise InputError(
            "a tensor descriptor is not a plain tile of the copy engine",
            got=f"{kind} with {meta}",
            needed="code for sm_90 or newer, whole-byte elements, no im2col",
        )
    return _cuda.Tile(ELEMENT_TYPE_OF_DRIVER[meta["elem_type"]], meta["elem_size"], meta["swizzle"], meta["block_size"])
