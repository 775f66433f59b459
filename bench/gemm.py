"""The matrix products of the backward of a linear layer y = x·Wᵀ, on a GPU.

    pipex         the Triton kernels: activation gradients in the product's epilogue, and all micro-batches of a weight
                  gradient in one launch
    cublas        torch.mm and torch.addmm; activation gradients by torch's kernels after it, one product with beta = 1
                  per micro-batch
    cublas-slab   the same, with all micro-batches in one product, which a weight gradient allows where they happen to
                  lie side by side

Times are the GPU's (see ``gpu``), with operands that are not in its caches. ``tflop_per_s`` and ``gb_per_s`` count what
the case needs at least: each operand read once, each result written once, however often a provider does it.
``flop_share`` and ``copy_share`` are these over the ceilings of the same run, one large product and one large copy.
``host_us`` is what the host needs to enqueue it.

Results are compared with float64 first. torch's own error is the measure: ours may be at most twice as large (plus
1e-6). cuBLAS's results must be within ``SANE`` of the largest element.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipex.backward.products import add_by_torch, input_gradient_by_torch, swiglu_input_gradient_by_torch
from pipex.bench import gpu
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.environment import environment
from pipex.bench.options import add_common, floors_of, rounds_of
from pipex.bench.products import ACTIVATIONS, WEIGHTS, Case, add_products, products_of
from pipex.bench.report import Row, finish, say
from pipex.errors import NativeUnavailable

PROVIDER, PEER, SLAB = "pipex", "cublas", "cublas-slab"
SANE = 2.0**-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``pipex bench gemm``."""
    parser.description = (
        "The matrix products of the backward on a GPU: pipex's Triton kernels and cuBLAS through torch. Measured are "
        "all combinations of the sizes."
    )
    add_products(parser)
    add_common(parser, samples=15, floor="how many times faster than cublas, such as dW/4096x4096/512x8=1.15")
    parser.add_argument("--compile-only", action="store_true",
                        help="compile the kernels and print what they cost; needs no GPU; exit 1 on a "
                        "spill")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measures, or compiles, and reports; returns the exit code."""
    rounds, chosen = rounds_of(options), products_of(options)
    floors = floors_of(options, PROVIDER, [case.name for case in chosen])
    if options.compile_only:
        require_triton()
        lines = compiled_lines()
        sentences = [f"{line['case']}: spills, or does not fit its GPU" for line in lines if not line["correct"]]
        return say(environment(1) | triton_version(), lines, sentences, as_json=options.json)
    device = gpu.require_gpu("pipex bench gemm", "--compile-only says what the kernels cost without one")
    require_triton()
    clock = gpu.Clock(device)
    ceilings = clock.ceilings(dtype_of(chosen[0].dtype), rounds)
    rows = measure(chosen, rounds, clock, ceilings)
    found = {"ceiling_tflop_per_s": round(ceilings[0], 1), "ceiling_gb_per_s": round(ceilings[1], 1)}
    facts = triton_version() | gpu.describe_gpu(device) | found
    return finish(environment(1) | facts, rows, floors, as_json=options.json)


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a product's."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def require_triton() -> None:
    """
    Raises:
        NativeUnavailable: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise NativeUnavailable(
            "Triton, which compiles these kernels, is not installed",
            needed="Triton 3.6 or newer",
            fix="pip install 'pipex-torch[triton]'",
        )


def triton_version() -> dict[str, str]:
    """For the header of a report."""
    return {"triton": importlib.metadata.version("triton")}


def measure(chosen: Sequence[Case], rounds: Rounds, clock: gpu.Clock, ceilings: tuple[float, float]) -> list[Row]:
    """Two rows per case, or three for a weight gradient of several micro-batches."""
    return [row for case in chosen for row in _measure_case(case, rounds, clock, ceilings)]


def _measure_case(case: Case, rounds: Rounds, clock: gpu.Clock, ceilings: tuple[float, float]) -> list[Row]:
    torch.manual_seed(0)
    product = (_WeightGradient if case.kind in WEIGHTS else _InputGradient)(case, clock.device)
    providers = product.providers
    correct = _correct(product)
    samples = rounds.interleave({name: partial(clock.sample, call) for name, call in providers.items()})
    times = {name: quantiles(taken) for name, taken in samples.items()}
    rows = []
    for name, time in times.items():
        tflop_per_s, gb_per_s = case.flop / time.p50 / 1e6, case.nbytes / time.p50 / 1e3
        figures = {
            "tflop_per_s": tflop_per_s,
            "gb_per_s": gb_per_s,
            "flop_share": tflop_per_s / ceilings[0],
            "copy_share": gb_per_s / ceilings[1],
            "host_us": clock.host_us(providers[name]),
        }
        size: dict[str, int | list[int]] = {"shape": [case.tokens, case.n, case.k], "micro_batches": case.micro_batches}
        rows.append(Row(case.name, name, size, time, times[PEER].p50 / time.p50, correct[name], figures))
    return rows


def _correct(product: _InputGradient | _WeightGradient) -> dict[str, bool]:
    exact = product.exact()
    errors: dict[str, list[float]] = {}
    for name, call in product.providers.items():
        product.reset()
        call()
        # A comparison with NaN is false, so no result with one in it passes.
        errors[name] = [float((r.double() - e).abs().max()) for r, e in zip(product.results(), exact, strict=True)]
    sane = [SANE * float(e.abs().max()) for e in exact]
    limits = dict.fromkeys(errors, sane) | {PROVIDER: [2 * error + 1e-6 for error in errors[PEER]]}
    return {
        name: all(error <= limit for error, limit in zip(found, limits[name], strict=True))
        for name, found in errors.items()
    }


