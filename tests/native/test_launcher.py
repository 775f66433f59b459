"""The launcher of compiled Triton kernels, against a driver that writes down what it is asked for."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from built import shared_library

from pipex.errors import CudaError, InputError, NativeUnavailable

_cuda = pytest.importorskip("pipex._cuda", reason="built without CUDA kernels")

INVALID_VALUE, NO_DEVICE, UNKNOWN_TO_THE_FAKE = 1, 100, 719
FP16, BF16 = 6, 9  # CUtensorMapDataType
CUBIN = b"\x7fELF and so on"
PRIMARY = 0x1000  # the fake's primary context


class Fake:
    """The fake driver, and one device on it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.functions = ctypes.CDLL(self.path)
        self.functions.fake_journal.restype = ctypes.c_char_p
        self.functions.fake_current.restype = ctypes.c_size_t

    def device(self, **options: Any) -> _cuda.Device:
        return _cuda.Device(0, library=self.path, **options)

    def kernel(
        self, parameters: list[Any], device: Any = None, *, shared: int = 0, fields: list[tuple[int, int]] | None = None
    ) -> _cuda.Kernel:
        """A kernel whose code has exactly these parameters, unless `fields` says otherwise."""
        fields = _cuda.parameter_layout(parameters) if fields is None else fields
        numbers = [number for field in fields for number in field]
        self.functions.fake_set_parameters((ctypes.c_size_t * len(numbers))(*numbers), len(fields))
        return _cuda.Kernel(device or self.device(), CUBIN, "work", 4, shared, parameters)

    def fail(self, function: str, result: int) -> None:
        self.functions.fake_fail(function.encode(), result)

    @property
    def journal(self) -> list[str]:
        return self.functions.fake_journal().decode().splitlines()

    def calls(self, function: str) -> list[str]:
        """The arguments of every call of a function."""
        return [line.partition(" ")[2] for line in self.journal if line.partition(" ")[0] == function]

    @property
    def parameter_bytes(self) -> bytes:
        buffer = ctypes.create_string_buffer(1 << 16)
        size = self.functions.fake_parameter_bytes(buffer, ctypes.c_size_t(len(buffer)))
        return buffer.raw[:size]


@pytest.fixture
def fake(private_copy: Callable[[Path], Path]) -> Fake:
    return Fake(private_copy(shared_library("tests/native/fake_libcuda.cpp")))


def matrix(element_type: int = BF16, box: tuple[int, ...] = (128, 64)) -> _cuda.Tile:
    return _cuda.Tile(element_type, 2, 3, box)


def test_a_launch_s_parameters_byte_for_byte(fake: Fake) -> None:
    tile = matrix()
    slab = _cuda.Tile(FP16, 2, 2, [1, 64, 32])
    kernel = fake.kernel(["i32", tile, "pointer", "f32", "i64", slab, "i32"])
    as_matrix, as_slab = (0x7F0000000100, 300, 64, 64, 1), (0x7F0000000400, 3, 500, 32, 16384, 32, 1)
    kernel.launch(1, 1, 1, 0, (-7, *as_matrix, 0x7F0000000200, 0.1, -(2**40), *as_slab, 9))
    gap = b"\xee"
    expected = struct.pack("<i", -7) + gap * 60
    expected += b"\x01" * 128 + struct.pack("<2i2q", 300, 64, 64, 1)
    expected += struct.pack("<Qf", 0x7F0000000200, 0.1) + gap * 4 + struct.pack("<q", -(2**40))
    expected += gap * 16 + b"\x02" * 128 + struct.pack("<3i", 3, 500, 32) + gap * 4 + struct.pack("<3q", 16384, 32, 1)
    expected += struct.pack("<i", 9) + gap * 4 + struct.pack("<2Q", 0, 0)
    assert fake.parameter_bytes == expected


