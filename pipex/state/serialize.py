"""The safetensors format, written as a stream.

    offset  bytes  content
         0      8  N, little-endian
         8      N  JSON: {name: {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ..}, padded with spaces
       8+N         the tensors' bytes, in the order of their offsets, without holes

The safetensors package writes only what numpy can see, which torch does not bring along, and all of it before a
checksum can be taken. Reading is left to the package. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import ctypes
import json
import os
import zlib
from collections.abc import Mapping
from functools import cache
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipex.errors import CheckpointError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
"""What the package reads back; an older one lacks some. F8_E8M0 and F4 are not here, since 0.8.0 writes them, but its
``load_file`` does not read them."""


def form(tensor: Tensor) -> str:
    """Dtype and shape as text, such as ``float32[8, 64]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


class Serialized:
    """Tensors on their way into a file. ``size``: the bytes that ``write`` will write."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Raises:
            CheckpointError: a tensor is sparse, has no data, or is of a dtype that could not be read back; named.
                Or this process cannot try whether one can be read back.
        """
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.is_meta or not _is_read_back(tensor.dtype):
                readable = [str(dtype).removeprefix("torch.") for dtype in DTYPES if _is_read_back(dtype)]
                raise CheckpointError(
                    f"the tensor {name} cannot be saved",
                    got=f"{form(tensor)}, {tensor.layout}, on {tensor.device}",
                    needed=f"a dense tensor of one of {', '.join(readable)}",
                    fix="save its bytes: tensor.view(torch.uint8)" if tensor.layout == torch.strided else None,
                )
        # Large elements first: then every tensor is aligned to its element size, as readers that map the file need it.
        self._tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
        self._header = self._make_header()
        self.size = len(self._header) + sum(tensor.nbytes for tensor in self._tensors.values())

    def write(self, file: BinaryIO) -> int:
        """Writes everything, one tensor at a time (so one tensor is copied to the host at a time), and returns the
        CRC-32 of what was written: the fastest checksum of the standard library (measured: 2.0 GiB/s, sha256 1.0),
        and any damage within 32 neighbouring bits is certain to change it."""
        file.write(self._header)
        checksum = zlib.crc32(self._header)
        for tensor in self._tensors.values():
            if tensor.nbytes:
                # What .imag and .conj() return are views that leave the negation to the reader.
                host = tensor.detach().cpu().resolve_neg().resolve_conj().contiguous()
                data = (ctypes.c_ubyte * host.nbytes).from_address(host.data_ptr())
                file.write(data)
                checksum = zlib.crc32(data, checksum)
        return checksum

    def _make_header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in self._tensors.items():
            begin, end = end, end + tensor.nbytes
            entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


@cache  # what is told, not what is raised: a failure to ask says nothing of the dtype
def _is_read_back(dtype: torch.dtype) -> bool:
    if dtype not in DTYPES:
        return False
    data = bytes(range(1, 1 + dtype.itemsize))
    header = json.dumps({"a": {"dtype": DTYPES[dtype], "shape": [1], "data_offsets": [0, len(data)]}}).encode()
    try:
        with open(os.memfd_create("pipex"), "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header + data)
            file.flush()
            with safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt", device="cpu") as opened:
                read = opened.get_tensor("a")
    except (SafetensorError, AttributeError):  # a dtype that the package, or this torch, does not know
        return False
    except (OSError, RuntimeError) as error:  # the latter from torch, which opens the file once more
        raise CheckpointError(
            f"cannot try whether a tensor of {dtype} can be read back", got=str(error),
            needed="/proc, and three more file descriptors", fix="raise their limit (ulimit -n)",
        ) from error  # fmt: skip
    return read.dtype == dtype and bytes(read.view(torch.uint8).tolist()) == data
