"""``pipex layout``: which rank holds which layers and tensors of a model under a plan."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pipex.cli.factory import find_factory
from pipex.cli.plans.files import read_plan
from pipex.errors import InputError

if TYPE_CHECKING:
    from pipex.partition import Balance

EPILOG = """\
MODULE:FACTORY names a function without arguments in a module that Python can import from here. It returns the model, as
for pipex.split_model, or a tuple that begins with it, as for `pipex profile`. It is called under torch's meta device:
nothing is allocated, and a model of any size can be laid out.

    pipex schedule zbv --ranks 4 --microbatches 8 --out step.plan
    pipex layout step.plan my_model:profiled
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, as `pipex schedule` and `pipex plan` write it")
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="makes the model")
    parser.add_argument("--balance", default="uniform",
                        help="uniform, parameters, or the number of layers of each stage, such as 3,4,4,3 (default: "
                        "uniform)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(options: argparse.Namespace) -> int:
    """Prints the layout; returns the exit code."""
    plan = read_plan(options.plan)
    balance = _balance(options.balance)
    import torch
    from torch import nn

    from pipex.partition import layout_of, split_model

    with torch.device("meta"):
        made = find_factory(options.factory)()
    model = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(model, nn.Module):
        raise InputError(f"{options.factory} returned no model", got=type(model).__name__, needed="an nn.Module")
    layout = layout_of(plan, split_model(model, plan, balance))
    if options.json:
        print(json.dumps({
            "digest": layout.digest.hex(), "batch_ranks": layout.batch_ranks, "target_ranks": layout.target_ranks,
            "ranks": [
                {"nbytes": layout.nbytes(rank), "stages": list(plan.placement.stages_of(rank)),
                 "versions": plan.weight_versions[rank]}
                for rank in range(plan.placement.ranks)
            ],
            "stages": [{"rank": layout.rank_of(s), "layers": list(layers)} for s, layers in enumerate(layout.layers)],
            "tensors": [
                {"name": held.name, "form": held.form, "stages": list(layout.holders(held))}
                for held in layout.blueprint.tensors
            ],
        }))  # fmt: skip
    else:
        print("\n".join(layout.lines()))
    return 0


def _balance(text: str) -> Balance:
    named: dict[str, Balance] = {"uniform": "uniform", "parameters": "parameters"}
    if text in named:
        return named[text]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("unknown balance", got=repr(text),
                         needed="uniform, parameters or numbers of layers, such as 3,4,4,3") from None  # fmt: skip
