"""``pipex bench``: measures pipex beside its peers, in the same run, on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pipex.bench.driver import Rounds
    from pipex.bench.gemm import Case
    from pipex.bench.report import Floor, Row

# Case names are known before anything is measured, so a floor for an unknown one is refused at once.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    benches = parser.add_subparsers(
        dest="bench", metavar="p2p|step|pipeline|overlap|drop-in|backward|gemm", required=True
    )
    p2p = benches.add_parser(
        "p2p", help="half a round trip between two ranks: pipex's transports, torch.distributed, a plain copy",
        description="Half a round trip between two ranks, by one of pipex's transports, by torch.distributed's Gloo or "
        "NCCL, and a plain copy in one process.",
    )  # fmt: skip
    p2p.add_argument("--transport", choices=("host", "device", "gloo", "nccl"), default="host",
                     help="host: shared memory; device: the GPUs'; gloo, nccl: pipex over torch.distributed's "
                     "backends; device and nccl need a GPU, nccl two (default: host)")  # fmt: skip
    p2p.add_argument("--bidirectional", action="store_true", help="both ranks send at the same time")
    p2p.add_argument("--virtual-devices", action="store_true",
                     help="ranks that share a GPU compute at once, with an equal share of it each")  # fmt: skip
    p2p.add_argument("-b", "--minbytes", dest="b", metavar="SIZE", default="4K",
                     help="smallest message: bytes, or with K, M, G (default: 4K)")  # fmt: skip
    p2p.add_argument("-e", "--maxbytes", dest="e", metavar="SIZE", default="64M", help="largest (default: 64M)")
    p2p.add_argument("-f", "--stepfactor", dest="f", metavar="FACTOR", type=int,
                     help="from one size to the next (default: 4)")  # fmt: skip
    p2p.add_argument("-i", "--stepbytes", dest="i", metavar="SIZE",
                     help="from one size to the next, in place of a factor")  # fmt: skip
    _add_common(p2p, samples=50, floor="how many times faster than torch pipex must be, such as 4K=20,256K=8")
    p2p.add_argument("--min-copy-share", metavar="CASE=SHARE,...",
                     help="bandwidth over the copy's that pipex must reach, such as 4M=0.75")  # fmt: skip
    p2p.add_argument("--max-us", dest="max_p50_us", metavar="CASE=US,...",
                     help="most microseconds that a message may take in the median, such as 64K=10")  # fmt: skip
    p2p.add_argument("--max-send-us", metavar="CASE=US,...",
                     help="most microseconds that the host may need for a send, such as 64K=5")  # fmt: skip
    p2p.add_argument("--max-sms", metavar="CASE=COUNT,...",
                     help="most multiprocessors that pipex's kernels may take, such as 64M=0")  # fmt: skip
    p2p.add_argument("--max-gemm-slowdown", metavar="CASE=SHARE,...",
                     help="most by which messages may slow a matrix product, such as 64M=0.03; of ranks that share a "
                     "GPU it is measured with --virtual-devices only")  # fmt: skip

    step = benches.add_parser(
        "step", help="a training step of a two-rank pipeline: pipex, torch.distributed.pipelining",
        description="A training step of a two-rank pipeline: pipex and torch.distributed.pipelining (Gloo).",
    )  # fmt: skip
    step.add_argument("--schedules", default="gpipe,1f1b", help="of gpipe and 1f1b (default: both)")
    step.add_argument("--shapes", metavar="WIDTHxBATCH,...", default="64x4,1024x64",
                      help="width of the layers and samples per micro-batch (default: 64x4,1024x64)")  # fmt: skip
    step.add_argument("-m", metavar="COUNT", type=int, default=16, help="micro-batches per step (default: 16)")
    _add_common(step, samples=20, floor="how many times faster than torch's a step must be, such as 1f1b/1024x64=1")
    step.add_argument("--min-overhead-ratio", metavar="CASE=RATIO,...",
                      help="torch's overhead per action over pipex's, such as 1f1b/64x4=5")  # fmt: skip

    pipeline = benches.add_parser(
        "pipeline", help="a training step of a transformer, schedule beside schedule: measured and simulated",
        description="Whole training steps of a transformer, schedule beside schedule, each with pipex's order and with "
        "torch.distributed.pipelining's, and what the simulator says of them.",
    )  # fmt: skip
    _add_training(pipeline)
    _add_common(pipeline, samples=20, floor="how many times faster than with torch's order, such as "
                "zb-h1/128x64=1.05")  # fmt: skip
    pipeline.add_argument("--min-speedup", metavar="CASE=RATIO,...",
                          help="how many times faster than 1f1b a step must be, such as zb-h1/128x64=1.1")  # fmt: skip
    pipeline.add_argument("--max-misprediction", metavar="CASE=SHARE,...",
                          help="most that the speedup may differ from the simulated one, as a share of that, such as "
                          "zb-h1/128x64=0.1")  # fmt: skip

    overlap = benches.add_parser(
        "overlap", help="how much of a step is communication that computing does not hide: pipex, "
        "torch.distributed.pipelining",
        description="How much of a step of a transformer is communication that computing does not hide, for each "
        "schedule, beside a step of torch.distributed.pipelining (Gloo).",
    )  # fmt: skip
    _add_training(overlap)
    _add_common(overlap, samples=20, floor="how many times faster than torch's a step must be, such as "
                "1f1b/128x64=1")  # fmt: skip
    overlap.add_argument("--max-exposed-share", metavar="CASE=SHARE,...",
                         help="most of a step, such as 1f1b/128x64=0.1")  # fmt: skip

    drop_in = benches.add_parser(
        "drop-in", help="a training step of torch.distributed.pipelining, with and without pipex.drop_in()",
        description="A training step of torch.distributed.pipelining (Gloo), with and without pipex.drop_in().",
    )  # fmt: skip
    drop_in.add_argument("--schedules", default="zbv,interleaved-zb", help="of zbv and interleaved-zb (default: both)")
    drop_in.add_argument("--ranks", metavar="COUNT,...", default="2,4",
                         help="of two chunks each; a case is SCHEDULE/RANKS (default: 2,4)")  # fmt: skip
    _add_common(drop_in, samples=20, floor="how many times faster drop_in() must make a step, such as zbv/2=1.4")

    backward = benches.add_parser(
        "backward", help="the split backward of one stage: pipex, torch's split, one whole backward",
        description="The backward of one stage, I and W together: pipex, torch's split, and one whole backward.",
    )  # fmt: skip
    _add_common(backward, samples=20, floor="how many times faster than torch's split, such as mlp=2")
    backward.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                          help="where; larger stages in bfloat16 on cuda (default: cpu)")  # fmt: skip
    backward.add_argument("--max-over-whole", metavar="CASE=RATIO,...",
                          help="most that it may cost, in whole backwards, such as block=1.15")  # fmt: skip
    backward.add_argument("--max-forward-over-whole", metavar="CASE=RATIO,...",
                          help="most that the prepared forward may cost, in plain ones, such as block=1.1")  # fmt: skip
    backward.add_argument("--max-held-share", metavar="CASE=SHARE,...",
                          help="most bytes that may wait for W, over a plain forward's, such as block=1")  # fmt: skip

    gemm = benches.add_parser(
        "gemm", help="the matrix products of the backward on a GPU: pipex (Triton), cublas",
        description="The matrix products of the backward on a GPU: pipex's Triton kernels and cuBLAS through torch. "
        "Measured are all combinations of the sizes.",
    )  # fmt: skip
    add_products(gemm)
    _add_common(gemm, samples=15, floor="how many times faster than cublas, such as dW/4096x4096/512x8=1.15")
    gemm.add_argument("--compile-only", action="store_true",
                      help="compile the kernels and print what they cost; needs no GPU; exit 1 on a spill")  # fmt: skip


def add_products(parser: argparse.ArgumentParser) -> None:
    """Declares which products are measured."""
    parser.add_argument("--kinds", metavar="KIND,...", default="dX,dX+gelu,dX+swiglu,dW,dW+db",
                        help="of dX, dX+relu, dX+silu, dX+gelu, dX+gelu_tanh, dX+swiglu, dW and dW+db "
                        "(default: dX,dX+gelu,dX+swiglu,dW,dW+db)")  # fmt: skip
    parser.add_argument("--layers", metavar="LAYER,...", default="square,up",
                        help="of square (H x H), up (4H x H) and down (H x 4H); activations stand before a down "
                        "(default: square,up)")  # fmt: skip
    parser.add_argument("--hidden", metavar="H,...", default="1024,2048,4096,8192",
                        help="hidden widths (default: 1024,2048,4096,8192)")  # fmt: skip
    parser.add_argument("--tokens", metavar="T,...", default="512,2048,8192",
                        help="tokens of a micro-batch (default: 512,2048,8192)")  # fmt: skip
    parser.add_argument("--micro-batches", metavar="COUNT,...", default="1,4,8",
                        help="micro-batches of a weight gradient (default: 1,4,8)")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: bfloat16)")
    parser.add_argument("--gradient", default="float32",
                        help="dtype of the weight gradient: float32 or the operands' (default: float32)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns its exit code: 1 after a wrong result or a missed floor."""
    check_rounds(options)
    benches = {"p2p": _p2p, "step": _step, "pipeline": _pipeline, "overlap": _overlap, "drop-in": _drop_in,
               "backward": _backward, "gemm": _gemm}  # fmt: skip
    return benches[options.bench](options)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--schedules", default="gpipe,1f1b,zb-h1,zbv", help="default: gpipe,1f1b,zb-h1,zbv")
    parser.add_argument("--ranks", metavar="COUNT", type=int, default=None,
                        help="default: 2; with --virtual-devices 4")  # fmt: skip
    parser.add_argument("-m", metavar="COUNT", type=int, default=8, help="micro-batches per step (default: 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where; a larger model, in bfloat16, on cuda (default: cpu)")  # fmt: skip
    parser.add_argument("--virtual-devices", action="store_true",
                        help="ranks that share a GPU compute at once, with an equal share of it each")  # fmt: skip


