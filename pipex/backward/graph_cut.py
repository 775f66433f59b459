"""Cuts the graph of a compiled backward in two: what I needs, and what only the gradients that wait need.

Nothing is computed in both but views. What the second part reads of the first, or of what the forward has saved, are
inputs of it:

      saved, dy ──► [first] ──► gradients of inputs
        │             └─ made ──┐
        └───────────────────────┴─► [second] ──► gradients that wait
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import SymBool, SymFloat, SymInt, fx

from pipex.backward.torch_internals import is_mutable, must_run_in_order


class Source(NamedTuple):
    """Where a value is found once the first part has run."""

    kind: str
    """"saved": among the inputs of the whole graph; "made": among what the first part makes for the second; "second":
    among the outputs of the second part; "first": among those of the first"""
    place: int


class Cut(NamedTuple):
    """Both parts of a graph.

    Attributes:
        first: has the inputs of the whole graph, and as outputs those that do not wait, then what it makes for the
            second; None where it has none.
        second: None where nothing is left for it.
        reads: where the inputs of the second part come from.
        examples: values that stand for these, for a compiler.
        outputs: where each output of the whole graph comes from; None where it has no value.
        kept: how many outputs of the first part are outputs of the whole.
    """

    first: fx.GraphModule | None
    second: fx.GraphModule | None
    reads: list[Source]
    examples: list[Any]
    outputs: list[Source | None]
    kept: int


def cut(module: fx.GraphModule, examples: Sequence[Any], later: Collection[int]) -> Cut:
    """Cuts a graph whose outputs are a tuple. One that writes to its inputs is left whole, as the first part, for the
    order of its operations counts.

    Args:
        module: the graph; may be changed.
        examples: values that stand for its inputs, for a compiler.
        later: the places of the outputs that wait.
    """
    outputs = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
    now = [out for place, out in enumerate(outputs) if place not in later and isinstance(out, fx.Node)]
    late = [out for place, out in enumerate(outputs) if place in later and isinstance(out, fx.Node)]
    if any(node.op == "call_function" and is_mutable(node.target) for node in module.graph.nodes):
        first = _needed(module.graph, [*now, *late])
    else:
        _part_convolutions(module.graph, _ancestors(module.graph, now))
        first = _needed(module.graph, now)

    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    saved = {node: place for place, node in enumerate(placeholders)}
    second, read = _only_for(late, first, saved)
    made = [node for node in first if node in read and node not in saved]
    for out in late:  # made by the first part anyway
        if out in first and out not in saved and out not in made:
            made.append(out)

    has_value = [place for place, out in enumerate(outputs) if isinstance(out, fx.Node)]
    found: list[Source | None] = [None] * len(outputs)
    kept: list[fx.Node] = []
    left: list[fx.Node] = []
    for place in has_value:
        out = outputs[place]
        if place not in later:
            found[place] = Source("first", len(kept))
            kept.append(out)
        elif out in saved:
            found[place] = Source("saved", saved[out])
        elif out in first:
            found[place] = Source("made", made.index(out))
        else:
            if out not in left:
                left.append(out)
            found[place] = Source("second", left.index(out))

    symbols = [node for node in placeholders if _is_symbol(node)]
    others = [node for node in module.graph.nodes if node in read and node not in symbols]
    # A backend tells gradients from what was saved by their names, and wants them last.
    others.sort(key=lambda node: "tangents" in node.name)
    inputs = [*symbols, *others]
    values = dict(zip(placeholders, examples, strict=True))
    return Cut(
        _part(module, placeholders, first, [*kept, *made]) if kept or made else None,
        _part(module, inputs, second, left) if left else None,
        [Source("saved", saved[node]) if node in saved else Source("made", made.index(node)) for node in inputs],
        [values[node] if node in values else node.meta["val"] for node in inputs],
        found,
        len(kept),
    )


def _ancestors(graph: fx.Graph, outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """What these outputs, and what must run in any case, are made of."""
    found = set()
    todo = [*outputs, *(node for node in graph.nodes if node.op == "call_function" and must_run_in_order(node))]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _needed(graph: fx.Graph, outputs: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """The first part, in the order of the graph: with what costs nothing once the rest is there, members of tuples, and
    sizes, for which no tensor need be kept then."""
    found = _ancestors(graph, outputs)
    for node in graph.nodes:
        is_there = all(x in found or x.op == "placeholder" for x in node.all_input_nodes)
        if node.op == "call_function" and is_there and (_is_symbol(node) or _is_member(node, found)):
            found.add(node)
    return {node: None for node in graph.nodes if node in found and node.op != "placeholder"}


def _is_member(node: fx.Node, found: Collection[fx.Node]) -> bool:
    return node.target is operator.getitem and node.args[0] in found


def _is_symbol(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (SymInt, SymFloat, SymBool, int, float))


def _only_for(
    outputs: Iterable[fx.Node], first: Collection[fx.Node], saved: Collection[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """What has to be computed for these outputs beyond the first part, and what that reads of it and of the inputs. A
    view is made again: keeping what it is of keeps the same memory."""
    computed, read = set(), set()
    todo = [out for out in outputs if out not in first and out not in saved]
    while todo:
        node = todo.pop()
        if node in computed or node in read:
            continue
        if node in saved or (node in first and not _is_view(node) and node.op != "get_attr"):
            read.add(node)
        else:
            computed.add(node)
            todo += node.all_input_nodes
    return computed, read


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "is_view", False) and len(node.all_input_nodes) == 1


def _part(
    module: fx.GraphModule, inputs: Sequence[fx.Node], nodes: Collection[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """A graph of these nodes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        # inductor's cache knows a graph by its code, and may have the same one that writes over what it is given.
        copies[node] = graph.placeholder(f"{node.name}_kept")
        copies[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    part = fx.GraphModule(module, graph)
    part.meta.update(module.meta)
    return part


def _part_convolutions(graph: fx.Graph, first: set[fx.Node]) -> None:
    """One operation makes the gradients of a convolution's input and weights; where these wait, two do, one for each,
    as its mask allows."""
    for node in list(first):
        if node.target is not torch.ops.aten.convolution_backward.default:
            continue
        members = {user.args[1]: user for user in node.users}
        if 0 not in members or any(member in first for place, member in members.items() if place != 0):
            continue
        *others, mask = node.args
        halves: list[Callable[[int], bool]] = [lambda place: place == 0, lambda place: place != 0]
        made = []
        with graph.inserting_before(node):
            for is_its in halves:
                half = graph.call_function(node.target, (*others, [bool(x) and is_its(i) for i, x in enumerate(mask)]))  # type: ignore[arg-type]
                half.meta = dict(node.meta)
                half.meta["val"] = tuple(x if is_its(i) else None for i, x in enumerate(node.meta["val"]))
                made.append(half)
        for place, member in members.items():
            member.args = (made[place != 0], place)
        graph.erase_node(node)
