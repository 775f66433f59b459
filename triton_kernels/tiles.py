"""Tiles of a matrix as the kernels see them: where a program's tile lies, how it is read, multiplied and written.

Each is read and written in one of two ways. With DESCRIPTORS (Hopper) the operand is a tensor descriptor, and the
copy is one instruction that checks bounds itself; otherwise it is a pointer with a row stride, and a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_position(program, rows, columns, GROUP: tl.constexpr = 8):
    """Row and column of a program's tile in a grid of tiles.

    Programs run roughly in rising order. Going down GROUP rows before going right keeps what a wave of them reads
    near-square, so that it stays in the L2 cache.
    """
    in_group = GROUP * columns
    first_row = program // in_group * GROUP
    height = min(rows - first_row, GROUP)
    return first_row + program % in_group % height, program % in_group // height


@triton.jit
def tile_addresses(base, stride, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of a tile and the mask of those inside the matrix. 64 bits: a matrix may exceed 2^31 elements."""
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    return base + r.to(tl.int64)[:, None] * stride + c[None, :], (r < rows)[:, None] & (c < columns)[None, :]


@triton.jit
def load_tile(
    source, stride, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """The tile whose first element is (row, column); zeros outside of the matrix."""
    if DESCRIPTORS:
        return source.load([row, column])
    else:
        addresses, inside = tile_addresses(source, stride, row, column, rows, columns, ROWS, COLUMNS)
        return tl.load(addresses, mask=inside, other=0.0)


@triton.jit
def store_tile(
    target,
    stride,
    row,
    column,
    rows,
    columns,
    tile,
    DTYPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes a float32 tile, rounded to DTYPE; what lies outside of the matrix is dropped."""
    tile = rounded(tile, DTYPE, UPCAST)
    if DESCRIPTORS:
        target.store([row, column], tile)
    else:
        addresses, inside = tile_addresses(target, stride, row, column, rows, columns, tile.shape[0], tile.shape[1])
        tl.store(addresses, tile, mask=inside)


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns.

    An epilogue that works on one half at a time needs half the registers and half the shared memory.
    """
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def multiply(a, b, total, UPCAST: tl.constexpr):
    """total + a·b. Both operands must come straight from memory: a wgmma whose left operand was in registers first
    is miscompiled by the assembler of Triton 3.6 and 3.7."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(values, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 values in DTYPE, rounded to nearest even."""
    if UPCAST and DTYPE.is_bf16():
        # The interpreter truncates to bfloat16, so round by hand: add just under half of the last kept bit, plus that
        # bit itself for ties, and clear the rest. Only ever used there.
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(DTYPE)
