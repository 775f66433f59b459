"""The options that the commands about plans share, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Protocol

from pipex.errors import InputError
from pipex.plan import RankCosts
from pipex.plan.plan import check_size


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Declares ``-p`` and ``-m``."""
    parser.add_argument("-p", "--ranks", type=int, required=True, metavar="P", help="ranks")
    parser.add_argument("-m", "--microbatches", type=int, required=True, metavar="M", help="micro-batches per step")


class Group(Protocol):
    """Options that stand together in the help."""

    def add_argument(self, *names: str, **how: Any) -> Any: ...


def add_costs(parser: argparse.ArgumentParser, *, spare: bool = False) -> None:
    """Declares the costs; ``spare``: also those of holding less."""
    group = parser.add_argument_group(
        "costs",
        "Times in any one unit, of a whole rank, which its chunks share evenly: one number for all ranks, or one per "
        "rank with commas between; as many as there are stages are taken as they stand.",
    )
    for name, what in (("f", "forward"), ("i", "input gradient"), ("w", "weight gradient")):
        group.add_argument(f"--{name}", type=numbers, default=1.0, metavar="T", help=f"time of the {what} (default 1)")
    group.add_argument("--hop", type=float, default=0.0, metavar="T", help="time of a message (default 0)")
    group.add_argument(
        "--memory", type=numbers, metavar="N",
        help="activations that a rank may hold, in micro-batches of the whole rank: one number, or one per rank; with "
        "--weights, these too",
    )  # fmt: skip
    group.add_argument(
        "--weights", type=numbers, metavar="N",
        help="what the weights of a rank take with gradients and optimizer, in the unit of --memory, where the model "
        "is held once (default: not counted)",
    )  # fmt: skip
    group.add_argument(
        "--exchange", type=float, default=0.0, metavar="T",
        help="time after the last action in which two copies of a model add up their gradients (default 0)",
    )  # fmt: skip
    if spare:
        group.add_argument(
            "--recompute", type=numbers, metavar="T",
            help="time of computing an activation again, inside I (default: that of F)",
        )  # fmt: skip
        group.add_argument(
            "--offload", type=numbers, metavar="T",
            help="time of copying an activation to host memory, and of copying it back",
        )  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declares ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line on stdout")


def numbers(text: str) -> float | tuple[float, ...]:
    """One number, or several with commas between."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor numbers with commas between") from None
    return values if len(values) > 1 else values[0]


def check_sizes(options: argparse.Namespace) -> None:
    """Raises InputError for fewer than one rank, micro-batch or chunk."""
    for name in ("ranks", "microbatches", "chunks"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name} is out of range", got=value, needed="at least 1")
    check_size(options.ranks, getattr(options, "chunks", None) or 1, options.microbatches)


def costs_of(options: argparse.Namespace, ranks: int) -> RankCosts:
    """The costs that the options give; an activation of a whole rank is 1.

    Raises:
        InputError: a number is negative, or there is a wrong number of them.
    """
    recompute, offload = (getattr(options, name, None) for name in ("recompute", "offload"))
    return RankCosts.of(
        ranks, options.f, options.i, options.w, options.hop, recompute=recompute, offload=offload,
        weights=options.weights, exchange=options.exchange,
    )  # fmt: skip


def check_no_costs(options: argparse.Namespace, other: str) -> None:
    """Raises InputError if a cost is given beside ``other``, the option that says them all."""
    given = options.f, options.i, options.w, options.hop, options.weights, options.exchange
    if given != (1.0, 1.0, 1.0, 0.0, None, 0.0):
        raise InputError(
            f"{other} excludes --f, --i, --w, --hop, --weights and --exchange", fix="its file says the costs"
        )
    if (options.recompute, options.offload) != (None, None):
        raise InputError(f"{other} excludes --recompute and --offload", fix="its file says the costs")


def memory_of(options: argparse.Namespace, ranks: int) -> tuple[float, ...] | None:
    """The memory limit per rank in micro-batches; None without one.

    Raises:
        InputError: a wrong number of limits, or one that is not above 0.
    """
    given: float | Sequence[float] | None = options.memory
    if given is None:
        return None
    limits = tuple(given) if isinstance(given, Sequence) else (given,) * ranks
    if len(limits) != ranks:
        raise InputError("wrong number of limits in --memory", got=len(limits), needed=f"1 or {ranks}")
    for rank, limit in enumerate(limits):
        if not 0 < limit < float("inf"):
            raise InputError(f"bad --memory of rank {rank}", got=limit, needed="a finite number above 0")
    return limits