def _normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Never zeros: what a GPU does in a second depends on how many bits change."""
    return torch.randn(shape, dtype=dtype, device=device)


class _InputGradient:
    """dX = dY·W, with the gradient of an activation."""

    def __init__(self, case: Case, device: torch.device) -> None:
        from pipex.triton_kernels import input_gradient as kernels

        dtype = dtype_of(case.dtype)
        normal = partial(_normal, dtype=dtype, device=device)
        self._kernels, self._activation = kernels, ACTIVATIONS[case.kind]
        self._dy, self._weight = normal(case.tokens, case.n), normal(case.n, case.k)
        self._weight /= case.n**0.5  # as trained weights do, it keeps the size of a gradient
        self._saved = [normal(case.tokens, case.k) for _ in range({"dX": 0, "dX+swiglu": 2}.get(case.kind, 1))]
        self._out = [torch.empty(case.tokens, case.k, dtype=dtype, device=device) for _ in self._saved or (0,)]
        self.providers: dict[str, Callable[[], object]] = {PROVIDER: self._pipex, PEER: self._cublas}

    def reset(self) -> None:
        for out in self._out:
            out.fill_(torch.nan)

    def results(self) -> list[Tensor]:
        return self._out

    def exact(self) -> list[Tensor]:
        dy, weight, saved = self._dy.double(), self._weight.double(), [t.double() for t in self._saved]
        if self._activation == "swiglu":
            return list(self._kernels.swiglu_input_gradient_reference(dy, weight, *saved))
        z = saved[0] if saved else None
        return [self._kernels.input_gradient_reference(dy, weight, activation=self._activation, z=z)]

    def _pipex(self) -> None:
        if self._activation == "swiglu":
            gate, up = self._saved
            self._kernels.swiglu_input_gradient(self._dy, self._weight, gate, up, out=(self._out[0], self._out[1]))
        else:
            z = self._saved[0] if self._saved else None
            self._kernels.input_gradient(self._dy, self._weight, activation=self._activation, z=z, out=self._out[0])

    def _cublas(self) -> None:
        if self._activation == "swiglu":
            gate, up = self._saved
            swiglu_input_gradient_by_torch(self._dy, self._weight, gate, up, out=(self._out[0], self._out[1]))
        else:
            z = self._saved[0] if self._saved else None
            input_gradient_by_torch(self._dy, self._weight, activation=self._activation, z=z, out=self._out[0])


class _WeightGradient:
    """dW += Σ dYᵀ·X, with the bias gradient or without."""

    def __init__(self, case: Case, device: torch.device) -> None:
        from pipex.triton_kernels.weight_gradient import weight_gradient

        count, rows = case.micro_batches, case.tokens
        self._kernel = weight_gradient
        slabs = [_normal(count, rows, width, dtype=dtype_of(case.dtype), device=device) for width in (case.n, case.k)]
        self._dys, self._xs = (list(slab) for slab in slabs)
        self._all_dy, self._all_x = (slab.flatten(0, 1) for slab in slabs)
        normal = partial(_normal, dtype=dtype_of(case.gradient_dtype), device=device)
        self._start = [normal(case.n, case.k), normal(case.n)][: 1 + (case.kind == "dW+db")]
        self._gradients = [start.clone() for start in self._start]
        self.providers: dict[str, Callable[[], object]] = {PROVIDER: self._pipex, PEER: self._cublas}
        if count > 1:
            self.providers[SLAB] = self._cublas_slab

    def reset(self) -> None:
        for gradient, start in zip(self._gradients, self._start, strict=True):
            gradient.copy_(start)

    def results(self) -> list[Tensor]:
        return self._gradients

    def exact(self) -> list[Tensor]:
        exact = [start.double() for start in self._start]
        for dy, x in zip(self._dys, self._xs, strict=True):  # one after the other: in float64 they take much memory
            add_by_torch([dy.double()], [x.double()], *self._pair(exact))
        return exact

    def _pipex(self) -> None:
        self._kernel(self._dys, self._xs, *self._pair(self._gradients))

    def _cublas(self) -> None:
        add_by_torch(self._dys, self._xs, *self._pair(self._gradients))

    def _cublas_slab(self) -> None:
        add_by_torch([self._all_dy], [self._all_x], *self._pair(self._gradients))

    @staticmethod
    def _pair(gradients: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return gradients[0], gradients[1] if len(gradients) > 1 else None


def compiled_lines() -> list[dict[str, Any]]:
    """What every variant of the kernels costs, found by compiling it; no GPU is needed.

    ``correct`` says that it neither spills nor asks for more shared memory than a block may have.
    """
    from pipex.triton_kernels.resources import resources

    return [
        {
            "case": f"{row.variant}, sm_{row.capability}",
            "provider": PROVIDER,
            "registers": row.registers,
            "shared": row.shared,
            "shared_limit": row.shared_limit,
            "spills": row.spills,
            "stack": row.stack,
            "wgmma": row.wgmma,
            "mma": row.mma,
            "correct": row.spills == row.stack == 0 and row.shared <= row.shared_limit,
        }
        for row in resources()
    ]