def test_a_tensor_map_is_encoded_innermost_dimension_first(fake: Fake) -> None:
    kernel = fake.kernel([_cuda.Tile(FP16, 2, 2, [1, 64, 32]), _cuda.Tile(7, 4, 1, [256])])
    kernel.launch(1, 1, 1, 0, (0x4000, 3, 500, 40, 24000, 48, 1, 0x8000, 1000, 1))
    assert fake.calls("cuTensorMapEncodeTiled") == [
        "address=0x4000 type=6 sizes=40,500,3 strides=96,48000 box=32,64,1 every=1,1,1 "
        "interleave=0 swizzle=2 promotion=2 fill=0",
        "address=0x8000 type=7 sizes=1000 strides= box=256 every=1 interleave=0 swizzle=1 promotion=2 fill=0",
    ]


def test_grid_stream_block_and_shared_memory_are_passed_on(fake: Fake) -> None:
    fake.kernel(["i32"], shared=1234).launch(5, 6, 7, 0xABCD0, (1,))
    assert fake.calls("cuLaunchKernelEx") == ["grid=5,6,7 block=128,1,1 shared=1234 stream=0xabcd0 attributes=0"]
    assert fake.calls("cuModuleGetFunction") == ["work"]
    assert fake.calls("cuModuleLoadData") == ["\x7fELF"]


@pytest.mark.parametrize(
    ("shared", "asked"), [(0, []), (48 * 1024, []), (48 * 1024 + 1, ["8=49153"]), (232448, ["8=232448"])]
)
def test_more_than_48_kib_of_shared_memory_are_asked_for(fake: Fake, shared: int, asked: list[str]) -> None:
    fake.kernel(["i32"], shared=shared)
    assert fake.calls("cuFuncSetAttribute") == asked  # 8: MAX_DYNAMIC_SHARED_SIZE_BYTES


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_empty_grid_launches_nothing(fake: Fake, grid: tuple[int, int, int]) -> None:
    fake.kernel(["i32"]).launch(*grid, 0, (1,))
    assert fake.calls("cuLaunchKernelEx") == []


# ------------------------------------------------------------------------------------------------ the cache


def test_a_tensor_map_is_encoded_once(fake: Fake) -> None:
    device = fake.device()
    first, second = fake.kernel([matrix()], device), fake.kernel([matrix(), matrix()], device)
    view = (0x4000, 300, 64, 64, 1)
    first.launch(1, 1, 1, 0, view)
    launched = fake.parameter_bytes
    for _ in range(3):
        first.launch(1, 1, 1, 0, view)
        second.launch(1, 1, 1, 0, view + view)
    assert len(fake.calls("cuTensorMapEncodeTiled")) == device.encoded_tensor_maps == device.cached_tensor_maps == 1
    assert fake.parameter_bytes[:128] == launched[:128]


@pytest.mark.parametrize(
    ("tile", "view"),
    [
        (matrix(), (0x4010, 300, 64, 64, 1)),
        (matrix(), (0x4000, 301, 64, 64, 1)),
        (matrix(), (0x4000, 300, 56, 64, 1)),
        (matrix(), (0x4000, 300, 64, 72, 1)),
        (matrix(FP16), (0x4000, 300, 64, 64, 1)),
        (matrix(box=(64, 64)), (0x4000, 300, 64, 64, 1)),
        (_cuda.Tile(BF16, 2, 2, [128, 64]), (0x4000, 300, 64, 64, 1)),
    ],
)
def test_whatever_a_tensor_map_depends_on_makes_another(fake: Fake, tile: Any, view: tuple[int, ...]) -> None:
    device = fake.device()
    fake.kernel([matrix()], device).launch(1, 1, 1, 0, (0x4000, 300, 64, 64, 1))
    fake.kernel([tile], device).launch(1, 1, 1, 0, view)
    assert device.encoded_tensor_maps == 2
    assert fake.parameter_bytes[:128] == b"\x02" * 128


