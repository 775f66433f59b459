"""The fixed header that goes before every tensor between ranks, and its check at the receiver.

    offset  bytes  field
         0      4  magic "pipx"
         4      4  version
         8     16  digest of the plan
        24      8  source stage, destination stage (int32 each)
        32      4  kind, dtype, number of dimensions, index of the tensor in its message (one byte each)
        36      4  micro-batch
        40      8  step
        48      8  sequence number of the message on its edge, from 0
        56      8  bytes of payload
        64     64  shape, 8 x int64, unused ones 0

All little-endian. Nothing in a header is used (to allocate, to copy, to index) before it equals the expected one.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from pipex.errors import InputError, MessageMismatch
from pipex.transport.interface import EdgeSpec, TensorForm

MAGIC = b"pipx"
VERSION = 1
MAX_DIMENSIONS = 8
LAYOUT = struct.Struct("<4sI16siiBBBBIQQQ8q")
SIZE = LAYOUT.size
assert SIZE == 128

KINDS = ("activation", "gradient", "tied")
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
_DTYPE_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}


class Header(NamedTuple):
    """The fields of a header that differ between messages of one plan."""

    digest: bytes
    source: int
    destination: int
    kind: str
    tensor: int
    microbatch: int
    step: int
    sequence: int
    form: TensorForm

    def pack(self) -> bytes:
        shape = self.form.shape
        if len(shape) > MAX_DIMENSIONS:
            raise InputError(
                "a tensor between stages has too many dimensions",
                got=f"{len(shape)} ({self.form})", needed=f"at most {MAX_DIMENSIONS}", fix="reshape it in the stage",
            )  # fmt: skip
        if self.form.dtype not in _DTYPE_CODE:
            raise InputError(f"tensors of dtype {self.form.dtype} cannot go between stages", needed=f"one of {DTYPES}")
        return LAYOUT.pack(
            MAGIC, VERSION, self.digest, self.source, self.destination, KINDS.index(self.kind),
            _DTYPE_CODE[self.form.dtype], len(shape), self.tensor, self.microbatch, self.step, self.sequence,
            self.form.nbytes, *shape, *([0] * (MAX_DIMENSIONS - len(shape))),
        )  # fmt: skip

    def __str__(self) -> str:
        return _words(str(self.form), self.form.nbytes, *self[:-1])


def describe(raw: bytes) -> str:
    """Says in words what a received header announces; never fails, whatever the bytes are."""
    (
        magic,
        version,
        digest,
        source,
        destination,
        kind,
        dtype,
        dims,
        index,
        microbatch,
        step,
        sequence,
        nbytes,
        *shape,
    ) = LAYOUT.unpack(raw)
    if magic != MAGIC or version != VERSION:
        return f"no pipex message of version {VERSION} (first bytes {raw[:8].hex()})"
    kind_name = KINDS[kind] if kind < len(KINDS) else f"unknown kind {kind}"
    dtype_name = str(DTYPES[dtype]).removeprefix("torch.") if dtype < len(DTYPES) else f"unknown dtype {dtype}"
    sizes = ", ".join(map(str, shape[: min(dims, MAX_DIMENSIONS)]))
    form = f"{dtype_name}[{sizes}]"
    return _words(form, nbytes, digest, source, destination, kind_name, index, microbatch, step, sequence)


def _words(
    form: str, nbytes: int, digest: bytes, source: int, destination: int, kind: str, index: int, microbatch: int,
    step: int, sequence: int,
) -> str:  # fmt: skip
    return (
        f"{form} ({nbytes} bytes) as tensor {index} of micro-batch {microbatch}, step {step}, "
        f"{kind} {source}→{destination}, message {sequence}, plan {digest.hex()[:8]}"
    )


def mismatch(spec: EdgeSpec, got: str, needed: str) -> MessageMismatch:
    """The error for a header that is not the expected one; both in words."""
    return MessageMismatch(
        f"stage {spec.destination} (rank {spec.destination_rank}) received from stage {spec.source} "
        f"(rank {spec.source_rank}) another tensor than announced",
        got=got, needed=needed,
        fix="a stage must return the same shapes and dtypes for every micro-batch, and all ranks must run one plan",
    )  # fmt: skip
