"""The CUDA part of pipex (csrc/cuda). Built for the GPUs that PIPEX_CUDA says; loads without a driver.

Addresses and streams are integers (``tensor.data_ptr()``, ``torch.cuda.current_stream().cuda_stream``). Whoever calls
keeps the memory alive until the stream has passed the call. Raises errors of pipex.errors: NativeUnavailable where
there is no driver or GPU, InputError for arguments that do not fit (before anything is enqueued), CudaError where a
call of CUDA fails.
"""

from collections.abc import Sequence

toolkit: str
"""Version of the toolkit it was built with, such as ``13.0``."""

architectures: str
"""Targets it was built for, separated by commas."""

def device_count() -> int:
    """Number of GPUs. Raises NativeUnavailable where there is no driver or no GPU."""

# ------------------------------------------------------------------- kernels that were compiled by Triton

class Tile:
    """A tensor descriptor among a kernel's parameters: what the kernel was compiled for."""

    def __init__(self, element_type: int, element_bytes: int, swizzle: int, box: Sequence[int]) -> None:
        """``element_type`` and ``swizzle`` are CUtensorMapDataType and CUtensorMapSwizzle, ``box`` the tile that one
        copy moves, outermost dimension first (1 to 5 dimensions)."""

def parameter_layout(parameters: Sequence[str | Tile]) -> list[tuple[int, int]]:
    """Offset and size of every entry of the parameter list of a kernel that Triton compiled with this signature:
    ``"pointer"``, ``"i32"``, ``"i64"``, ``"f32"`` or a Tile each."""

class Device:
    """One GPU: its driver, its primary context (torch's own), and the tensor maps that its kernels have needed."""

    def __init__(self, ordinal: int, library: str = "libcuda.so.1", tensor_maps: int = 4096) -> None:
        """``library`` is the driver's. At most ``tensor_maps`` (about 0.5 KiB each) are kept, the latest used."""

    @property
    def cached_tensor_maps(self) -> int:
        """How many are kept now."""

    @property
    def encoded_tensor_maps(self) -> int:
        """How many were made since the start; the others came from the cache."""

class Kernel:
    """A kernel loaded on one device. ``triton_kernels.compiled`` makes one from what ``triton.compile`` returns."""

    def __init__(
        self,
        device: Device,
        cubin: bytes,
        name: str,
        warps: int,
        shared_bytes: int,
        parameters: Sequence[str | Tile],
    ) -> None:
        """Raises InputError where the code has another parameter list than ``parameters`` give (drivers before
        CUDA 12.4 cannot tell)."""

    def launch(self, grid_x: int, grid_y: int, grid_z: int, stream: int, values: tuple[int | float, ...]) -> None:
        """Enqueue one launch. ``values`` are those of the parameters in order; a Tile of rank r takes 1 + 2 r of them:
        address, r sizes, r strides in elements. An empty grid launches nothing."""

# ----------------------------------------------------------- gradients that are sums over micro-batches

# Number types are "float32", "float16" or "bfloat16". Parts are address and rows of the contiguous matrix of each
# micro-batch, in rising order, at most 128.

def bias_gradient_workspace(rows: int, columns: int) -> int:
    """Bytes of workspace for ``rows`` rows in all."""

def add_bias_gradient(
    parts: Sequence[tuple[int, int]],
    number_type: str,
    columns: int,
    gradient: int,
    gradient_type: str,
    workspace: int,
    workspace_bytes: int,
    stream: int,
) -> None:
    """gradient [columns] += sum over the rows of all parts [rows, columns].

    ``gradient_type`` is float32 or ``number_type``. Here and below sums are made in fp32, in an order that depends on
    sizes only, and rounded once: the same bits run after run.
    """

def add_norm_gradient(
    parts: Sequence[tuple[int, int]], columns: int, gradient: int, gradient_type: str, stream: int
) -> None:
    """gradient [columns] += sum over the rows of all parts [rows, columns] of float32 partial sums."""

def embedding_gradient_workspace(rows: int, columns: int) -> int:
    """Bytes of workspace for ``rows`` tokens in all."""

def add_embedding_gradient(
    parts: Sequence[tuple[int, int]],
    number_type: str,
    columns: int,
    ids: int,
    order: int,
    gradient: int,
    gradient_type: str,
    vocabulary: int,
    padding: int,
    workspace: int,
    workspace_bytes: int,
    stream: int,
) -> None:
    """gradient [vocabulary, columns]: row ``id`` += sum of the rows of all parts whose token is ``id``.

    ``ids`` (int64, on the GPU) are the tokens' ids, sorted; ``order[i]`` (int64) is the row, counted through all parts,
    that belongs to ``ids[i]``. Sort stably for a fixed order. ``padding`` is an id without gradient, or -1.
    """

def add_to_main_gradient(gradient: int, number_type: str, main: int, count: int, stream: int) -> None:
    """main [count] (float32) += gradient [count]."""

def cast_main_gradient(main: int, gradient: int, number_type: str, count: int, stream: int) -> None:
    """gradient [count] = main [count] (float32), rounded to nearest."""
