"""``pipex tune``: measures which of Triton and torch makes a product faster on this GPU, and keeps it in a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipex.bench.options import add_rounds, rounds_of
from pipex.bench.products import WEIGHTS, Case, add_products, products_of

if TYPE_CHECKING:
    from pipex.backward.tuning import Conditions, Gpu, Product, Times
    from pipex.bench.report import Row

EPILOG = """\
Every result is compared with float64 first; where Triton's is wrong, torch is used, however long it takes. wins_by
says how many times faster the winner is, by the longer of the GPU's time and the host's to enqueue it. What is
measured is added to this user's table for this GPU; `pipex info` says where that is.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = EPILOG
    add_products(parser)
    add_rounds(parser, samples=15)
    parser.add_argument("--output", metavar="FILE", help="a table to write instead of the user's")


def run(options: argparse.Namespace) -> int:
    """Measures and writes; returns the exit code: 1 after a wrong result."""
    rounds, chosen = rounds_of(options), products_of(options)
    from pipex.backward.choice import gpu_of
    from pipex.backward.tuning import Conditions
    from pipex.backward.tuning_files import update
    from pipex.bench import gemm, gpu
    from pipex.bench.environment import environment
    from pipex.bench.report import failures, say

    device = gpu.require_gpu("pipex tune")
    gemm.require_triton()
    this = gpu_of(device)
    assert this is not None
    conditions, facts = Conditions.here(this), gpu.describe_gpu(device)
    file = _user_file(this) if options.output is None else _output(options.output, conditions)
    keep = partial(update, file, conditions, facts["driver_version"], private=options.output is None)
    table = keep({})  # what cannot be written is found out before anything is measured
    clock = gpu.Clock(device)
    ceilings = clock.ceilings(gemm.dtype_of(chosen[0].dtype), rounds)
    rows, lines = [], []
    for case in chosen:
        measured = gemm.measure([case], rounds, clock, ceilings)
        found = _times(measured)
        if found is not None:
            table = keep({_product(case): found})  # at once: the run may be interrupted
        rows += measured
        lines += [row.as_json() | {"wins_by": _wins_by(found, row.provider)} for row in measured]
    header = environment(1) | gemm.triton_version() | facts | {"table": f"{file}, {len(table.entries)} products"}
    return say(header, lines, failures(rows, []), as_json=options.json, command="pipex tune")


def _user_file(gpu: Gpu) -> Path:
    from pipex.backward.tuning_files import user_file
    from pipex.errors import InputError

    file = user_file(gpu)
    if file is None:
        raise InputError(
            "no place for this user's table", got="no home directory", fix="set HOME, or give --output FILE"
        )
    return file


def _output(path: str, conditions: Conditions) -> Path:
    """
    Raises:
        InputError: there is something that is no table to add to.
    """
    from pipex.backward.tuning_files import read
    from pipex.errors import InputError

    try:
        read(Path(path), conditions, private=False)
    except (InputError, OSError) as error:
        raise InputError(
            f"--output {path} cannot be added to", got=error, fix="remove it or choose another name"
        ) from None
    return Path(path)


def _product(case: Case) -> Product:
    from pipex.backward.tuning import Product

    gradient = case.gradient_dtype if case.kind in WEIGHTS else case.dtype
    return Product(case.kind, case.tokens, case.n, case.k, case.micro_batches, case.dtype, gradient)


def _times(rows: Sequence[Row]) -> Times | None:
    """What is entered; None where torch's own result was wrong."""
    from pipex.backward.tuning import Times
    from pipex.bench.gemm import PEER, PROVIDER

    taken = {row.provider: max(row.time.p50, row.figures["host_us"] or 0.0) for row in rows if row.correct}
    return Times(taken.get(PROVIDER), taken[PEER]) if PEER in taken else None


def _wins_by(times: Times | None, provider: str) -> float | None:
    """How many times faster than the other this provider is; None for one that is not, or where one was wrong."""
    from pipex.bench.gemm import PEER, PROVIDER

    if times is None or times.triton is None or provider not in (PROVIDER, PEER):
        return None
    factor = times.torch / times.triton if provider == PROVIDER else times.triton / times.torch
    return float(f"{factor:.5g}") if factor > 1 else None