def _add_common(parser: argparse.ArgumentParser, *, samples: int, floor: str) -> None:
    add_rounds(parser, samples)
    parser.add_argument("--min-ratio", metavar="CASE=RATIO,...", help=floor + "; exit 1 below")


def add_rounds(parser: argparse.ArgumentParser, samples: int) -> None:
    """Declares how often is measured, and how the result is printed."""
    parser.add_argument("-n", metavar="COUNT", type=int, default=samples, help=f"samples (default: {samples})")
    parser.add_argument("-w", metavar="COUNT", type=int, default=5, help="rounds before them (default: 5)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line; the table goes to stderr"
    )


def check_rounds(options: argparse.Namespace) -> None:
    """Raises InputError where nothing would be measured."""
    from pipex.errors import InputError

    if options.n < 1 or options.w < 0:
        raise InputError(
            "nothing would be measured", got=f"-n {options.n} -w {options.w}", needed="-n 1 or more, -w 0 or more"
        )


def _p2p(options: argparse.Namespace) -> int:
    from pipex.bench.sizes import format_size, parse_size, size_range
    from pipex.errors import InputError

    if options.f is not None and options.i is not None:
        raise InputError("two ways from one size to the next", got=f"-f {options.f} and -i {options.i}", needed="one")
    if options.virtual_devices and options.transport != "device":
        raise InputError("only ranks that share a GPU get shares of it", got=f"--transport {options.transport}",
                         needed="--transport device", fix="leave --virtual-devices out")  # fmt: skip
    step = 0 if options.i is None else parse_size(options.i)
    factor = options.f if options.f is not None else 1 if step else 4
    sizes = size_range(parse_size(options.b), parse_size(options.e), factor, step)
    from pipex.bench import gpu, p2p
    from pipex.bench.virtual_devices import shared_among

    transport = p2p.TRANSPORTS[options.transport]
    floors = _floors(options, transport.provider, [format_size(size) for size in sizes])
    on_gpu = transport.device == "cuda"
    if on_gpu:
        p2p.check_gpus(options.transport)
    with shared_among(p2p.RANKS) if options.virtual_devices else nullcontext():
        rows = p2p.measure(
            sizes, _rounds(options), options.transport, both_ways=options.bidirectional,
            virtual_devices=options.virtual_devices,
        )  # fmt: skip
    # Afterwards: CUDA must not start in this process before its ranks have.
    facts: dict[str, Any] = {"virtual_devices": options.virtual_devices} if on_gpu else {}
    facts |= gpu.describe_gpu(gpu.require_gpu("pipex bench p2p")) if on_gpu else {}
    return _finish(options, p2p.THREADS, facts, rows, floors)


