"""``pipex profile``: what every layer of a model costs on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pipex.cli.factory import find_factory
from pipex.cli.train.options import Options
from pipex.errors import InputError

if TYPE_CHECKING:
    from pipex.partition import LayerSplit
    from pipex.plan.layer_costs import Layer, LayerCosts

EPILOG = """\
MODULE:FACTORY names a function without arguments in a module that Python can import from here. It returns a tuple
(model, sample, target, loss_fn): the model as for pipex.split_model; one micro-batch, a tensor, a tuple of tensors, or
the dict by which a model is cut by its own forward; its target; and a function (output, target) -> loss, or "model" for
the loss that the model returns. Model and tensors stand on the device to measure on.

    # my_model.py
    def profiled():
        return Model(), torch.randn(4, 8), torch.randn(4, 1), nn.functional.mse_loss

    pipex profile my_model:profiled --out costs.json

    # in the program; the same file on every rank
    stages = pipex.split_model(Model(), plan, balance=LayerCosts.read("costs.json"))

Without FACTORY the model of `pipex train` is measured, on one micro-batch of --batch / --microbatches sequences; with
--hf the Hugging Face model that `pipex train --hf` would train, embedding and head included.
"""

# Options of `pipex train` that say what its micro-batches and its model are
BATCH = {
    "batch": "sequences per step",
    "microbatches": "micro-batches per step",
    "context": "bytes, or tokens, per sequence",
}
MODEL = {
    "width": "width of the model",
    "heads": "attention heads",
    "layers": "transformer blocks",
    "dropout": "dropout probability",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    parser.add_argument("factory", nargs="?", metavar="MODULE:FACTORY", help="what to measure (none: pipex train's)")
    parser.add_argument("--out", metavar="FILE", help="write the costs to this file")
    parser.add_argument("--ranks", type=int, default=defaults["ranks"], metavar="N",
                        help="measure with the threads that each of N ranks on this machine has, and show the cut for "
                        "N ranks (default 4)")  # fmt: skip
    parser.add_argument("--passes", type=int, default=10, metavar="N", help="passes to measure (default 10)")
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object as the last line on stdout; the table goes to stderr")  # fmt: skip
    group = parser.add_argument_group("pipex train's model")
    group.add_argument("--hf", metavar="PATH", help="measure this Hugging Face model, as `pipex train --hf` has it")
    for name, text in (BATCH | MODEL).items():
        default: Any = defaults[name]
        hint = "X" if isinstance(default, float) else "N"
        group.add_argument(f"--{name}", type=type(default), metavar=hint, help=f"{text} (default {default})")
    group.add_argument("--tied", action="store_true", default=None, help="tie the output head to the token embedding")


def run(options: argparse.Namespace) -> int:
    """Measures, prints, writes; returns the exit code."""
    for name in ("ranks", "passes"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is out of range", got=getattr(options, name), needed="at least 1")
    if options.factory is not None:
        model, sample, target, loss_fn = _made(options)
    else:
        model, sample, target, loss_fn = _own(options) if options.hf is None else _hugging_face(options)
    if options.out is not None:
        _check_writable(options.out)
    from pipex.partition import profile_split
    from pipex.runtime.worlds import set_threads

    set_threads(options.ranks)
    costs, splits = profile_split(model, sample, target, loss_fn, passes=options.passes)
    if options.out is not None:
        costs.write(options.out)
    cut = _cut(costs, options.ranks)
    print(
        "\n".join(_table(costs, splits, options.ranks, cut)),
        file=sys.stderr if options.json else sys.stdout,
        flush=True,
    )
    if options.json:
        layers = zip(costs.layers, splits, strict=True)
        print(json.dumps({
            "costs": json.loads(costs.to_text()), "split": [_split(*layer) for layer in layers],
            "ranks": options.ranks, **cut,
        }))  # fmt: skip
    return 0


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _sizes(options: argparse.Namespace) -> Options:
    sizes = Options(hf=options.hf, **_given(options, (*BATCH, *MODEL, "tied")))
    sizes.check_values()
    return sizes


def _hugging_face(options: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    if wrong := _given(options, (*MODEL, "tied")):
        raise InputError(f"--hf excludes --{next(iter(wrong))}", fix="the model's file says it; leave it out")
    sizes = _sizes(options)
    import torch

    from pipex.cli import hugging_face

    known = hugging_face.vocabulary(options.hf)
    tokens = torch.randint(known, (-(-sizes.batch // sizes.microbatches), sizes.context))
    hugging_face.check_tokens(options.hf, tokens, sizes.context)
    return hugging_face.causal_model(options.hf), {"input_ids": tokens, "labels": tokens}, None, "model"


def _own(options: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    sizes = _sizes(options)
    import torch

    from pipex.models.transformer import ModelConfig, Transformer, next_token_loss

    model = Transformer(ModelConfig(width=sizes.width, heads=sizes.heads, layers=sizes.layers, context=sizes.context,
                                    dropout=sizes.dropout, tied=sizes.tied))  # fmt: skip
    microbatch = -(-sizes.batch // sizes.microbatches)
    tokens = torch.randint(256, (microbatch, sizes.context + 1))
    return model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), next_token_loss


def _made(options: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """What the user's factory returns.

    Raises:
        InputError: there is no such factory, or it returns something else.
    """
    text: str = options.factory
    for name in _given(options, ("hf", *BATCH, *MODEL, "tied")):
        raise InputError(f"--{name} is about pipex train's model", got=f"{text} too", fix=f"leave out --{name}")
    made = find_factory(text)()
    from torch import nn

    if not (
        isinstance(made, tuple) and len(made) == 4 and isinstance(made[0], nn.Module)
        and (callable(made[3]) or made[3] == "model")
    ):  # fmt: skip
        got = f"({', '.join(type(v).__name__ for v in made)})" if isinstance(made, tuple) else type(made).__name__
        raise InputError(f"{text} returned something else", got=got, needed="(model, sample, target, loss_fn)")
    return made


def _check_writable(path: str) -> None:
    """Before anything is measured for nothing."""
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise InputError(f"cannot write --out {path}", got=error.strerror, fix="choose another place") from None


def _cut(costs: LayerCosts, ranks: int) -> dict[str, Any]:
    """How the model is best cut into one stage per rank, beside equal layer counts; None where it has too few layers.
    Bottlenecks are the seconds of the slowest stage's F, I and W."""
    from pipex.plan.chain import uniform
    from pipex.plan.cut import loads
    from pipex.plan.layer_costs import best_cut
    from pipex.plan.placement import Placement

    if ranks > len(costs.layers):
        return {"counts": None, "bottleneck": None, "bottleneck_uniform": None}
    placement = Placement("loop", ranks)
    found = best_cut(costs, placement)
    even = max(loads(costs.times, placement, uniform(len(costs.layers), ranks)))
    return {"counts": list(found.counts), "bottleneck": found.bottleneck, "bottleneck_uniform": even}


