"""Gradients that come to one parameter in several ways in one forward, added as autograd adds them.

Where a parameter is used as it is, in a cast of autocast's and in something that is made of it, a pass comes to it
once for each use, once for all uses of the cast, and as often as the graph of what is made says. Three additions and
more depend on their order, which is that of the pass:

    use      ──► added when the pass comes to it
    cast     ──► its uses are summed in lower precision; cast back and added when the last has come
    made     ──► its uses are summed; goes through its graph when the last has come, and is added to on the way
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pipex.backward.accumulate import Silence, naming_graphs_that_are_gone
from pipex.backward.uses import Sums
from pipex.backward.weights import Cast, Made, Target, leaves_of, reachable


class InOrder(Sums):
    """Takes the gradients of one pass in its order; ``finish`` gives them to ``sums``.

    Args:
        targets: whose gradients will come, each as often as it will.
        several: ids of the parameters to which gradients come in several ways. Those of others go to ``sums`` at once.
    """

    __slots__ = ("_graph_of", "_several", "_sums", "_to_come", "_total", "_waiting")

    def __init__(self, sums: Sums, targets: Sequence[Target], several: Collection[int]) -> None:
        super().__init__()
        self._sums = sums
        self._several = several
        self._graph_of = _graphs(target.edge for target in targets if isinstance(target, Made))
        self._to_come = Counter(self._way(target) for target in targets)
        self._waiting: dict[object, Sums] = {}  # by way
        self._total: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the parameter: it, and what has come

    def _way(self, target: Target) -> object:
        """The same for targets whose gradients come to their parameters together."""
        if isinstance(target, Made):
            return self._graph_of[target.edge]
        return (id(target.parameter), target.region) if isinstance(target, Cast) else id(target)

    def add(self, target: Target, gradient: Tensor) -> None:
        if isinstance(target, Tensor):
            self._come_to(target, gradient)
            return
        way = self._way(target)
        leaves = [target.parameter] if isinstance(target, Cast) else self._graph_of[target.edge].leaves
        if not any(id(leaf) in self._several for leaf in leaves):
            self._sums.add(target, gradient)
            return
        if isinstance(target, Cast) and gradient.dtype is target.parameter.dtype:  # autocast lets it be
            self._come_to(target.parameter, gradient)
        else:
            self._waiting.setdefault(way, Sums()).add(target, gradient)
        self._to_come[way] -= 1
        if self._to_come[way] == 0 and way in self._waiting:
            targets, gradients = self._waiting.pop(way).cast_back()
            if isinstance(way, _Graph):
                self._go_through(way, [t.edge for t in targets if isinstance(t, Made)], gradients)
            else:
                self._come_to(cast(Tensor, targets[0]), gradients[0])

    def _come_to(self, parameter: Tensor, gradient: Tensor) -> None:
        if id(parameter) not in self._several:
            self._sums.add(parameter, gradient)
            return
        so_far = self._total.get(id(parameter))
        self._total[id(parameter)] = parameter, gradient if so_far is None else so_far[1] + gradient

    def _go_through(self, graph: _Graph, edges: Sequence[GradientEdge], gradients: Sequence[Tensor]) -> None:
        """What has come to the parameters enters with it, so that what comes on several ways is added one by one."""
        leaves = [leaf for leaf in graph.leaves if leaf.requires_grad]
        begun = [self._total.pop(id(leaf)) for leaf in leaves if id(leaf) in self._total]
        silence = Silence()  # their hooks wait for the whole gradient
        for leaf in leaves:
            silence.of(leaf)
        try:
            with naming_graphs_that_are_gone():
                found = torch.autograd.grad(
                    [*(leaf for leaf, _ in begun), *cast(list[Any], edges)], leaves,
                    [*(total for _, total in begun), *gradients], allow_unused=True,
                )  # fmt: skip
        finally:
            silence.end()
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                self._come_to(leaf, gradient)

    def finish(self) -> None:
        """All have come."""
        for parameter, gradient in self._total.values():
            self._sums.add(parameter, gradient)


def given(targets: Iterable[Target], several: Collection[int]) -> list[Target] | None:
    """To whom ``InOrder`` gives gradients, as often as it does; None where a graph decides."""
    found: list[Target] = []
    at_the_end: dict[int, Tensor] = {}
    for target in targets:
        leaves = leaves_of(target)
        if not any(id(leaf) in several for leaf in leaves):
            found.append(target)
        elif isinstance(target, Made):
            return None
        else:
            at_the_end[id(leaves[0])] = leaves[0]
    return found + list(at_the_end.values())


class _Graph:
    """Of one or more things that are made of parameters: what nodes they share with no other."""

    def __init__(self, edge: GradientEdge) -> None:
        self.nodes = set(reachable((edge.node,)))
        leaves = {node for node in self.nodes if hasattr(node, "variable")}
        self.nodes -= leaves
        self.leaves: list[Tensor] = [node.variable for node in leaves]

    def join(self, other: _Graph) -> None:
        self.nodes |= other.nodes
        known = {id(leaf) for leaf in self.leaves}
        self.leaves += [leaf for leaf in other.leaves if id(leaf) not in known]


def _graphs(edges: Iterable[GradientEdge]) -> dict[GradientEdge, _Graph]:
    """By edge; those that share nodes have one."""
    found: dict[GradientEdge, _Graph] = {}
    for edge in dict.fromkeys(edges):
        graph = _Graph(edge)
        sharing = {id(g): g for g in found.values() if not g.nodes.isdisjoint(graph.nodes)}
        for other in sharing.values():
            graph.join(other)
        found = {e: graph if id(g) in sharing else g for e, g in found.items()} | {edge: graph}
    return found