def _step(options: argparse.Namespace) -> int:
    from pipex.bench import step
    from pipex.runtime.worlds import threads_per_rank

    cases = step.cases(options.schedules, options.shapes, options.m)
    floors = _floors(options, step.PROVIDER, [case.name for case in cases])
    return _finish(options, threads_per_rank(step.RANKS), {}, step.measure(cases, _rounds(options)), floors)


def _pipeline(options: argparse.Namespace) -> int:
    from pipex.bench import pipeline

    return _training(options, pipeline)


def _overlap(options: argparse.Namespace) -> int:
    from pipex.bench import overlap

    return _training(options, overlap)


def _training(options: argparse.Namespace, bench: Any) -> int:
    from pipex.bench.virtual_devices import shared_among
    from pipex.errors import InputError
    from pipex.runtime.worlds import threads_per_rank

    if options.virtual_devices and options.device == "cpu":
        raise InputError("CPUs are not shared out", got="--virtual-devices", needed="--device cuda with it")
    ranks = options.ranks if options.ranks is not None else 4 if options.virtual_devices else 2
    cases = bench.cases(options.schedules, ranks, options.m, options.device)
    floors = _floors(options, bench.PROVIDER, [case.name for case in cases])
    with shared_among(ranks) if options.virtual_devices else nullcontext():
        rows = bench.run(cases, _rounds(options))
    _, gpu_facts = _device(options)  # afterwards: CUDA must not start in this process before its ranks have
    facts = {"ranks": ranks, "virtual_devices": options.virtual_devices, **gpu_facts}
    return _finish(options, threads_per_rank(ranks), facts, rows, floors)


