"""What goes before the tensors of every message between ranks, and its check at the receiver.

A message is a header, a table with a row for each tensor, and the tensors' bytes. The header says which message it is:

    offset  bytes  field
         0      4  magic "pipx"
         4      4  version
         8     16  digest of the plan
        24      8  source stage, destination stage (int32 each)
        32      2  kind, place of the tensors' bytes (one byte each; 0: behind the table)
        34      2  number of tensors
        36      4  micro-batch
        40      8  step
        48      8  sequence number of the message on its edge, from 0
        56      8  bytes of all tensors, each beginning at a multiple of 64

A row says what a tensor is:

         0      3  dtype, number of dimensions, whether a gradient is wanted (one byte each)
         3      5  code and bits of the dtype in DLPack; three unused
         8      8  where it begins, from the first tensor's beginning
        16    128  shape and strides in elements, 8 x int64 each, unused ones 0

All little-endian. The receiver knows which message comes next, so the header has to be the expected one but for number,
place and bytes. What the tensors are it learns from the table, which is used (to allocate, to copy, to index) only once
it is proven to lie within its message.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipex.errors import InputError, MessageMismatch
from pipex.transport.interface import EdgeSpec, Form, TensorForm

MAGIC = b"pipx"
VERSION = 2
MAX_DIMENSIONS = 8
MAX_TENSORS = 4096  # of a message (csrc/host/message.hpp)
LAYOUT = struct.Struct("<4sI16siiBBHIQQQ")
SIZE = LAYOUT.size
assert SIZE == 64
RECORD = struct.Struct("<BBBBB3xQ8q8q")
assert RECORD.size == 144
ALIGNMENT = 64

KINDS = ("activation", "gradient", "tied")
_BYTE = (1, 8)  # float8 crosses DLPack as uint8 and is viewed: older torch versions do not read its codes
DLPACK = {
    torch.float32: (2, 32), torch.float64: (2, 64), torch.float16: (2, 16), torch.bfloat16: (4, 16),
    torch.int64: (0, 64), torch.int32: (0, 32), torch.int16: (0, 16), torch.int8: (0, 8), torch.uint8: _BYTE,
    torch.bool: (6, 8), torch.complex64: (5, 64), torch.complex128: (5, 128),
    torch.float8_e4m3fn: _BYTE, torch.float8_e5m2: _BYTE,
}  # fmt: skip
"""DLPack's code and bits of every dtype that can cross."""
DTYPES = tuple(DLPACK)
AS_BYTES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
"""What arrives as uint8, to be viewed."""
_DENSE = torch.strided
_CODE_OF = {dtype: code for code, dtype in enumerate(DTYPES)}


class Header(NamedTuple):
    """The fields of a header that differ between messages of one plan."""

    digest: bytes
    source: int
    destination: int
    kind: str
    tensors: int
    microbatch: int
    step: int
    sequence: int
    nbytes: int

    def pack(self) -> bytes:
        return LAYOUT.pack(
            MAGIC, VERSION, self.digest, self.source, self.destination, KINDS.index(self.kind), 0, self.tensors,
            self.microbatch, self.step, self.sequence, self.nbytes,
        )  # fmt: skip


def edge_header(spec: EdgeSpec, digest: bytes) -> bytes:
    """The header of an edge's first message, with nothing in it yet."""
    return Header(digest, spec.source, spec.destination, spec.kind, 0, 0, 0, 0, 0).pack()


def pack_table(form: Sequence[TensorForm]) -> tuple[bytes, int]:
    """The table of a message, and the bytes of its tensors.

    Raises:
        InputError: more than 4096 tensors, or one that has more than 8 dimensions or a dtype that cannot cross.
    """
    if len(form) > MAX_TENSORS:
        raise InputError("a message between stages has too many tensors", got=len(form),
                         needed=f"at most {MAX_TENSORS}", fix="pass fewer, larger ones")  # fmt: skip
    rows, end = [], 0
    for tensor in form:
        dimensions = len(tensor.shape)
        if dimensions > MAX_DIMENSIONS:
            raise InputError(
                "a tensor between stages has too many dimensions",
                got=f"{dimensions} ({tensor})", needed=f"at most {MAX_DIMENSIONS}", fix="reshape it in the stage",
            )  # fmt: skip
        if tensor.dtype not in DLPACK:
            raise InputError(f"tensors of dtype {tensor.dtype} cannot go between stages", needed=f"one of {DTYPES}")
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        unused = [0] * (MAX_DIMENSIONS - dimensions)
        rows.append(RECORD.pack(
            _CODE_OF[tensor.dtype], dimensions, tensor.wants_gradient, *DLPACK[tensor.dtype], begin,
            *tensor.shape, *unused, *tensor.strides, *unused,
        ))  # fmt: skip
        end = begin + tensor.nbytes
    return b"".join(rows), end


