"""The kernels' arithmetic and indexing, run on the CPU (kernels_on_cpu.cpp) and compared with float64.

Sums of small integers are exact in any order, so there every element must be counted exactly once. For real numbers
the bound is the one of the sums' depth: n additions of unit roundoff 2^-24 err by at most n 2^-24 sum |x|.
"""

from __future__ import annotations

import ctypes
from itertools import product

import pytest
import torch
from built import shared_library
from cases import case

pytest.importorskip("pipex._cuda", reason="built without CUDA kernels")

TYPES = [torch.float32, torch.float16, torch.bfloat16]
CHUNK_ROWS, LANES, PARTIAL_LANES, WINDOW = 128, 8, 16, 32  # csrc/cuda/kernels


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return ctypes.CDLL(str(shared_library("tests/native/kernels_on_cpu.cpp", "csrc/cuda/kernels/requirements.cpp")))


def name(dtype: torch.dtype) -> bytes:
    return str(dtype).removeprefix("torch.").encode()


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def parts_of(tensors: list[torch.Tensor]) -> tuple[object, object, int]:
    data = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    rows = (ctypes.c_int64 * len(tensors))(*(len(tensor) for tensor in tensors))
    return data, rows, len(tensors)


def integers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-3, 4, (rows, columns)).to(dtype)


def aligned_for(columns: int, dtype: torch.dtype) -> list[bool]:
    """The ways a matrix of this width can be read."""
    return [False, True] if columns * dtype.itemsize % 16 == 0 else [False]