def test_the_cache_is_bounded_and_drops_the_longest_unused(fake: Fake) -> None:
    device = fake.device(tensor_maps=3)
    kernel = fake.kernel([matrix()], device)

    def encodes(address: int) -> bool:
        before = device.encoded_tensor_maps
        kernel.launch(1, 1, 1, 0, (address, 300, 64, 64, 1))
        return device.encoded_tensor_maps > before

    a, b, c, d = 0x1000, 0x2000, 0x3000, 0x4000
    assert [encodes(address) for address in (a, b, c, a)] == [True, True, True, False]
    assert encodes(d)  # in place of b
    assert [encodes(address) for address in (a, c, d)] == [False, False, False]
    assert encodes(b)
    for address in range(0x10000, 0x20000, 0x100):
        encodes(address)
    assert device.cached_tensor_maps == 3


def test_a_failed_encoding_is_not_remembered(fake: Fake) -> None:
    device = fake.device()
    kernel = fake.kernel([matrix()], device)
    fake.fail("cuTensorMapEncodeTiled", INVALID_VALUE)
    with pytest.raises(CudaError, match=r"cuTensorMapEncodeTiled \(shape \[300, 64\], .*CUDA_ERROR_INVALID_VALUE"):
        kernel.launch(1, 1, 1, 0, (0x4000, 300, 64, 64, 1))
    assert device.cached_tensor_maps == 0
    assert fake.calls("cuLaunchKernelEx") == []
    fake.fail("cuTensorMapEncodeTiled", 0)
    kernel.launch(1, 1, 1, 0, (0x4000, 300, 64, 64, 1))
    assert device.cached_tensor_maps == 1


# ------------------------------------------------------------------------------------------------ contexts


def test_the_caller_s_context_is_given_back(fake: Fake) -> None:
    for current in (0, PRIMARY, 0x5000):
        fake.functions.fake_make_current(ctypes.c_size_t(current))
        kernel = fake.kernel(["i32"])
        kernel.launch(1, 1, 1, 0, (1,))
        with pytest.raises(InputError):
            kernel.launch(1, 1, 1, 0, (2**31,))
        del kernel
        assert fake.functions.fake_current() == current


def test_a_launch_in_the_right_context_changes_nothing(fake: Fake) -> None:
    kernel = fake.kernel(["i32"])
    fake.functions.fake_make_current(ctypes.c_size_t(PRIMARY))
    before = len(fake.journal)
    kernel.launch(1, 1, 1, 0, (1,))
    assert [line.split()[0] for line in fake.journal[before:]] == ["cuLaunchKernelEx"]


def test_what_was_loaded_is_unloaded_before_its_context_goes(fake: Fake) -> None:
    kernel = fake.kernel(["i32"])  # holds the device
    del kernel
    assert [line for line in fake.journal if "Release" in line or "Unload" in line] == [
        "cuModuleUnload",
        "cuDevicePrimaryCtxRelease",
    ]


# -------------------------------------------------------------------------------------------------- errors


def test_without_a_driver_the_module_loads_and_says_what_is_missing() -> None:
    with pytest.raises(NativeUnavailable, match=r"no-such-libcuda.*install the NVIDIA driver"):
        _cuda.Device(0, library="/no-such-libcuda.so")


def test_a_library_that_is_no_driver_is_refused() -> None:
    with pytest.raises(NativeUnavailable, match=r"too old; got no cuInit; needed a driver for CUDA 12"):
        _cuda.Device(0, library="libm.so.6")


def test_a_driver_that_does_not_start_is_reported(fake: Fake) -> None:
    fake.fail("cuInit", NO_DEVICE)
    with pytest.raises(NativeUnavailable, match=r"cuInit: CUDA_ERROR_NO_DEVICE \(as the test wished\).*nvidia-smi"):
        fake.device()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("cuDeviceGet", "cuDeviceGet of GPU 0"),
        ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain of GPU 0"),
        ("cuModuleLoadData", "cuModuleLoadData of kernel work"),
        ("cuModuleGetFunction", "cuModuleGetFunction of kernel work"),
        ("cuFuncSetAttribute", "cuFuncSetAttribute of kernel work, 100000 bytes of shared memory"),
    ],
)
def test_a_failed_call_is_named(fake: Fake, function: str, text: str) -> None:
    fake.fail(function, INVALID_VALUE)
    with pytest.raises(CudaError, match=rf"^{text}: CUDA_ERROR_INVALID_VALUE \(as the test wished\)$"):
        fake.kernel(["i32"], shared=100_000)
    assert len(fake.calls("cuModuleUnload")) == (function in {"cuModuleGetFunction", "cuFuncSetAttribute"})