def read_table(table: bytes) -> tuple[Form, tuple[int, ...]]:
    """What the tensors of a message are, and where each begins; the table was proven by ``_native.MessageForm``.

    Raises:
        MessageMismatch: a dtype that nobody sends, or a gradient is wanted of one that has none.
    """
    form, offsets = [], []
    for dtype, dimensions, wanted, code, bits, offset, *sizes in RECORD.iter_unpack(table):
        if dtype >= len(DTYPES) or DLPACK[DTYPES[dtype]] != (code, bits):
            raise MessageMismatch(f"a message has a tensor of unknown dtype {dtype}", needed=f"one of {DTYPES}",
                                  fix="use one version of pipex on all ranks")  # fmt: skip
        one = DTYPES[dtype]
        if wanted and not (one.is_floating_point or one.is_complex):
            raise MessageMismatch(f"a message wants a gradient of a tensor of dtype {one}",
                                  needed="one of floats or complex numbers",
                                  fix="use one version of pipex on all ranks")  # fmt: skip
        shape, strides = tuple(sizes[:dimensions]), tuple(sizes[MAX_DIMENSIONS:][:dimensions])
        form.append(TensorForm(shape, one, strides, bool(wanted)))
        offsets.append(offset)
    return tuple(form), tuple(offsets)


def is_dense(tensor: Tensor) -> bool:
    """Whether shape and strides say where a tensor's elements lie."""
    return tensor.layout is _DENSE and not tensor.is_nested


def check_memory(spec: EdgeSpec, tensors: Sequence[Tensor], device: torch.device) -> None:
    """
    Raises:
        InputError: a tensor's values do not lie in memory of the ``device``, which the edge sends from.
    """
    for tensor in tensors:
        if not is_dense(tensor):
            got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise InputError(
                f"a tensor for the {spec} is not dense", got=got, needed="torch.strided",
                fix="use sparse=False in an embedding whose weight is in stages of several ranks, or to_dense()",
            )  # fmt: skip
        if tensor.device != device:
            raise InputError(f"the {spec} is in memory of {device}",
                             got=f"a tensor on {tensor.device}", needed=f"one on {device}")  # fmt: skip


def is_spread(tensor: Tensor) -> bool:
    """Whether more lies between a tensor's elements than they take themselves. Only then are they packed: all other
    strides are kept, those of expanded and of transposed tensors too."""
    between = TensorForm(tuple(tensor.shape), tensor.dtype, tensor.stride()).nbytes
    return between > 2 * tensor.numel() * tensor.itemsize


def as_sent(tensor: Tensor) -> Tensor:
    """The same values, without a graph, in memory whose bytes can cross as they are."""
    found = tensor.detach().resolve_conj().resolve_neg()
    return found.contiguous() if is_spread(found) else found


def copied(tensor: Tensor) -> Tensor:
    """As ``as_sent``, in memory of its own, with the strides of an expanded tensor too."""
    sent = as_sent(tensor)
    found = sent.clone()
    if found.stride() == sent.stride():
        return found
    elements = TensorForm(tuple(sent.shape), sent.dtype, sent.stride()).nbytes // sent.itemsize
    return sent.as_strided((elements,), (1,)).clone().as_strided(sent.shape, sent.stride())


def describe(raw: bytes) -> str:
    """Says in words what a received header announces; never fails, whatever the bytes are."""
    magic, version, digest, source, destination, kind, _, count, microbatch, step, sequence, nbytes = LAYOUT.unpack(raw)
    if magic != MAGIC or version != VERSION:
        return f"no pipex message of version {VERSION} (first bytes {raw[:8].hex()})"
    kind_name = KINDS[kind] if kind < len(KINDS) else f"unknown kind {kind}"
    return (
        f"micro-batch {microbatch} of step {step}, {kind_name} {source}→{destination}, message {sequence}, "
        f"plan {digest.hex()[:8]} ({count} tensors, {nbytes} bytes)"
    )


def mismatch(spec: EdgeSpec, got: str, needed: str) -> MessageMismatch:
    """The error for a header that is not the expected one; both in words."""
    return MessageMismatch(
        f"stage {spec.destination} (rank {spec.destination_rank}) received from stage {spec.source} "
        f"(rank {spec.source_rank}) another message than comes next",
        got=got, needed=needed, fix="all ranks must run one plan, step by step",
    )  # fmt: skip