def chunk_sums(kernels: ctypes.CDLL, parts: list[torch.Tensor], aligned: bool) -> torch.Tensor:
    columns = parts[0].shape[1]
    chunks = -(-sum(map(len, parts)) // CHUNK_ROWS)
    partial = torch.full((chunks, columns), float("nan"))
    kernels.sum_chunks(
        *parts_of(parts), name(parts[0].dtype), ctypes.c_int64(columns), ctypes.c_bool(aligned), address(partial)
    )
    return partial


def add_partial_rows(kernels: ctypes.CDLL, parts: list[torch.Tensor], gradient: torch.Tensor) -> None:
    kernels.sum_partial_rows(
        *parts_of(parts), ctypes.c_int64(gradient.numel()), address(gradient), name(gradient.dtype)
    )


# ------------------------------------------------------------------------------------------ sums over rows


@pytest.mark.parametrize("dtype", TYPES)
def test_every_row_is_counted_once(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    several_rows = [1], [128], [129], [5, 0, 130, 7], [0, 1, 0], [64, 64, 200], [300] * 3
    for rows, columns in product(several_rows, (1, 7, 8, 256, 264, 515)):
        parts = [integers(count, columns, dtype) for count in rows]
        whole = torch.cat(parts).double()
        expected = torch.stack([chunk.sum(0) for chunk in whole.split(CHUNK_ROWS)])
        for aligned in aligned_for(columns, dtype):
            with case(rows, columns, aligned):
                assert torch.equal(chunk_sums(kernels, parts, aligned).double(), expected)


@pytest.mark.parametrize("gradient_type", TYPES)
def test_partial_rows_are_added_to_the_gradient_and_rounded_once(
    kernels: ctypes.CDLL, gradient_type: torch.dtype
) -> None:
    several_rows = [1], [132, 132, 132], [3, 0, 31], [0, 0, 2], [1000]
    for rows, columns in product(several_rows, (1, 31, 32, 33, 1000)):
        parts = [integers(count, columns, torch.float32) / 8 for count in rows]
        before = (integers(1, columns, torch.float32)[0] * 100.3).to(gradient_type)
        gradient = before.clone()
        add_partial_rows(kernels, parts, gradient)
        total = torch.cat(parts).double().sum(0)  # exact in fp32 as well
        with case(rows, columns):
            assert torch.equal(gradient, (before.float() + total.float()).to(gradient_type))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_bias_gradient_is_as_accurate_as_its_depth_allows(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    parts = [torch.randn(rows, 264).to(dtype) for rows in (2048, 2048, 777)]
    whole = torch.cat(parts).double()
    results = []
    for aligned in (False, True):
        gradient = torch.zeros(264)
        add_partial_rows(kernels, [chunk_sums(kernels, parts, aligned)], gradient)
        results.append(gradient)
    assert torch.equal(*results)  # the same order, however it is read
    chunks = -(-len(whole) // CHUNK_ROWS)
    depth = CHUNK_ROWS // LANES + LANES + -(-chunks // PARTIAL_LANES) + PARTIAL_LANES
    assert torch.all((results[0].double() - whole.sum(0)).abs() <= depth * 2.0**-24 * whole.abs().sum(0))


# ---------------------------------------------------------------------------------------------- embedding


def embedding(
    kernels: ctypes.CDLL,
    ids: list[torch.Tensor],
    parts: list[torch.Tensor],
    table: torch.Tensor,
    aligned: bool,
    padding: int = -1,
) -> torch.Tensor:
    table = table.clone()
    vocabulary, columns = table.shape
    sorted_ids, order = torch.cat(ids).sort(stable=True)
    windows = -(-len(order) // WINDOW)
    edges = torch.full((windows, 2, columns), float("nan"))
    kernels.sum_embedding(
        *parts_of(parts), name(parts[0].dtype), ctypes.c_int64(columns), address(sorted_ids), address(order),
        address(table), name(table.dtype), ctypes.c_int64(vocabulary), ctypes.c_int64(padding), ctypes.c_bool(aligned),
        address(edges),
    )  # fmt: skip
    return table


def some_ids(kind: str, count: int, vocabulary: int) -> torch.Tensor:
    if kind == "uniform":
        return torch.randint(vocabulary, (count,))
    if kind == "one":  # one run over all windows
        return torch.full((count,), vocabulary - 1)
    if kind == "frequent":  # long runs that begin and end inside windows
        return torch.where(torch.rand(count) < 0.6, 3, torch.randint(vocabulary, (count,)))
    assert kind == "distinct"
    return torch.randperm(count) % vocabulary


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["uniform", "one", "frequent", "distinct"])
def test_every_token_is_counted_once(kernels: ctypes.CDLL, dtype: torch.dtype, kind: str) -> None:
    vocabulary = 50
    several_counts = [1], [31], [32], [33], [64, 0, 64], [100, 7, 250]
    for counts, columns in product(several_counts, (1, 12, 1032)):
        ids = [some_ids(kind, count, vocabulary) for count in counts]
        parts = [integers(count, columns, dtype) for count in counts]
        for gradient_type in {dtype, torch.float32}:
            before = integers(vocabulary, columns, gradient_type)
            sums = torch.zeros(vocabulary, columns, dtype=torch.float64)
            sums.index_add_(0, torch.cat(ids), torch.cat(parts).double())
            for aligned in aligned_for(columns, dtype):
                with case(counts, columns, gradient_type, aligned):
                    after = embedding(kernels, ids, parts, before, aligned)
                    assert torch.equal(after, (before.float() + sums.float()).to(gradient_type))


def test_padding_and_ids_outside_the_table_get_no_gradient(kernels: ctypes.CDLL) -> None:
    ids = torch.tensor([-1] * 40 + [0, 5, 5, 9] + [2] * 70 + [10] * 50)
    part = torch.ones(len(ids), 4)
    after = embedding(kernels, [ids], [part], torch.zeros(11, 4)[:10], True, padding=2)
    assert after[:, 0].tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 1]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_frequent_token_s_gradient_is_accurate(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    parts = [torch.randn(count, 24).to(dtype) for count in (1500, 900)]
    ids = [some_ids("frequent", len(part), 40) for part in parts]
    whole, flat = torch.cat(parts).double(), torch.cat(ids)
    results = [embedding(kernels, ids, parts, torch.zeros(40, 24), aligned) for aligned in (False, True)]
    assert torch.equal(*results)
    exact = torch.zeros(40, 24, dtype=torch.float64).index_add_(0, flat, whole)
    size = torch.zeros(40, 24, dtype=torch.float64).index_add_(0, flat, whole.abs())
    depth = WINDOW + -(-len(flat) // WINDOW)
    assert torch.all((results[0].double() - exact).abs() <= depth * 2.0**-24 * size)


# -------------------------------------------------------------------------------------------------- casts


@pytest.mark.parametrize("dtype", TYPES)
def test_casts_round_to_nearest_and_touch_nothing_else(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    for count, aligned in product((1, 3, 4, 8, 9, 1000, 4097), (False, True)):
        with case(count, aligned):
            check_casts(kernels, dtype, count, aligned)


def check_casts(kernels: ctypes.CDLL, dtype: torch.dtype, count: int, aligned: bool) -> None:
    gradient, main = torch.randn(count + 8).to(dtype), torch.randn(count + 8)
    expected = main.clone()
    expected[:count] += gradient[:count].float()
    kernels.add_to_main(address(gradient), name(dtype), address(main), ctypes.c_int64(count), ctypes.c_bool(aligned))
    assert torch.equal(main, expected)

    main[: min(count, 4)] = torch.tensor([1e39, -1e39, float("nan"), 1 + 2.0**-8])[:count]
    expected = gradient.clone()
    expected[:count] = main[:count].to(dtype)
    kernels.cast_from_main(address(main), address(gradient), name(dtype), ctypes.c_int64(count), ctypes.c_bool(aligned))
    assert torch.equal(gradient.nan_to_num(7.0), expected.nan_to_num(7.0))
