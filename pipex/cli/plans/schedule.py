"""``pipex schedule``: one family's plan, drawn and measured by simulation."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from pipex.cli.plans.figures import figures, picture
from pipex.cli.plans.files import write_plan
from pipex.cli.plans.sizes import add_costs, add_json, add_sizes, check_sizes, costs_of, memory_of
from pipex.errors import InputError
from pipex.plan import build, options_of, validate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("name", metavar="NAME", help="family; `pipex schedules` lists them")
    add_sizes(parser)
    parser.add_argument("-v", "--chunks", type=int, metavar="V", help="chunks per rank (the family's own if not given)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the family, such as group=4"
    )  # fmt: skip
    add_costs(parser)
    parser.add_argument("--out", metavar="FILE", help="write the plan; FILE.csv in torch's format")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Builds, proves and draws the plan."""
    check_sizes(options)
    costs, limit = costs_of(options, options.ranks), memory_of(options, options.ranks)
    known = options_of(options.name)
    wanted: dict[str, Any] = {"costs": costs, "memory": limit}
    wanted = {key: value for key, value in wanted.items() if key in known and value is not None}
    wanted |= dict(map(_setting, options.set))
    if options.chunks is not None:
        wanted["chunks"] = options.chunks
    begin = time.perf_counter()
    plan = build(options.name, options.ranks, options.microbatches, **wanted)
    validate(plan)
    seconds = time.perf_counter() - begin
    found, simulation = figures(plan, costs, limit=limit, seconds=seconds, plan_file=options.out)
    for rank, (peak, top) in enumerate(zip(found["peak_memory"], limit or found["peak_memory"], strict=True)):
        if peak > top:
            raise InputError(
                f"{options.name} needs more memory on rank {rank} than --memory allows", got=top, needed=f"{peak:g}",
                fix="raise --memory, or let `pipex plan` search under it",
            )  # fmt: skip
    if options.out is not None:
        write_plan(options.out, plan)
    if options.json:
        print(json.dumps(found))
        return 0
    print(picture(simulation))
    print(f"no schedule of this placement and memory is shorter than {found['bound_makespan']:g}")
    return 0


def _setting(text: str) -> tuple[str, int | str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise InputError("cannot read --set", got=repr(text), needed="NAME=VALUE, as in group=4")
    if name in ("name", "ranks", "microbatches", "chunks", "costs", "memory"):
        raise InputError(f"cannot --set {name}", fix="give -p, -m, -v, --f, --i, --w, --hop or --memory")
    return name, int(value) if value.isdecimal() else value
