"""Tables of measured times: what each product takes by Triton and by torch, on one GPU with one set of versions.

A table's file is one JSON object, and what it holds is data only; times in microseconds:

    {
     "format": "pipex gemm table 1",
     "gpu": "NVIDIA H200", "capability": [9, 0],
     "torch": "2.11.0+cu130", "triton": "3.6.0", "kernels": "0123456789abcdef",
     "driver": "580.65.06", "date": "2026-11-25T12:00:00+00:00",
     "entries": [
      {"kind": "dW", "tokens": 512, "n": 4096, "k": 4096, "micro_batches": 8, "dtype": "bfloat16",
       "gradient_dtype": "float32", "triton_us": 200.5, "torch_us": 300.25},
      ...
     ]
    }

A time is the longer of what the GPU takes and what the host takes to enqueue it: what one of many such products costs.
``triton_us`` is null where Triton's result was wrong. A table of another GPU, torch, Triton or of other kernels says
nothing, so it is refused; the driver is for people.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipex.errors import InputError

FORMAT = "pipex gemm table 1"
LARGEST = 4 << 20  # bytes of a file: some ten thousand entries

KINDS = ("dX", "dX+relu", "dX+silu", "dX+gelu", "dX+gelu_tanh", "dX+swiglu", "dW", "dW+db")
DTYPES = ("bfloat16", "float16", "float32")
# Of triton_kernels: what a product's time depends on
SOURCES = ("activations", "input_gradient", "launch", "tiles", "weight_gradient", "weight_gradient_kernel")


class Gpu(NamedTuple):
    """torch's name of a GPU, and its compute capability."""

    name: str
    capability: tuple[int, int]


class Product(NamedTuple):
    """Of dY [T, N] and W [N, K], or of dYᵀ and X [T, K] of each micro-batch. Dtypes by name; a product that is no
    weight gradient has one micro-batch and the operands' dtype as ``gradient_dtype``."""

    kind: str
    tokens: int
    n: int
    k: int
    micro_batches: int
    dtype: str
    gradient_dtype: str


class Times(NamedTuple):
    """Microseconds; None where the result was wrong."""

    triton: float | None
    torch: float


class Conditions(NamedTuple):
    """What a time depends on besides the product."""

    gpu: str
    capability: tuple[int, int]
    torch: str
    triton: str
    kernels: str

    @staticmethod
    def here(gpu: Gpu) -> Conditions:
        """Those of this process."""
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = "unknown"  # nightly builds are distributed under other names
        return Conditions(gpu.name, gpu.capability, torch.__version__, triton, _kernels())


