from __future__ import annotations

import pytest

from pipex.bench.sizes import format_size, parse_size, size_range
from pipex.errors import InputError

KIB, MIB, GIB = 1024, 1024**2, 1024**3


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("512", 512), ("4K", 4096), ("4k", 4096), ("1M", 1048576), ("64m", 67108864), ("2G", 2147483648)],
)
def test_a_size_is_read_as_nccl_tests_reads_it(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "K", "0", "-4K", "4KB", "4 K", "4X", "1.5M", "²"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(InputError, match=f"not a size; got {text!r}"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(1, "1"), (1000, "1000"), (1536, "1536"), (4096, "4K"), (3 * MIB, "3M"), (GIB, "1G"), (1025 * KIB, "1025K")],
)
def test_a_size_is_written_with_the_largest_unit_that_fits(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize(
    ("first", "last", "factor", "sizes"),
    [
        (4 * KIB, 64 * KIB, 4, [4096, 16384, 65536]),
        (4 * KIB, 63 * KIB, 4, [4096, 16384]),
        (1, 8, 2, [1, 2, 4, 8]),
        (5, 5, 10, [5]),
    ],
)
def test_a_range_multiplies_up_to_its_end(first: int, last: int, factor: int, sizes: list[int]) -> None:
    assert size_range(first, last, factor) == sizes


def test_a_range_in_equal_steps() -> None:
    assert size_range(4 * KIB, 13 * KIB, step=4 * KIB) == [4096, 8192, 12288]
    assert size_range(5, 5, step=1) == [5]


def test_a_range_that_is_empty_or_endless_is_refused() -> None:
    with pytest.raises(InputError, match="empty; got 8K to 4K"):
        size_range(8192, 4096, 2)
    with pytest.raises(InputError, match="would not end; got -f 1"):
        size_range(4096, 8192, 1)


def test_a_range_of_too_many_sizes_is_refused_before_it_is_made() -> None:
    with pytest.raises(InputError, match="too many sizes; got more than 1000; needed a larger -i"):
        size_range(4096, 1 << 40, step=1)
