"""The gradient kernels on a real GPU, against float64, in memory that was poisoned before."""

from __future__ import annotations

import pytest
import torch

_cuda = pytest.importorskip("pipex._cuda", reason="built without CUDA kernels")
pytestmark = pytest.mark.gpu

TYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
CHUNK_ROWS, LANES, PARTIAL_LANES, WINDOW = 128, 8, 16, 32  # csrc/cuda/kernels


def name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def addresses(parts: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(part.data_ptr(), len(part)) for part in parts]


def poisoned(size: int) -> torch.Tensor:
    return torch.full((size // 4,), float("nan"), device="cuda")


def normal(rows: int, columns: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Starts `offset` elements behind an address that is a multiple of 16."""
    flat = torch.randn(offset + rows * columns, device="cuda").to(dtype)
    return flat[offset:].view(rows, columns)


def bound(depth: int, sizes: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Of the error of `depth` fp32 additions of terms whose absolute values sum to `sizes`, rounded once."""
    error = depth * 2.0**-24 * sizes
    return error + ROUNDOFF[result.dtype] * (result.double().abs() + error)


def add_bias(parts: list[torch.Tensor], gradient: torch.Tensor) -> None:
    columns = gradient.numel()
    size = _cuda.bias_gradient_workspace(sum(map(len, parts)), columns)
    workspace = poisoned(size)
    _cuda.add_bias_gradient(
        addresses(parts), name(parts[0]), columns, gradient.data_ptr(), name(gradient), workspace.data_ptr(), size,
        stream(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("rows", [[1], [2048], [5, 0, 130, 7], [4096, 4096, 4096, 1000]])
@pytest.mark.parametrize(("columns", "offset"), [(1, 0), (515, 0), (4096, 0), (4096, 1), (12289, 0)])
def test_bias(dtype: torch.dtype, native: bool, rows: list[int], columns: int, offset: int) -> None:
    parts = [normal(count, columns, dtype, offset) for count in rows]
    before = torch.randn(columns, device="cuda").to(dtype if native else torch.float32)
    gradient, again = before.clone(), before.clone()
    add_bias(parts, gradient)
    add_bias(parts, again)
    assert torch.equal(gradient, again)
    whole = torch.cat([*parts, before[None]]).double()
    chunks = -(-sum(rows) // CHUNK_ROWS)
    depth = CHUNK_ROWS // LANES + LANES + -(-chunks // PARTIAL_LANES) + PARTIAL_LANES + 1
    assert torch.all((gradient.double() - whole.sum(0)).abs() <= bound(depth, whole.abs().sum(0), gradient))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [[1], [132] * 8, [3, 0, 264]])
@pytest.mark.parametrize("columns", [1, 33, 4096, 8191])
def test_norm(dtype: torch.dtype, rows: list[int], columns: int) -> None:
    parts = [normal(count, columns, torch.float32) for count in rows]
    before = torch.randn(columns, device="cuda").to(dtype)
    gradient = before.clone()
    _cuda.add_norm_gradient(addresses(parts), columns, gradient.data_ptr(), name(gradient), stream())
    whole = torch.cat([*parts, before[None].float()]).double()
    depth = -(-sum(rows) // PARTIAL_LANES) + len(rows) + PARTIAL_LANES + 1
    assert torch.all((gradient.double() - whole.sum(0)).abs() <= bound(depth, whole.abs().sum(0), gradient))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])  # of one frequent token
@pytest.mark.parametrize("counts", [[1], [33], [1000, 0, 777], [8192]])
@pytest.mark.parametrize("columns", [1, 515, 4096])
def test_embedding(dtype: torch.dtype, native: bool, share: float, counts: list[int], columns: int) -> None:
    vocabulary, padding, total = 500, 7, sum(counts)
    ids = torch.where(torch.rand(total) < share, 3, torch.randint(vocabulary, (total,))).cuda()
    parts = [normal(count, columns, dtype) for count in counts]
    before = torch.randn(vocabulary, columns, device="cuda").to(dtype if native else torch.float32)
    sorted_ids, order = ids.sort(stable=True)
    size = _cuda.embedding_gradient_workspace(total, columns)
    results = []
    for _ in range(2):
        gradient, workspace = before.clone(), poisoned(size)
        _cuda.add_embedding_gradient(
            addresses(parts), name(parts[0]), columns, sorted_ids.data_ptr(), order.data_ptr(), gradient.data_ptr(),
            name(gradient), vocabulary, padding, workspace.data_ptr(), size, stream(),
        )  # fmt: skip
        results.append(gradient)
    assert torch.equal(*results)
    whole = torch.cat(parts).double() * (ids != padding)[:, None]
    exact = before.double().index_add(0, ids, whole)
    sizes = before.double().abs().index_add(0, ids, whole.abs())
    depth = WINDOW + -(-total // WINDOW) + 1
    assert torch.all((results[0].double() - exact).abs() <= bound(depth, sizes, results[0]))
    untouched = torch.ones(vocabulary, dtype=torch.bool, device="cuda")
    untouched[ids[ids != padding]] = False
    assert torch.equal(results[0][untouched], before[untouched])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 9, 1000, 3_000_001])
@pytest.mark.parametrize("offset", [0, 1])
def test_casts(dtype: torch.dtype, count: int, offset: int) -> None:
    gradient = torch.randn(offset + count + 1, device="cuda").to(dtype)
    main = torch.randn(count + 1, device="cuda")
    expected = main.clone()
    expected[:count] += gradient[offset : offset + count].float()
    at = gradient[offset:].data_ptr()
    _cuda.add_to_main_gradient(at, name(gradient), main.data_ptr(), count, stream())
    assert torch.equal(main, expected)
    expected = gradient.clone()
    expected[offset : offset + count] = main[:count].to(dtype)
    _cuda.cast_main_gradient(main.data_ptr(), at, name(gradient), count, stream())
    assert torch.equal(gradient, expected)


def test_a_table_of_more_than_2_to_the_31_elements() -> None:
    vocabulary, columns = 2**20 + 1, 2048
    gradient = torch.zeros(vocabulary, columns, dtype=torch.float16, device="cuda")
    ids = torch.tensor([0, vocabulary - 1], device="cuda")
    part = torch.ones(2, columns, dtype=torch.float16, device="cuda")
    size = _cuda.embedding_gradient_workspace(2, columns)
    workspace, order = poisoned(size), torch.arange(2, device="cuda")
    _cuda.add_embedding_gradient(
        addresses([part]), "float16", columns, ids.data_ptr(), order.data_ptr(), gradient.data_ptr(), "float16",
        vocabulary, -1, workspace.data_ptr(), size, stream(),
    )  # fmt: skip
    assert gradient[ids].eq(1).all()
    assert gradient.count_nonzero() == 2 * columns
