"""Which of Triton and torch multiplies: the faster by a table measured on this GPU (``tuning``), or else by a guess.

A table is of operands without gaps. Where rows do not start at multiples of 16 bytes Triton's kernels are slower than
it says.

The guess knows published figures only, and is made such that Triton is not used where it might lose. It takes a
product's time from a roofline, and favours torch at every step:

    arithmetic    cuBLAS reaches CUBLAS_SHARE of the data sheet's peak, Triton TRITON_SHARE of cuBLAS
    cuBLAS        hides all memory traffic behind its arithmetic, or the other way round
    Triton        hides reading its operands only; what its epilogue reads and writes comes on top, and no launch takes
                  less than LAUNCH, which counts for Triton alone
    L2            serves torch what it has touched just before, if that fits, CACHE_SPEED times as fast as memory

What speaks for Triton is traffic that torch has more of: the weight gradient, read and written once per micro-batch
instead of once; dY, read once more for a bias gradient; [T, K] maps, for the kernels of an activation's gradient.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache, lru_cache
from typing import Literal

import torch

from pipex.backward.tuning import Gpu, Product, Table
from pipex.backward.tuning_files import find
from pipex.errors import headline

Provider = Literal["triton", "torch"]
TRITON: Provider = "triton"
TORCH: Provider = "torch"

# By torch's name of the GPU: TFLOP/s of dense 16-bit products and TB/s of memory, from NVIDIA's data sheets. On other
# GPUs nothing is guessed: before Hopper, and after it, these kernels copy their operands by slower means.
PEAKS = {
    "NVIDIA H100 80GB HBM3": (989, 3.35),
    "NVIDIA H100 NVL": (835, 3.9),
    "NVIDIA H100 PCIe": (756, 2.0),
    "NVIDIA H200": (989, 4.8),
}
# cuBLAS: 588 to 665 TFLOP/s in float16 with Triton's Gluon beside it at 0.92 to 1.02 of that (triton-lang/triton,
# python/tutorials/gluon/07-persistence.py, Hopper table); 750 to 786 in bfloat16 (NVIDIA/tilus, H200).
CUBLAS_SHARE = 0.6
TRITON_SHARE = 0.92
# Triton's launcher with tensor descriptors, on an H100's host in August 2025: 37.9 µs (triton-lang/triton, before a
# change that made it faster).
LAUNCH = 40e-6
# Bytes of Hopper's L2, from NVIDIA's H100 white paper. It names no bandwidth: this is meant to be more than it has.
CACHE = 50 << 20
CACHE_SPEED = 3
# By how much the guess must see Triton win.
MARGIN = 1.05
# kind -> [T, K] maps that torch's kernels after the product read and write, and that Triton's epilogue does. SwiGLU by
# torch: silu(gate) 2, times dh 3, dh times up 3, silu's gradient 3.
MAPS = {"dX": (0, 1), "dX+swiglu": (11, 4)}
ACTIVATION_MAPS = (3, 2)


@cache
def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU of this device; None where Triton's kernels cannot run: on a CPU, or without Triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


# Called for every product, so an answer is kept. The limit is for T that never repeats.
@lru_cache(maxsize=4096)
def provider(
    kind: str,
    shape: tuple[int, int, int],
    micro_batches: int,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    device: torch.device,
) -> Provider:
    """Who makes this product.

    Args:
        kind: "dW" or "dW+db"; "dX", or "dX+" and an activation.
        shape: T, N, K of one micro-batch: dY is [T, N], W [N, K].
        micro_batches: of a weight gradient; otherwise 1.
        dtype: of the operands.
        gradient_dtype: of the weight gradient; otherwise the operands'.
        device: where they are.
    """
    gpu = gpu_of(device)
    if gpu is None:
        return TORCH
    times = None
    if (table := _table(gpu)) is not None:
        names = (str(dtype).removeprefix("torch."), str(gradient_dtype).removeprefix("torch."))
        times = table.nearest(Product(kind, *shape, micro_batches, *names))
    if times is None:
        faster = guess(kind, shape, micro_batches, dtype, gradient_dtype, gpu)
    else:
        faster = TRITON if times.triton is not None and times.triton < times.torch else TORCH
    return TORCH if faster == TRITON and problem(device) is not None else faster


@cache
def problem(device: torch.device) -> str | None:
    """Why Triton, which is installed, cannot be used on a device; found by using it, once."""
    try:
        from pipex.triton_kernels.trial import trial

        reason = trial(device)
    except Exception as error:  # from Triton's own import
        reason = headline(error)
    if reason is not None:
        warnings.warn(f"Triton cannot be used, so torch makes all products: {reason}", RuntimeWarning, stacklevel=4)
    return reason


@cache
def _table(gpu: Gpu) -> Table | None:
    found = find(gpu)
    if found.ignored is not None:
        warnings.warn(f"a table of measured products is ignored: {found.ignored}", RuntimeWarning, stacklevel=4)
    return found.table


def explain() -> str:
    """How products are chosen on the current GPU, and why: for people."""
    if not torch.cuda.is_available():
        return f"torch: torch {torch.__version__} finds no GPU"
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = gpu_of(device)
    if gpu is None:
        return "torch: Triton is not installed (pip install 'pipex-torch[triton]')"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said here
        if (reason := problem(device)) is not None:
            return f"torch: Triton is installed and cannot be used: {reason}"
    found = find(gpu)
    ignored = "" if found.ignored is None else f"; ignored: {found.ignored}"
    if found.table is not None:
        how = f"Triton or torch by {len(found.table.entries)} products measured {found.table.date[:10]} ({found.file})"
        return f"{how}, others guessed{ignored}"
    how = "Triton or torch, guessed" if gpu.name in PEAKS else f"torch: nothing is known of {gpu.name}"
    return how + (ignored or "; run pipex tune to measure")


def guess(
    kind: str,
    shape: tuple[int, int, int],
    micro_batches: int,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    gpu: Gpu,
) -> Provider:
    """Who should be faster; torch where that is not clear, and for

    - float32 operands: the kernels do not round them to TF32, so they multiply without tensor cores;
    - rows that do not start at multiples of 16 bytes: then the kernels copy without descriptors.
    """
    tokens, n, k = shape
    if gpu.name not in PEAKS or dtype.itemsize != 2 or n % 8 or k % 8:
        return TORCH
    tera_flop, tera_byte = PEAKS[gpu.name]
    second = 1e-12 / tera_byte  # of a byte

    def again(nbytes: int) -> float:
        return nbytes * second / (CACHE_SPEED if nbytes <= CACHE else 1)

    arithmetic = 2 * tokens * n * k / (CUBLAS_SHARE * tera_flop * 1e12)
    if kind in ("dW", "dW+db"):
        operands = 2 * tokens * (n + k) * second
        size = n * k * gradient_dtype.itemsize
        gradient = 2 * size * second  # read and written
        by_torch = max(arithmetic, operands + gradient)
        by_torch += (micro_batches - 1) * max(arithmetic, operands + 2 * again(size))
        if kind == "dW+db":
            by_torch += micro_batches * again(2 * tokens * n)
        by_triton = micro_batches * max(arithmetic / TRITON_SHARE, operands) + gradient
    else:
        operands = 2 * n * (tokens + k) * second
        size = 2 * tokens * k  # of one map
        after, epilogue = MAPS.get(kind, ACTIVATION_MAPS)
        by_torch = max(arithmetic, operands + size * second) + after * again(size)
        by_triton = max(arithmetic / TRITON_SHARE, operands) + epilogue * size * second
    return TRITON if MARGIN * max(by_triton, LAUNCH) < by_torch else TORCH
