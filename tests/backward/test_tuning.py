"""Tables of measured products: what stands for what, and whatever stands in a file."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import GPU

import pipex
from pipex.backward import tuning
from pipex.backward.tuning import Conditions, Product, Table, Times
from pipex.errors import InputError

HERE = Conditions(GPU.name, GPU.capability, "2.11.0+cu130", "3.6.0", "0123456789abcdef")


def weights(tokens: int, micro_batches: int, n: int = 4096) -> Product:
    return Product("dW", tokens, n, 1024, micro_batches, "bfloat16", "float32")


def table(entries: dict[Product, Times]) -> Table:
    return Table(HERE, entries, "580.1", "2026-11-25T12:00:00+00:00")


GOOD = table({weights(512, 8): Times(10.5, 20.25), weights(2048, 8): Times(None, 7.0)})


# ------------------------------------------------------------------------------------------------ what stands for what


def test_the_nearest_number_of_tokens_within_a_factor_of_two_counts() -> None:
    found = table({weights(256, 4): Times(1.0, 1.0), weights(1024, 4): Times(2.0, 2.0)})
    near = {t: found.nearest(weights(t, 4)) for t in (0, 127, 128, 256, 511, 513, 1024, 2048, 2049)}
    assert {t: None if times is None else times.torch for t, times in near.items()} == {
        0: None, 127: None, 128: 1.0, 256: 1.0, 511: 1.0, 513: 2.0, 1024: 2.0, 2048: 2.0, 2049: None,
    }  # fmt: skip


def test_fewer_micro_batches_stand_for_up_to_twice_as_many_and_never_for_fewer() -> None:
    found = table({weights(256, 1): Times(1.0, 1.0), weights(256, 4): Times(4.0, 4.0)})
    near = {n: found.nearest(weights(256, n)) for n in range(1, 10)}
    assert {n: None if times is None else times.torch for n, times in near.items()} == {
        1: 1.0, 2: 1.0, 3: None, 4: 4.0, 5: 4.0, 6: 4.0, 7: 4.0, 8: 4.0, 9: None,
    }  # fmt: skip


def test_distances_of_both_add_up() -> None:
    found = table({weights(256, 8): Times(1.0, 1.0), weights(512, 4): Times(2.0, 2.0)})
    # From 384 x 8: ln 1.5 to the first; ln 1.33 + ln 2 to the second.
    assert found.nearest(weights(384, 8)) == Times(1.0, 1.0)
    # From 384 x 7 only the second has no more micro-batches.
    assert found.nearest(weights(384, 7)) == Times(2.0, 2.0)


@pytest.mark.parametrize(
    "other",
    [{"kind": "dW+db"}, {"n": 4095}, {"k": 1025}, {"dtype": "float16"}, {"gradient_dtype": "bfloat16"}],
)
def test_another_product_stands_for_nothing(other: dict[str, Any]) -> None:
    assert GOOD.nearest(weights(512, 8)) == Times(10.5, 20.25)
    assert GOOD.nearest(weights(512, 8)._replace(**other)) is None


# -------------------------------------------------------------------------------------------------------------- files


def read(data: str | bytes) -> Table:
    return Table.from_text(data if isinstance(data, bytes) else data.encode(), HERE, "t.json")


products = st.builds(
    Product,
    st.sampled_from(tuning.KINDS),
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 20),
    st.integers(1, 64),
    st.sampled_from(tuning.DTYPES),
    st.sampled_from(tuning.DTYPES),
)
microseconds = st.floats(1e-3, 1e9)


@given(st.dictionaries(products, st.builds(Times, microseconds | st.none(), microseconds), max_size=5))
def test_what_is_written_is_read(entries: dict[Product, Times]) -> None:
    assert read(table(entries).to_text()) == table(entries)


def test_the_form_of_a_file() -> None:
    assert json.loads(GOOD.to_text()) == {
        "format": "pipex gemm table 1",
        "gpu": "Made-up GPU/2",
        "capability": [9, 0],
        "torch": "2.11.0+cu130",
        "triton": "3.6.0",
        "kernels": "0123456789abcdef",
        "driver": "580.1",
        "date": "2026-11-25T12:00:00+00:00",
        "entries": [
            {"kind": "dW", "tokens": t, "n": 4096, "k": 1024, "micro_batches": 8, "dtype": "bfloat16",
             "gradient_dtype": "float32", "triton_us": triton, "torch_us": by_torch}
            for t, triton, by_torch in ((512, 10.5, 20.25), (2048, None, 7.0))
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu", "NVIDIA H200"),
        ("capability", [9, 1]),
        ("torch", "2.11.0+cu128"),
        ("triton", "3.6.1"),
        ("kernels", "0123456789abcdee"),
    ],
)
def test_other_conditions_are_refused_by_name(name: str, value: object) -> None:
    document = json.loads(GOOD.to_text()) | {name: value}
    with pytest.raises(InputError, match=rf"measured with another {name}; got .*; needed .*; run pipex tune") as caught:
        read(json.dumps(document))
    assert ascii(value) in str(caught.value)


ENTRY = json.loads(GOOD.to_text())["entries"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pipex gemm table 2"}, "has another format; got 'pipex gemm table 2'; needed pipex gemm table 1"),
        ({"format": 1}, "has another format"),
        ({"more": 1}, "has other keys"),
        ({"driver": 7}, "has a bad driver"),
        ({"date": None}, "has a bad date"),
        ({"date": "yesterday"}, "has a bad date; got 'yesterday'; needed ISO 8601"),
        ({"entries": {}}, "has a bad entries"),
        ({"entries": [[]]}, "entry 0 of t.json is no entry"),
        ({"entries": [ENTRY, ENTRY]}, "entry 1 of t.json repeats another"),
        ({"entries": [ENTRY | {"more": 1}]}, "is no entry"),
        ({"entries": [{k: v for k, v in ENTRY.items() if k != "n"}]}, "is no entry"),
        ({"entries": [ENTRY | {"kind": "dY"}]}, "has an unknown kind; got 'dY'; needed one of dX, "),
        ({"entries": [ENTRY | {"kind": ["dW"]}]}, "has an unknown kind"),
        ({"entries": [ENTRY | {"dtype": "int8"}]}, "has an unknown dtype"),
        ({"entries": [ENTRY | {"gradient_dtype": {}}]}, "has an unknown gradient_dtype"),
        *(
            ({"entries": [ENTRY | {name: value}]}, f"has a bad {name}")
            for name in ("tokens", "n", "k", "micro_batches")
            for value in (0, -1, 1.0, True, "1", None, 1 << 40)
        ),
        *(
            ({"entries": [ENTRY | {name: value}]}, f"has a bad {name}")
            for name in ("triton_us", "torch_us")
            for value in (0, -1.0, True, "1", float("nan"), float("inf"), float("-inf"), 10**400)
        ),
        ({"entries": [ENTRY | {"torch_us": None}]}, "has a bad torch_us"),
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(json.dumps(json.loads(GOOD.to_text()) | change))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\x00", "is not JSON"),
        (b"[]", "is no table; got 'list'; needed one object"),
        (b"null", "is no table"),
        (b'{"format": 1, "format": 2}', "is not JSON; got 'a key stands there twice'"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"format": "\\u001b[31m\\ud800"}', r"got '\\x1b\[31m\\ud800'"),
        (b'{"format": "' + b"x" * 1000 + b'"}', "got 'x{99}\\.\\.\\.; needed"),
        (b" " * (tuning.LARGEST + 1), "is too large"),
    ],
)
def test_hostile_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(data)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("depth", range(100, 1100, 50))
def test_deep_values_are_refused(depth: int) -> None:
    with pytest.raises(InputError):
        read('{"format": ' + "[" * depth + "]" * depth + "}")


def test_what_is_read_may_be_too_deep_to_be_shown() -> None:
    """Python limits both, in some versions differently."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert str(tuning._refused("bad", deep, "better")) == "bad; got a deep list; needed better; run pipex tune"


