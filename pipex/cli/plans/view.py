"""``pipex view``: a plan from a file, as text, as a page for the browser, or as a Chrome trace."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from pipex.cli.plans.figures import bound_of, figures, picture
from pipex.cli.plans.files import read_plan, write_text
from pipex.cli.plans.sizes import add_costs, add_json, check_no_costs, costs_of, memory_of
from pipex.errors import InputError
from pipex.observe import measure, read_trace
from pipex.plan.measured import measured_costs
from pipex.plan.view.chrome import chrome_trace
from pipex.plan.view.html import html_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, as `pipex schedule` and `pipex plan` write it")
    parser.add_argument("--html", metavar="FILE", help="write a page that shows the plan in a browser")
    parser.add_argument(
        "--trace", metavar="FILE",
        help="take the costs from what `pipex train --trace` measured, and show the run beside the plan on the page",
    )  # fmt: skip
    parser.add_argument("--chrome", metavar="FILE", help="write the simulated step for Perfetto")
    add_costs(parser, spare=True)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Draws the plan."""
    plan = read_plan(options.plan)
    limit = memory_of(options, plan.placement.ranks)
    for output in (options.html, options.chrome):
        if output is not None and Path(output).resolve() == Path(options.plan).resolve():
            raise InputError(f"{output} is the plan itself", fix="write the picture to another file")
    trace: Any = None
    if options.trace is not None:
        check_no_costs(options, "--trace")
        trace = read_trace(options.trace)
        measured = measure(trace, plan.placement)
        costs = measured_costs(plan, measured.action, median(measured.messages) if measured.messages else 0.0)
    else:
        costs = costs_of(options, plan.placement.ranks).on(plan.placement)
    found, simulation = figures(plan, costs, limit=limit, seconds=0.0, plan_file=options.plan)
    if options.html is not None:
        kept = None if found["over_limit"] else limit
        write_text(options.html, html_page(plan, costs, bound=bound_of(plan, costs, kept), limit=limit, trace=trace))
    if options.chrome is not None:
        write_text(options.chrome, json.dumps(chrome_trace(plan, costs)))
    if options.json:
        print(json.dumps(found))
    else:
        print(picture(simulation))
        for rank in found["over_limit"]:
            peak, most = found["peak_memory"][rank], found["limit"][rank]
            print(f"rank {rank} holds {peak:g} at its peak, more than the {most:g} of --memory")
    return 0
