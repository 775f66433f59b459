"""``pipex bubble``: all families side by side at one size."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from pipex.cli.plans.figures import figures
from pipex.cli.plans.sizes import add_costs, add_json, add_sizes, check_sizes, costs_of, memory_of
from pipex.errors import InputError
from pipex.plan import FAMILIES, RankCosts, build, options_of, validate

TEXTBOOK = """
makespan: idle share of the whole step, which a step pays that ends with a barrier (a gradient norm, a shared loss).
span: idle share of the worst rank between its own start and end, which remains where the next step may begin staggered.

Textbook fractions divide by different things. For {p} ranks, {m} micro-batches{of_chunks}, F, I and W alike, no hop:
  gpipe, 1f1b   (P-1)/(M+P-1) = {whole:.1%} of the step, or (P-1)/M = {ideal:.1%} of the ideal time
{chunked}The figures above are shares of the step.""".strip("\n")
CHUNKED = "  interleaved   (P-1)/(VM+P-1) = {whole:.1%} of the step, or (P-1)/(VM) = {ideal:.1%} of the ideal time\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_sizes(parser)
    parser.add_argument("-v", "--chunks", type=int, metavar="V", help="chunks per rank, where a family has a choice")
    add_costs(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    check_sizes(options)
    costs, limit = costs_of(options, options.ranks), memory_of(options, options.ranks)
    rows = [_row(name, options, costs, limit) for name in FAMILIES]
    if options.json:
        print(json.dumps({"rows": rows}))
        return 0
    print(f"{'family':16}{'chunks':>6}{'makespan':>12}{'bubble':>9}{'span':>12}{'bubble':>9}{'peak':>8}")
    for row in sorted((row for row in rows if "reason" not in row), key=lambda row: (row["makespan"], row["family"])):
        peak = max(row["peak_memory"])
        print(
            f"{row['family']:16}{row['chunks']:6}{row['makespan']:12.6g}{row['bubble_makespan']:9.2%}"
            f"{row['span']:12.6g}{row['bubble_span']:9.2%}{peak:8.4g}{'  ' + row['note'] if row['note'] else ''}"
        )
    for row in rows:
        if "reason" in row:
            print(f"{row['family']:16}not here: {row['reason']}")
    print("\n" + _textbook(options))
    return 0


def _row(name: str, options: argparse.Namespace, costs: RankCosts, limit: tuple[float, ...] | None) -> dict[str, Any]:
    given: dict[str, Any] = {"chunks": options.chunks, "costs": costs, "memory": limit}
    wanted = {key: given[key] for key in options_of(name) if given.get(key) is not None}
    begin = time.perf_counter()
    try:
        plan = build(name, options.ranks, options.microbatches, **wanted)
        validate(plan)
        found, _ = figures(plan, costs, limit=limit, seconds=time.perf_counter() - begin)
    except InputError as error:
        return {"family": name, "reason": str(error)}
    notes = {
        "never": "no backward",
        "microbatch": "older weights, one version per micro-batch under way",
        "delayed": "older weights, two versions",
    }
    note = "two copies of the model" if len(plan.placement.pipes) > 1 else notes.get(plan.update, "")
    if limit is not None and any(p > top for p, top in zip(found["peak_memory"], limit, strict=True)):
        note = "; ".join(filter(None, (note, "over the memory limit")))
    return {**found, "note": note}


def _textbook(options: argparse.Namespace) -> str:
    p, m, v = options.ranks, options.microbatches, options.chunks or 1
    chunked = CHUNKED.format(whole=(p - 1) / (v * m + p - 1), ideal=(p - 1) / (v * m)) if v > 1 else ""
    return TEXTBOOK.format(
        p=p, m=m, of_chunks=f", {v} chunks per rank" if v > 1 else "", whole=(p - 1) / (m + p - 1), ideal=(p - 1) / m,
        chunked=chunked,
    )  # fmt: skip