SPICE = [b"\0", b"\xff", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"-1", b"1e999", b"null", b"{}", b"[", b"]", b'"', b",",
         b"true", b"9" * 5000, b"[" * 3000, b"\\ud800", "\u0663".encode()]  # fmt: skip


def test_mutated_files_are_read_or_refused() -> None:
    rng = random.Random(0)
    good, refused, kept = GOOD.to_text().encode(), 0, 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5))):
            begin = rng.randint(0, len(data))
            end = min(len(data), begin + rng.choice((0, 1, 2, 5, 40)))
            data[begin:end] = rng.choice([b"", rng.randbytes(2), data[end : end + 5], rng.choice(SPICE)])
        try:
            found = read(bytes(data))
        except InputError:
            refused += 1
            continue
        kept += 1
        assert read(found.to_text()) == found
        assert all(0 < times.torch < 1e12 for times in found.entries.values())
    assert refused > 2000
    assert kept > 20  # a digit of a time, say


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        read(data)


# --------------------------------------------------------------------------------------------------------- conditions


def test_conditions_here_are_of_this_torch_and_these_kernels() -> None:
    here = Conditions.here(GPU)
    assert (here.gpu, here.capability, here.torch) == (GPU.name, GPU.capability, torch.__version__)
    assert len(here.kernels) == 16


def test_any_change_of_a_kernel_is_another_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuning._kernels()
    read_bytes = Path.read_bytes
    for name in tuning.SOURCES:
        monkeypatch.setattr(Path, "read_bytes", lambda self, n=name: read_bytes(self) + b"#" * (self.stem == n))
        tuning._kernels.cache_clear()
        assert tuning._kernels() != before
    monkeypatch.undo()
    tuning._kernels.cache_clear()
    assert tuning._kernels() == before


def test_the_sources_are_all_that_the_kernels_import() -> None:
    folder = Path(pipex.__file__).parent / "triton_kernels"
    found, new = set(), {"weight_gradient", "input_gradient"}
    while new:
        found |= new
        modules = {
            node.module.rpartition(".")[2]
            for name in new
            for node in ast.walk(ast.parse((folder / f"{name}.py").read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipex.triton_kernels.")
        }
        new = modules - found
    assert found - {"checks"} == set(tuning.SOURCES)  # checks refuse operands; they do not change what runs
