"""The simulated CUDA driver (tests/native/simulated_cuda): how it is built, and how a test calls it."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

from built import ROOT, compiled

NON_BLOCKING, WITHOUT_TIMING, LAZY_PEER_ACCESS, LEGACY_IPC_CAPABLE = 1, 2, 1, 10
INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE, NOT_READY, NOT_SUPPORTED = 1, 2, 201, 400, 600, 801
POISON = 0xA5
"""What every byte of new device memory is."""
BLOCK = 2 << 20
"""Memory that is exported is a multiple of it."""


def build() -> Path:
    sources = sorted((ROOT / "tests" / "native" / "simulated_cuda").glob("*.cpp"))
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wl,-z,nodelete"]
    return compiled([os.environ.get("CXX", "g++"), *flags, "-I", ROOT / "csrc"], sources, ".so")


class Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 64)]


class CallFailed(Exception):
    def __init__(self, function: str, result: int) -> None:
        super().__init__(f"{function} returned {result}")
        self.result = result


class Simulator:
    """One loaded copy of the simulator in this process, with its context current on this thread.

    Attributes of ``call`` are the driver's functions; integers are passed as 64 bits, and an error is raised.
    """

    def __init__(self, library: Path, *, settings: str = "") -> None:
        self.path = str(library)
        self.functions = ctypes.CDLL(self.path)
        self.holding_the_lock = ctypes.PyDLL(self.path)  # Python's, unlike the other
        for name in ("operations", "mismatches", "drawn", "mappings", "contexts", "violations", "waited"):
            getattr(self.functions, f"simulated_{name}").restype = ctypes.c_size_t
        for setting in filter(None, settings.split(",")):
            self.set(*setting.split("=", 1))

    def set(self, key: str, value: object) -> None:
        self.functions.simulated_set(key.encode(), str(value).encode())

    def call(self, function: str, *arguments: Any) -> None:
        converted = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments]
        if result := getattr(self.functions, function)(*converted):
            raise CallFailed(function, result)

    def start(self) -> None:
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxPushCurrent_v2", context)

    def stop(self) -> None:
        self.functions.simulated_stop()

    def forget(self) -> None:
        """Stops; whoever calls the driver next in this process is the first one."""
        self.stop()
        self.functions.simulated_forget()

    def _made(self, function: str, *arguments: Any) -> int:
        made = ctypes.c_uint64()
        self.call(function, ctypes.byref(made), *arguments)
        return made.value

    def allocate(self, size: int) -> int:
        return self._made("cuMemAlloc_v2", size)

    def stream(self, priority: int = 0, flags: int = NON_BLOCKING) -> int:
        return self._made("cuStreamCreateWithPriority", flags, ctypes.c_int(priority))

    def event(self) -> int:
        return self._made("cuEventCreate", WITHOUT_TIMING)

    def export(self, pointer: int) -> bytes:
        handle = Handle()
        self.call("cuIpcGetMemHandle", ctypes.byref(handle), pointer)
        return bytes(handle.bytes)

    def map(self, handle: bytes) -> int:
        return self._made("cuIpcOpenMemHandle_v2", Handle.from_buffer_copy(handle), LAZY_PEER_ACCESS)

    def wait(self, stream: int, flag: int, value: int) -> None:
        self.call("cuStreamWaitValue64_v2", stream, flag, value, 0)

    def write(self, stream: int, flag: int, value: int) -> None:
        self.call("cuStreamWriteValue64_v2", stream, flag, value, 0)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        self.call("cuMemcpyDtoDAsync_v2", to, source, size, stream)

    def is_device(self, address: int) -> bool:
        """Whether it is memory of this driver, rather than the host's own."""
        try:
            self.call("cuPointerGetAttribute", ctypes.byref(ctypes.c_int()), LEGACY_IPC_CAPABLE, address)
        except CallFailed:
            return False
        return True

    def fill(self, stream: int, to: int, words: int, message: int) -> None:
        self.call("simulated_fill", stream, to, words, message)

    def check(self, stream: int, source: int, words: int, message: int) -> None:
        self.call("simulated_check", stream, source, words, message)

    def capture(self, stream: int, on: bool) -> None:
        """As between the beginning and the end of a graph's capture."""
        self.call("simulated_capture", stream, int(on))

    def is_done(self, stream: int) -> bool:
        try:
            self.call("cuStreamQuery", stream)
        except CallFailed as error:
            if error.result != NOT_READY:
                raise
            return False
        return True

    def synchronize(self, stream: int) -> None:
        self.call("cuStreamSynchronize", stream)

    @property
    def operations(self) -> int:
        """How many have been enqueued."""
        return self.functions.simulated_operations()

    @property
    def mismatches(self) -> int:
        """Wrong words that ``check`` has seen."""
        return self.functions.simulated_mismatches()

    @property
    def drawn(self) -> int:
        """Sum of the numbers that its chance has given."""
        return self.functions.simulated_drawn()

    @property
    def mappings(self) -> int:
        """Allocations and mappings that are open."""
        return self.functions.simulated_mappings()

    @property
    def waited(self) -> int:
        """Where the word is that a stream which sends nothing was last told to wait for."""
        return self.functions.simulated_waited()

    @property
    def contexts(self) -> int:
        """Contexts on this thread's stack."""
        return self.functions.simulated_contexts()

    @property
    def violations(self) -> list[str]:
        """Misuses that a real driver answers with undefined behaviour."""
        text = ctypes.create_string_buffer(1 << 16)
        self.functions.simulated_violations(text, ctypes.c_size_t(len(text)))
        return text.value.decode().splitlines()


def word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def fresh_copy(library: Path, folder: Path) -> Path:
    """A copy that the loader takes for another library, so that its state is a new one."""
    return Path(shutil.copy(library, folder / f"simulated_cuda_{len(list(folder.iterdir()))}.so"))
