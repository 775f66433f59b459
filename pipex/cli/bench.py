"""``pipex bench``: measures pipex beside its peers, in the same run, on this machine."""

from __future__ import annotations

import argparse
import importlib

# name -> (module with add_arguments(parser) and run(options) -> exit code, one line of help)
BENCHES = {
    "p2p": (
        "pipex.bench.p2p",
        "half a round trip between two ranks: pipex's transports, torch.distributed, a plain copy",
    ),
    "step": ("pipex.bench.step", "a training step of a two-rank pipeline: pipex, torch.distributed.pipelining"),
    "pipeline": (
        "pipex.bench.pipeline",
        "a training step of a transformer, schedule beside schedule: measured and simulated",
    ),
    "overlap": (
        "pipex.bench.overlap",
        "how much of a step is communication that computing does not hide: pipex, torch.distributed.pipelining",
    ),
    "pairs": (
        "pipex.bench.pairs",
        "fused pairs of dualpipev or dualpipe: both parts at once, one after the other",
    ),
    "drop-in": (
        "pipex.bench.drop_in",
        "a training step of torch.distributed.pipelining, with and without pipex.drop_in()",
    ),
    "hugging-face": (
        "pipex.bench.hugging_face",
        "a training step of a Hugging Face model: pipex, torch.distributed.pipelining's pipeline()",
    ),
    "backward": (
        "pipex.bench.backward",
        "the split backward of one stage: pipex, torch's split, one whole backward",
    ),
    "gemm": ("pipex.bench.gemm", "the matrix products of the backward on a GPU: pipex (Triton), cublas"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the benchmarks."""
    benches = parser.add_subparsers(dest="bench", metavar="|".join(BENCHES), required=True)
    for name, (module, text) in BENCHES.items():
        benches.add_parser(name, help=text, module=module)


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns its exit code: 1 after a wrong result or a missed floor."""
    return int(importlib.import_module(BENCHES[options.bench][0]).run(options))