def _split(layer: Layer, split: LayerSplit) -> dict[str, float | None]:
    """The share of the layer's weight gradients that waits for W, None where it has none; and what I and W take
    together, over one whole backward."""
    return {
        "deferred_share": split.waiting / split.weights if split.weights else None,
        "over_whole": (layer.input_gradient + layer.weight_gradient) / split.whole if split.whole else None,
    }


def _table(costs: LayerCosts, splits: Sequence[LayerSplit], ranks: int, cut: dict[str, Any]) -> list[str]:
    names = ("forward", "input_gradient", "weight_gradient", "activation", "deferred", "parameters", "output")
    figures = [[getattr(layer, name) for name in names] for layer in costs.layers]
    figures.append([sum(column) for column in zip(*figures, strict=True)])
    cells = [[f"{v * 1e6:,.0f}" for v in row[:3]] + [f"{v / 1024:,.1f}" for v in row[3:]] for row in figures]
    cells[-1][-1] = ""  # outputs do not add up to anything
    every = [_split(*layer) for layer in zip(costs.layers, splits, strict=True)]
    for row, said in zip(cells, every, strict=False):
        row += [
            "-" if value is None else f"{value:{form}}"
            for value, form in zip(said.values(), (".0%", ".2f"), strict=True)
        ]
    weights = sum(split.weights for split in splits)
    waiting, whole = sum(split.waiting for split in splits), sum(split.whole for split in splits)
    halves = figures[-1][1] + figures[-1][2]
    cells[-1] += [f"{waiting / weights:.0%}" if weights else "-", f"{halves / whole:.2f}" if whole else "-"]
    head = ["F µs", "I µs", "W µs", "activation", "deferred", "parameters", "output", "waits", "(I+W)/B"]
    titles = ["layer", *(layer.name for layer in costs.layers), "all"]
    rows = [[title, *row] for title, row in zip(titles, [head, *cells], strict=True)]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))])
        for row in rows
    ]
    lines.append(f"measured on {costs.about}; sizes in KiB; waits: the share of weight gradients that W makes")
    if cut["counts"] is None:
        return [*lines, f"{ranks} ranks: more than there are layers"]
    gain = 1 - cut["bottleneck"] / cut["bottleneck_uniform"] if cut["bottleneck_uniform"] else 0.0
    return [
        *lines,
        f"{ranks} ranks: {', '.join(map(str, cut['counts']))} layers; the slowest rank takes "
        f"{cut['bottleneck'] * 1e6:,.0f} µs per micro-batch, {gain:.0%} less than with equal numbers of layers",
    ]