def test_a_failed_launch_names_kernel_and_grid(fake: Fake) -> None:
    kernel = fake.kernel(["i32"])
    fake.fail("cuLaunchKernelEx", UNKNOWN_TO_THE_FAKE)
    with pytest.raises(CudaError, match=r"kernel work, grid 2 x 3 x 4, 4 warps: error 719, unknown to the driver"):
        kernel.launch(2, 3, 4, 0, (1,))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ([(0, 8), (8, 8), (16, 8)], "parameter 0; got 4 bytes at 0; needed 8 bytes at 0"),
        ([(0, 4), (8, 8)], "parameter 2; got 8 bytes at 16; needed none"),
        ([(0, 4), (8, 8), (16, 8), (24, 8)], "parameter 3; got none; needed 8 bytes at 24"),
    ],
)
def test_code_with_other_parameters_is_refused(fake: Fake, fields: list[tuple[int, int]], text: str) -> None:
    with pytest.raises(InputError, match=text):
        fake.kernel(["i32"], fields=fields)
    assert fake.calls("cuModuleUnload") == [""]


@pytest.mark.parametrize(
    ("view", "needed"),
    [
        ((0, 300, 64, 64, 1), "an address that is a multiple of 16"),
        ((0x4008, 300, 64, 64, 1), "an address that is a multiple of 16"),
        ((0x4000, 0, 64, 64, 1), "sizes of 1 or more"),
        ((0x4000, 300, 64, 1, 64), "a last dimension of stride 1"),
        ((0x4000, 300, 60, 60, 1), "strides of a multiple of 16 bytes"),
    ],
)
def test_a_tensor_that_tma_cannot_see_is_refused(fake: Fake, view: tuple[int, ...], needed: str) -> None:
    kernel = fake.kernel([matrix()])
    with pytest.raises(InputError, match=needed):
        kernel.launch(1, 1, 1, 0, view)
    assert fake.calls("cuTensorMapEncodeTiled") == fake.calls("cuLaunchKernelEx") == []


def test_values_that_do_not_fit_are_refused(fake: Fake) -> None:
    kernel = fake.kernel(["i32", "f32"])
    with pytest.raises(InputError, match=r"value 0 of a launch .* got 2147483648"):
        kernel.launch(1, 1, 1, 0, (2**31, 1.0))
    with pytest.raises(TypeError, match="takes 2 values, not 1"):
        kernel.launch(1, 1, 1, 0, (1,))
    with pytest.raises(TypeError):
        kernel.launch(1, 1, 1, 0, ("1", 1.0))
    with pytest.raises(TypeError):
        kernel.launch(1, 1, 1, 0, (1, "1"))
    with pytest.raises(InputError, match="cannot have this grid; got -1"):
        kernel.launch(-1, 1, 1, 0, (1, 1.0))
    assert fake.calls("cuLaunchKernelEx") == []


def test_what_no_kernel_can_be_is_refused(fake: Fake) -> None:
    device = fake.device()
    with pytest.raises(InputError, match="number of warps; got 0"):
        _cuda.Kernel(device, CUBIN, "work", 0, 0, [])
    with pytest.raises(InputError, match="has no code"):
        _cuda.Kernel(device, b"", "work", 4, 0, [])
    with pytest.raises(InputError, match="kind; got f64"):
        _cuda.Kernel(device, CUBIN, "work", 4, 0, ["f64"])
    with pytest.raises(InputError, match="needed 32764 or fewer"):
        _cuda.Kernel(device, CUBIN, "work", 4, 0, [matrix()] * 200)
    with pytest.raises(InputError, match="6 dimensions"):
        _cuda.Tile(BF16, 2, 3, [1] * 6)
    with pytest.raises(InputError, match="swizzle 9"):
        _cuda.Tile(BF16, 2, 9, [64, 64])
    with pytest.raises(InputError, match="capacity 0"):
        fake.device(tensor_maps=0)
