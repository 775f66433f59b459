"""What recorded operations have in the place of their weights, and where the weights' gradients go.

A weight is a parameter, or a tensor that is made of parameters alone: a cast, a transpose, a chunk, the product of a
LoRA pair, what a parametrization gives. The operation reads an alias of either; what W makes is the gradient of

    a parameter         which is added to ``.grad`` as autograd does (``accumulate``)
    something made      which goes on to its parameters through its own graph, in W: autograd runs the backward of the
                        cast or of the parametrization, and knows where uses of one parameter are summed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pipex.torch_internals import is_view


class Made(NamedTuple):
    """Where the gradient of something made of parameters enters its graph.

    Attributes:
        edge: the tensor itself is not kept.
        cast_of: the parameter of which it is a cast, if it is nothing else.
    """

    edge: GradientEdge
    cast_of: Tensor | None = None


Target = Tensor | Made
"""Whose gradient W makes."""


def leaves_of(target: Target) -> list[Tensor]:
    """The parameters to which its gradient goes."""
    if not isinstance(target, Made):
        return [target]
    if target.cast_of is not None:
        return [target.cast_of]
    return [node.variable for node in reachable((target.edge.node,)) if hasattr(node, "variable")]


class Weight(NamedTuple):
    """What stands for a weight in one operation, and whose gradient that operation gives."""

    alias: Tensor
    target: Target


def parameter_of(target: Target | None) -> Tensor | None:
    """The parameter to whose gradient that of the target may be added as it is, if it is cast."""
    return target.cast_of if isinstance(target, Made) else target


class Origins:
    """Tells during one forward what is made of parameters alone.

    Args:
        is_parameter: whether a leaf is one of those whose gradients may wait.
    """

    __slots__ = ("_is_parameter", "_known")

    def __init__(self, is_parameter: Callable[[Tensor], bool]) -> None:
        self._is_parameter = is_parameter
        self._known: dict[Any, bool] = {}  # by autograd's node, which is held so that it is known again

    def parameters(self, tensor: Tensor) -> list[Tensor]:
        """Those that a tensor with a graph is made of; none if of anything else too."""
        root = tensor.grad_fn
        return [node.variable for node in reachable((root,)) if hasattr(node, "variable")] if self._are(root) else []

    def _are(self, root: Any) -> bool:
        """Looks at every node once in a forward."""
        known = self._known
        if root in known:
            return known[root]
        path: list[tuple[Any, Iterator[Any]]] = [(root, _following(root))]
        while path:
            node, following = path[-1]
            after = next(following, None)
            if after is None:
                known[node] = self._ends_well(node)
            elif after not in known:
                path.append((after, _following(after)))
                continue
            elif known[after]:
                continue
            else:
                known[node] = False
            path.pop()
            if not known[node]:  # then nothing is that it is in
                for above, _ in path:
                    known[above] = False
                return False
        return True

    def _ends_well(self, node: Any) -> bool:
        """Of one all of whose inputs with a gradient are made of parameters."""
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            return self._is_parameter(leaf)
        return any(True for _ in _following(node))


def reachable(roots: Iterable[Any]) -> Iterator[Any]:
    """The nodes of a graph, each once."""
    todo = list(roots)
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for following in _following(node):
            if following not in seen:
                seen.add(following)
                todo.append(following)


def _following(node: Any) -> Iterator[Any]:
    return (following for following, _ in node.next_functions if following is not None)


class Casts:
    """autocast's casts of the operands of one forward, with its cache: in one region a leaf in float32 is cast once, so
    that gradients of its uses are summed in the lower precision, and cast back once.

    A region ends when torch clears its own cache (``recording``).
    """

    __slots__ = ("_cache", "_leaves", "_region", "_weights")

    def __init__(self) -> None:
        self._cache: dict[int, Tensor] = {}  # by id of the leaf
        self._leaves: dict[int, Tensor] = {}  # by id of its cast
        self._weights: dict[int, Weight] = {}  # by that too
        self._region = -1

    def of(self, region: int, *operands: Tensor | None) -> list[Tensor | None]:
        """The operands of an operation that autocast runs in lower precision."""
        if region != self._region:
            self._region = region
            for known in (self._cache, self._leaves, self._weights):
                known.clear()
        return [None if operand is None else self._of(operand) for operand in operands]

    def _of(self, operand: Tensor) -> Tensor:
        device = operand.device.type
        if not torch.is_autocast_enabled(device):
            return operand
        dtype = torch.get_autocast_dtype(device)
        if operand.dtype in (dtype, torch.float64) or not operand.is_floating_point():
            return operand
        cached = operand.dtype is torch.float32 and operand.requires_grad and operand.is_leaf and not is_view(operand)
        if not cached or not torch.is_autocast_cache_enabled():
            return operand.to(dtype)
        found = self._cache.get(id(operand))
        if found is None:
            found = self._cache[id(operand)] = operand.to(dtype)
            self._leaves[id(found)] = operand
        return found

    def leaf(self, cast: Tensor) -> Tensor | None:
        """That this is the cast of, if it was made here."""
        return self._leaves.get(id(cast))

    def weight(self, cast: Tensor) -> Weight:
        """The cast of a parameter as a weight."""
        known = self._weights.get(id(cast))
        if known is None:
            known = self._weights[id(cast)] = made(cast, self._leaves[id(cast)])
        return known


def made(tensor: Tensor, cast_of: Tensor | None = None) -> Weight:
    """For a tensor that is made of parameters alone."""
    return Weight(tensor.detach(), Made(get_gradient_edge(tensor), cast_of))