@lru_cache(maxsize=1)
def _kernels() -> str:
    """Of the kernels' sources."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent.parent / "triton_kernels" / f"{name}.py").read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        conditions: under which the times hold.
        entries: the times.
        driver: of the GPU.
        date: of the last entry, ISO 8601.
    """

    conditions: Conditions
    entries: Mapping[Product, Times]
    driver: str
    date: str

    def nearest(self, product: Product) -> Times | None:
        """The times that stand for this product, None where none do.

        T varies, and so does the number of deferred micro-batches. An entry may stand for a product that differs in
        these only if its T is within a factor of two, and its micro-batches are as many, or fewer by at most that
        factor: each one more helps Triton, so what it wins with fewer it wins. Of several the nearest counts, by the
        sum of the distances of the logarithms.
        """
        best, found = math.inf, None
        same = (product.kind, product.n, product.k, product.dtype, product.gradient_dtype)
        for tokens, micro_batches, times in self._by_shape.get(same, ()):
            far = max(tokens, product.tokens) > 2 * min(tokens, product.tokens)
            if far or not micro_batches <= product.micro_batches <= 2 * micro_batches:
                continue
            distance = abs(math.log(product.tokens / tokens)) + math.log(product.micro_batches / micro_batches)
            if distance < best:
                best, found = distance, times
        return found

    @cached_property
    def _by_shape(self) -> dict[tuple[str, int, int, str, str], list[tuple[int, int, Times]]]:
        shapes: dict[tuple[str, int, int, str, str], list[tuple[int, int, Times]]] = {}
        for product, times in self.entries.items():
            same = (product.kind, product.n, product.k, product.dtype, product.gradient_dtype)
            shapes.setdefault(same, []).append((product.tokens, product.micro_batches, times))
        return shapes

    def to_text(self) -> str:
        """The file's content, one entry per line."""
        head = {"format": FORMAT, **self.conditions._asdict(), "driver": self.driver, "date": self.date}
        lines = ",\n".join(
            f"  {json.dumps(product._asdict() | {'triton_us': times.triton, 'torch_us': times.torch})}"
            for product, times in sorted(self.entries.items())
        )
        return f'{json.dumps(head, indent=1)[:-2]},\n "entries": [\n{lines}\n ]\n}}\n'

    @staticmethod
    def from_text(data: bytes, needed: Conditions, source: str) -> Table:
        """Reads what ``to_text`` writes, and nothing else; ``source`` says in errors what was read.

        Raises:
            InputError: it is no table, or one of other conditions.
        """
        head = _object(data, source)
        if head.get("format") != FORMAT:
            raise _refused(f"{source} has another format", head.get("format"), FORMAT)
        for name in Conditions._fields:
            wanted = getattr(needed, name)
            wanted = list(wanted) if isinstance(wanted, tuple) else wanted
            if head.get(name) != wanted:
                raise _refused(f"{source} was measured with another {name}", head.get(name), wanted)
        if set(head) != {"format", *Conditions._fields, "driver", "date", "entries"}:
            raise _refused(f"{source} has other keys", sorted(head), "those of a table")
        for name, kind in (("driver", str), ("date", str), ("entries", list)):
            if not isinstance(head[name], kind):
                raise _refused(f"{source} has a bad {name}", head[name], kind.__name__)
        if not _is_date(head["date"]):
            raise _refused(f"{source} has a bad date", head["date"], "ISO 8601")
        table: dict[Product, Times] = {}
        for number, entry in enumerate(head["entries"]):
            product, times = _entry(entry, f"entry {number} of {source}")
            if product in table:
                raise _refused(f"entry {number} of {source} repeats another", product, "each product once")
            table[product] = times
        return Table(needed, table, head["driver"], head["date"])


def now() -> str:
    """A table's date."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _object(data: bytes, source: str) -> dict[str, Any]:
    if len(data) > LARGEST:
        raise _refused(f"{source} is too large", f"more than {LARGEST} bytes", f"at most {LARGEST}")
    try:
        found = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _refused(f"{source} is not JSON", str(error) or type(error).__name__, "one object") from None
    if not isinstance(found, dict):
        raise _refused(f"{source} is no table", type(found).__name__, "one object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _entry(entry: object, source: str) -> tuple[Product, Times]:
    if not isinstance(entry, dict) or set(entry) != {*Product._fields, "triton_us", "torch_us"}:
        raise _refused(f"{source} is no entry", entry, f"{', '.join(Product._fields)}, triton_us, torch_us")
    product = Product(*(entry[name] for name in Product._fields))
    for name, known in (("kind", KINDS), ("dtype", DTYPES), ("gradient_dtype", DTYPES)):
        if entry[name] not in known:
            raise _refused(f"{source} has an unknown {name}", entry[name], f"one of {', '.join(known)}")
    for name in ("tokens", "n", "k", "micro_batches"):
        if type(entry[name]) is not int or not 0 < entry[name] < 1 << 40:
            raise _refused(f"{source} has a bad {name}", entry[name], "a whole number above 0")
    for name in ("triton_us", "torch_us"):
        value = entry[name]
        if value is None and name == "triton_us":
            continue
        if type(value) not in (int, float) or not 0 < value < 1e12:  # NaN is not
            raise _refused(f"{source} has a bad {name}", value, "a finite number above 0")
    return product, Times(entry["triton_us"], entry["torch_us"])


def _is_date(text: str) -> bool:
    try:
        return bool(datetime.fromisoformat(text))
    except ValueError:
        return False


def _refused(problem: str, got: object, needed: object) -> InputError:
    try:
        text = repr(got)  # whatever stands in a file cannot speak to a terminal
    except RecursionError:
        text = f"a deep {type(got).__name__}"
    return InputError(problem, got=text if len(text) < 100 else f"{text[:100]}...", needed=needed, fix="run pipex tune")
