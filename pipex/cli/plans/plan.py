"""``pipex plan``: searches the best plan for given costs and memory."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import groupby
from typing import Any

from pipex.cli.plans.figures import figures, picture
from pipex.cli.plans.files import write_plan
from pipex.cli.plans.sizes import (
    add_costs,
    add_json,
    add_sizes,
    check_no_costs,
    check_sizes,
    costs_of,
    memory_of,
)
from pipex.errors import InputError
from pipex.plan import CostModel, bounds, validate
from pipex.plan.layer_costs import LayerCosts
from pipex.plan.plan import check_size
from pipex.plan.search import Candidate, search

SPARE: dict[str, tuple[bounds.Spare, ...]] = {
    "recompute": ("recompute",),
    "offload": ("offload",),
    "both": ("offload", "recompute"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.description = (
        "Search the best plan for given costs and memory. Without --memory a rank may hold P micro-batches, as in "
        "1f1b. Plans with two copies of the model are considered where --weights (or --state) and the memory say that "
        "there is room for both, or --families names them."
    )
    add_sizes(parser)
    parser.add_argument("--max-chunks", type=int, default=4, metavar="V", help="at most V stages per rank (default 4)")
    parser.add_argument(
        "--objective", choices=("makespan", "span"), default="makespan",
        help="makespan: the step ends with a barrier (default); span: the next one may begin staggered",
    )  # fmt: skip
    parser.add_argument(
        "--families", metavar="NAME,NAME", help="families to consider (default: all with one version of the weights)"
    )
    parser.add_argument(
        "--evaluations", type=int, metavar="N", help="orders to judge (default: about a second's worth)"
    )
    parser.add_argument("--seconds", type=float, metavar="T", help="begin no evaluation after so long")
    add_costs(parser, spare=True)
    parser.add_argument(
        "--spare", choices=(*SPARE, "none"), default="both",
        help="what may be done with stages between F and I so that a rank holds less: recompute, offload (if --offload "
        "says what that costs), both (default), or none, as in a plan for torch",
    )  # fmt: skip
    parser.add_argument(
        "--layers", metavar="FILE",
        help="take the costs from what `pipex profile` measured, instead of --f, --i, --w and --hop: every placement "
        "is priced for its best cut, times are in seconds, and --memory is in bytes (default then: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--state", type=float, metavar="N",
        help="with --layers: bytes kept per byte of parameters, with gradients and optimizer, such as 4 for Adam; "
        "--memory then counts them (default: not counted)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write the plan; FILE.csv in torch's format")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Searches, proves and draws the plan."""
    check_sizes(options)
    if options.max_chunks < 1:
        raise InputError("--max-chunks is out of range", got=options.max_chunks, needed="at least 1")
    if options.seconds is not None and not options.seconds > 0:
        raise InputError("--seconds is out of range", got=options.seconds, needed="a number above 0")
    check_size(options.ranks, options.max_chunks, options.microbatches)
    limit = memory_of(options, options.ranks)
    costs: CostModel
    if options.layers is not None:
        check_no_costs(options, "--layers")
        costs = replace(LayerCosts.read(options.layers), state=options.state)
    elif options.state is not None:
        raise InputError("--state is given without --layers", fix="say with --weights what weights take")
    else:
        costs = costs_of(options, options.ranks)
        if limit is None:  # what 1f1b holds
            weights = costs.weights or (0.0,)
            limit = tuple(options.ranks + sum(weights[rank :: options.ranks]) for rank in range(options.ranks))
    spare = SPARE.get(options.spare, ())
    if options.spare == "both" and options.offload is None:
        spare = ("recompute",)
    if options.out is not None and options.out.endswith(".csv"):
        spare = ()  # torch's runtime holds every activation
    begin = time.perf_counter()
    result = search(
        costs, limit, ranks=options.ranks, microbatches=options.microbatches, objective=options.objective,
        chunks=options.max_chunks, families=None if options.families is None else options.families.split(","),
        spare=spare, evaluations=options.evaluations, seconds=options.seconds,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    validate(result.plan)
    if options.out is not None:
        write_plan(options.out, result.plan)
    found, simulation = figures(result.plan, costs, limit=limit, seconds=seconds, plan_file=options.out)
    # What no plan on any of the placements searched can beat, not only on the best one's.
    found |= {
        f"bound_{options.objective}": min(result.bound.value, found[options.objective]),
        "distance": max(0.0, result.distance),
        "origin": result.best.origin,
        "evaluations": result.evaluations,
        "capped": result.capped,
        "runners_up": [_brief(candidate) for candidate in result.runners_up],
    }
    if options.json:
        print(json.dumps(found))
        return 0
    print(picture(simulation))
    best, bound = result.best, result.bound
    print(
        f"{_name(best)}, the best of {result.evaluations} orders in {seconds:.1f} s"
        f"{'; --seconds ended the search' if result.capped else ''}"
    )
    for what in ("recomputed", "offloaded"):
        if stages := [stage for stage, name in enumerate(found["activations"]) if name == what]:
            print(f"{what} between F and I: stages {_ranges(stages)} of {len(found['activations'])}")
    if found["recomputation"]:
        print(f"bubble and recomputation: {found['lost']:.2%} of the makespan is no useful F, I or W")
    print(f"{found['distance']:.2%} above the bound on the {options.objective}, {bound.value:g}: {bound.reason}")
    least = getattr(best, options.objective)
    for other in result.runners_up[:5]:
        more = getattr(other, options.objective) / least - 1 if least else 0.0
        print(f"    {more:+7.2%}  {_name(other)}")
    return 0


def _ranges(stages: list[int]) -> str:
    """Rising numbers, in words: 0 to 7, 9."""
    words = []
    for _, group in groupby(enumerate(stages), key=lambda numbered: numbered[1] - numbered[0]):
        run = [stage for _, stage in group]
        words.append(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(words)


def _name(candidate: Candidate) -> str:
    chunks = f"{candidate.placement.chunks} chunks per rank"
    held = chunks if len(candidate.placement.pipes) == 1 else "two copies of the model"
    spared = [name for name in ("recomputed", "offloaded") if getattr(candidate, name)]
    what = f", stages {' and '.join(spared)}" if spared else ""
    return f"{candidate.family} with {held} ({candidate.origin}{what})"


def _brief(candidate: Candidate) -> dict[str, Any]:
    return {
        "family": candidate.family,
        "chunks": candidate.placement.chunks,
        "origin": candidate.origin,
        "makespan": candidate.makespan,
        "span": candidate.span,
        "peak_memory": list(candidate.peak_memory),
        "recomputed": list(candidate.recomputed),
        "offloaded": list(candidate.offloaded),
    }
