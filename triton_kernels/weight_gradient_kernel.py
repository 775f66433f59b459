"""The kernel behind ``weight_gradient``: dW += Σ dYᵀ·X over micro-batches, db += Σ dY in the same pass.

The sum of all micro-batches stays in registers, so the gradient is read and written once, not once per micro-batch.
Every element of a gradient belongs to one program, which adds in rising micro-batch order: the same bits, run after
run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipex.triton_kernels.tiles import halves, load_tile, multiply, rounded, store_tile, tile_addresses, tile_position

# The bias gradient is a product too, dYᵀ·1, with a matrix of this many columns of ones; all its columns are equal.
# Adding up dY's tile in registers instead would race: Triton (3.6 and 3.9) gives a tile that is both multiplied and
# read into registers one buffer less, so the next copy lands in the buffer that wgmma still reads. 16 columns, since
# 3.6 takes 8 through registers, with the same race.
ONES = tl.constexpr(16)


@triton.jit
def operand_at(
    address, rows, stride, columns, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A micro-batch's operand [1, rows, columns], from its address in the table."""
    # The launcher puts 16-byte aligned addresses into the table only; the compiler cannot see that through a load.
    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(pointer, [1, rows, columns], [stride, stride, 1], [1, ROWS, COLUMNS])
    else:
        return pointer