def _drop_in(options: argparse.Namespace) -> int:
    from pipex.bench import drop_in

    cases = drop_in.cases(options.schedules, options.ranks)
    floors = _floors(options, drop_in.PROVIDER, [case.name for case in cases])
    return _finish(options, drop_in.THREADS, {}, drop_in.measure(cases, _rounds(options)), floors)


def _backward(options: argparse.Namespace) -> int:
    import torch

    from pipex.bench import backward

    cases = backward.CASES[options.device]
    floors = _floors(options, backward.PROVIDER, [case.name for case in cases])
    device, gpu_facts = _device(options)
    torch.set_num_threads(1)
    return _finish(options, 1, gpu_facts, backward.measure(cases, _rounds(options), device), floors)


def _gemm(options: argparse.Namespace) -> int:
    from pipex.bench import gemm, gpu
    from pipex.bench.environment import environment
    from pipex.bench.report import say

    chosen = products(options)
    floors = _floors(options, gemm.PROVIDER, [case.name for case in chosen])
    if options.compile_only:
        gemm.require_triton()
        lines = gemm.compiled_lines()
        sentences = [f"{line['case']}: spills, or does not fit its GPU" for line in lines if not line["correct"]]
        return say(environment(1) | gemm.triton_version(), lines, sentences, as_json=options.json)
    device = gpu.require_gpu("pipex bench gemm", "--compile-only says what the kernels cost without one")
    gemm.require_triton()
    clock, rounds = gpu.Clock(device), _rounds(options)
    ceilings = clock.ceilings(chosen[0].dtype, rounds)
    rows = gemm.measure(chosen, rounds, clock, ceilings)
    found = {"ceiling_tflop_per_s": round(ceilings[0], 1), "ceiling_gb_per_s": round(ceilings[1], 1)}
    return _finish(options, 1, gemm.triton_version() | gpu.describe_gpu(device) | found, rows, floors)


# What they share.


def _rounds(options: argparse.Namespace) -> Rounds:
    from pipex.bench.driver import Rounds

    return Rounds(options.n, options.w)


def _floors(options: argparse.Namespace, provider: str, cases: Sequence[str]) -> list[Floor]:
    """What ``--min-FIGURE`` and ``--max-FIGURE`` ask of the provider."""
    from pipex.bench.report import parse_floors

    floors: list[Floor] = []
    for option, text in vars(options).items():
        least_or_most, _, figure = option.partition("_")
        if least_or_most in ("min", "max") and text is not None:
            floors += parse_floors(text, provider, figure, cases, most=least_or_most == "max")
    return floors


def _device(options: argparse.Namespace) -> tuple[torch.device, dict[str, str]]:
    """Where ``--device`` says, and what a report says of that."""
    import torch

    from pipex.bench import gpu

    if options.device == "cpu":
        return torch.device("cpu"), {}
    device = gpu.require_gpu(f"pipex bench {options.bench} --device cuda")
    return device, gpu.describe_gpu(device)


def _finish(
    options: argparse.Namespace, threads: int, facts: Mapping[str, Any], rows: Sequence[Row], floors: Sequence[Floor]
) -> int:
    from pipex.bench.environment import environment
    from pipex.bench.report import finish

    return finish(environment(threads) | dict(facts), rows, floors, as_json=options.json)


def products(options: argparse.Namespace) -> list[Case]:
    """The products that the options choose."""
    from pipex.bench import gemm
    from pipex.errors import InputError

    def numbers(text: str) -> list[int]:
        try:
            return [int(part) for part in text.split(",")]
        except ValueError:
            raise InputError("not a list of numbers", got=repr(text), needed="such as 1024,4096") from None

    return gemm.cases(
        options.kinds.split(","),
        options.layers.split(","),
        numbers(options.hidden),
        numbers(options.tokens),
        numbers(options.micro_batches),
        options.dtype,
        options.gradient,
    )