@triton.jit
def load_dy(
    source, slab_stride, stride, micro_batch, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of dYᵀ, [COLUMNS, ROWS]."""
    if DESCRIPTORS:
        return tl.trans(tl.reshape(source.load([micro_batch, row, column]), (ROWS, COLUMNS)))
    else:
        # Transposed by its addresses: the compiler does not copy ahead what is transposed after a load by pointers.
        source += tl.cast(micro_batch, tl.int64) * slab_stride
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        addresses = source + c[:, None] + r.to(tl.int64)[None, :] * stride
        return tl.load(addresses, mask=(c < columns)[:, None] & (r < rows)[None, :], other=0.0)


@triton.jit
def load_x(
    source, slab_stride, stride, micro_batch, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of X, [ROWS, COLUMNS]."""
    if DESCRIPTORS:
        return tl.reshape(source.load([micro_batch, row, column]), (ROWS, COLUMNS))
    else:
        source += tl.cast(micro_batch, tl.int64) * slab_stride
        return load_tile(source, stride, row, column, rows, columns, ROWS, COLUMNS, False)


@triton.jit
def add_products(
    product, row_sum, slab, first, last, n, k, N, K, BIAS: tl.constexpr, UPCAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the micro-batches first … last-1 of a slab: one flat loop, so that loads run ahead across their borders."""
    dy, x, rows, dy_slab_stride, dy_stride, x_slab_stride, x_stride = slab
    steps = tl.cdiv(rows, BLOCK_T)
    for step in range(first * steps, last * steps):
        m, t = step // steps, step % steps * BLOCK_T
        dy_tile = load_dy(dy, dy_slab_stride, dy_stride, m, t, n, rows, N, BLOCK_T, BLOCK_N, DESCRIPTORS)
        x_tile = load_x(x, x_slab_stride, x_stride, m, t, k, rows, K, BLOCK_T, BLOCK_K, DESCRIPTORS)
        product = multiply(dy_tile, x_tile, product, UPCAST)
        if BIAS:
            ones = tl.full((BLOCK_T, ONES), 1.0, tl.float32).to(dy_tile.dtype)
            row_sum = multiply(dy_tile, ones, row_sum, UPCAST)
    return product, row_sum


@triton.jit
def add_micro_batches(
    product, row_sum, slab, first, last, n, k, N, K, BIAS: tl.constexpr, UPCAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """add_products, with the row sum in the first column of programs only."""
    if BIAS:
        if k == 0:
            product, row_sum = add_products(
                product, row_sum, slab, first, last, n, k, N, K, True, UPCAST, DESCRIPTORS, BLOCK_T, BLOCK_N, BLOCK_K
            )
        else:
            product, row_sum = add_products(
                product, row_sum, slab, first, last, n, k, N, K, False, UPCAST, DESCRIPTORS, BLOCK_T, BLOCK_N, BLOCK_K
            )
        return product, row_sum
    else:
        return add_products(
            product, row_sum, slab, first, last, n, k, N, K, False, UPCAST, DESCRIPTORS, BLOCK_T, BLOCK_N, BLOCK_K
        )


@triton.jit
def add_slab(
    total, row_total, slab, count, n, k, N, K, EXACT: tl.constexpr, BIAS: tl.constexpr, GRADIENT_DTYPE: tl.constexpr,
    UPCAST: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds a slab's micro-batches to the totals; EXACT rounds after each of them, as launches of their own would."""
    if EXACT:
        for m in range(count):
            product, row_sum = add_micro_batches(
                tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_N, ONES), tl.float32), slab, m, m + 1, n, k,
                N, K, BIAS, UPCAST, DESCRIPTORS, BLOCK_T, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            total = rounded(total + product, GRADIENT_DTYPE, UPCAST).to(tl.float32)
            row_total = rounded(row_total + row_sum, GRADIENT_DTYPE, UPCAST).to(tl.float32)
        return total, row_total
    else:
        return add_micro_batches(
            total, row_total, slab, 0, count, n, k, N, K, BIAS, UPCAST, DESCRIPTORS, BLOCK_T, BLOCK_N, BLOCK_K
        )


@triton.jit
def weight_gradient_kernel(
    table,  # int64, for each group of the grid: dW, db, then dY, X and rows of each micro-batch; None with slabs
    slabs,  # a tuple of (dY [count, rows, N], X [count, rows, K], rows, and their strides); None with a table
    weight_gradient,  # [N, K]; None with a table
    bias_gradient,  # [N]; None without BIAS and with a table
    count,  # micro-batches of each slab, or of each group of the table
    dy_stride,  # with a table, which has these in common
    x_stride,
    weight_gradient_stride,
    N,
    K,
    EXACT: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    GRADIENT_DTYPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n, k = tile_position(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K))
    n, k = n * BLOCK_N, k * BLOCK_K
    TABLE: tl.constexpr = table is not None
    if TABLE:
        entry = table + tl.program_id(1).to(tl.int64) * (2 + 3 * count)
        weight_gradient = tl.multiple_of(tl.load(entry).to(tl.pointer_type(GRADIENT_DTYPE)), 16)
        bias_gradient = tl.load(entry + 1).to(tl.pointer_type(GRADIENT_DTYPE))

    rows_of_w = n + tl.arange(0, BLOCK_N)
    writes_bias = rows_of_w < tl.where(k == 0, N, 0)  # the first column of programs only
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    row_total = tl.zeros((BLOCK_N, ONES), tl.float32)
    if EXACT:  # starts from the gradient, so that each rounding is that of a launch of its own
        addresses, inside = tile_addresses(weight_gradient, weight_gradient_stride, n, k, N, K, BLOCK_N, BLOCK_K)
        total += tl.load(addresses, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            row_total += tl.load(bias_gradient + rows_of_w, mask=writes_bias, other=0.0).to(tl.float32)[:, None]

    if TABLE:
        for m in range(count):
            micro_batch = entry + 2 + 3 * m
            t = tl.load(micro_batch + 2).to(tl.int32)
            dy = operand_at(tl.load(micro_batch), t, dy_stride, N, DTYPE, BLOCK_T, BLOCK_N, DESCRIPTORS)
            x = operand_at(tl.load(micro_batch + 1), t, x_stride, K, DTYPE, BLOCK_T, BLOCK_K, DESCRIPTORS)
            total, row_total = add_slab(
                total, row_total, (dy, x, t, 0, dy_stride, 0, x_stride), 1, n, k, N, K, EXACT, BIAS, GRADIENT_DTYPE,
                UPCAST, DESCRIPTORS, BLOCK_T, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        for i in tl.static_range(len(slabs)):
            total, row_total = add_slab(
                total, row_total, slabs[i], count, n, k, N, K, EXACT, BIAS, GRADIENT_DTYPE, UPCAST, DESCRIPTORS,
                BLOCK_T, BLOCK_N, BLOCK_K,
            )  # fmt: skip

    if EXACT:
        addresses, inside = tile_addresses(weight_gradient, weight_gradient_stride, n, k, N, K, BLOCK_N, BLOCK_K)
        tl.store(addresses, rounded(total, GRADIENT_DTYPE, UPCAST), mask=inside)
    else:
        HALF: tl.constexpr = BLOCK_K // 2
        if TABLE and DESCRIPTORS:  # not before the loop, through which its blocks would take shared memory
            weight_gradient = tl.make_tensor_descriptor(
                weight_gradient, [N, K], [weight_gradient_stride, 1], [BLOCK_N, HALF]
            )
        left, right = halves(total)
        for half in tl.static_range(2):
            at = k + half * HALF
            old = load_tile(weight_gradient, weight_gradient_stride, n, at, N, K, BLOCK_N, HALF, DESCRIPTORS)
            new = old.to(tl.float32) + (left if half == 0 else right)
            store_tile(weight_gradient, weight_gradient_stride, n, at, N, K, new, GRADIENT_DTYPE, DESCRIPTORS, UPCAST)
    if BIAS:
        bias = tl.sum(row_total, 1) / ONES
        if not EXACT:
            bias += tl.load(bias_gradient + rows_of_w, mask=writes_bias, other=0.0).to(tl.float32)
        tl.store(bias_gradient + rows_of_w, rounded(bias, GRADIENT_DTYPE, UPCAST), mask=writes_bias)
