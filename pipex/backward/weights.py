"""What recorded operations have in the place of their weights, and where the weights' gradients go.

A weight is a parameter, or a tensor that is made of parameters alone: a cast, a transpose, a chunk, the product of a
LoRA pair, what a parametrization gives. The operation reads an alias of either; what W makes is the gradient of

    a parameter         which is added to ``.grad`` as autograd does (``accumulate``)
    autocast's cast     summed over the region in which it was cast, then cast back
    something made      which goes on to its parameters through its own graph, in W: autograd runs the backward of the
                        parametrization, and knows where uses of one parameter are summed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pipex.torch_internals import is_view


class Made(NamedTuple):
    """Something made of parameters: where its gradient enters its graph. The tensor itself is not kept."""

    edge: GradientEdge
    dtype: torch.dtype


class Cast(NamedTuple):
    """A parameter as it was cast in one region of autocast."""

    parameter: Tensor
    region: int


Target = Tensor | Made | Cast
"""Whose gradient W makes."""


def leaves_of(target: Target) -> list[Tensor]:
    """The parameters to which its gradient goes."""
    if not isinstance(target, Made):
        return [target.parameter if isinstance(target, Cast) else target]
    return [node.variable for node in reachable((target.edge.node,)) if hasattr(node, "variable")]


class Weight(NamedTuple):
    """What stands for a weight in one operation, and whose gradient that operation gives."""

    alias: Tensor
    target: Target


class Layer(NamedTuple):
    """The parameters of a linear layer that is known, and their aliases."""

    weight: Tensor
    bias: Tensor | None
    weight_alias: Tensor
    bias_alias: Tensor | None

    def is_as_it_was(self, bias: Tensor | None) -> bool:
        """Whether it is this bias that goes with the weight, and both are trained and where they were."""
        weight, its_bias, weight_alias, bias_alias = self
        return (
            bias is its_bias
            and weight.requires_grad
            and weight.is_set_to(weight_alias)
            and (bias is None or (bias.requires_grad and bias.is_set_to(bias_alias)))  # type: ignore[arg-type]
        )


def parameter_of(target: Target | None) -> Tensor | None:
    """The parameter of which the target is all that is used, if it is one."""
    if isinstance(target, Cast):
        return target.parameter
    return None if isinstance(target, Made) else target


class Origins:
    """Tells during one forward what is made of parameters alone."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}  # by autograd's node, which is held so that it is known again

    def parameters(self, tensor: Tensor, is_one: Callable[[Tensor], bool]) -> list[Tensor]:
        """Those that a tensor with a graph is made of; none if of anything else too.

        Args:
            is_one: whether a leaf is one of those whose gradients may wait.
        """
        root = tensor.grad_fn
        if not self._are(root, is_one):
            return []
        return [node.variable for node in reachable((root,)) if hasattr(node, "variable")]

    def exclude(self, nodes: Iterable[Any]) -> None:
        """Of recorded operations, whose graphs have no way to their weights."""
        self._known.update(dict.fromkeys(nodes, False))

    def _are(self, root: Any, is_one: Callable[[Tensor], bool]) -> bool:
        """Looks at every node once in a forward."""
        known = self._known
        if root in known:
            return known[root]
        path: list[tuple[Any, Iterator[Any]]] = [(root, _following(root))]
        while path:
            node, following = path[-1]
            after = next(following, None)
            if after is None:
                known[node] = _ends_well(node, is_one)
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


def _ends_well(node: Any, is_one: Callable[[Tensor], bool]) -> bool:
    """Of a node all of whose inputs with a gradient are made of parameters."""
    leaf = getattr(node, "variable", None)
    if isinstance(leaf, Tensor):
        return is_one(leaf)
    if isinstance(node, BackwardCFunction):  # a user's own Function, or one that leaves something to W
        return False
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
    """autocast's casts for the operations of one forward, with its cache: in one region a leaf in float32 is cast once.

    Weights of recorded operations are left for autocast itself to cast, which is cheaper, but for those that are used
    more than once.

    Args:
        region: of autocast, which ends when torch clears its own cache (``recording``).
        is_weight: whether the gradient of a leaf may wait.
    """

    __slots__ = ("_cache", "_is_weight", "_seen", "region")

    def __init__(self, region: int, is_weight: Callable[[Tensor], bool]) -> None:
        self.region = region
        self._is_weight = is_weight
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the leaf: it, and its cast
        self._seen: set[int] = set()  # ids of weights

    def of(self, operand: Tensor) -> Tensor:
        """An operand of an operation that autocast runs in lower precision; a weight stays as it is."""
        device, now = operand.device.type, operand.dtype
        if not torch.is_autocast_enabled(device):
            return operand
        dtype = torch.get_autocast_dtype(device)
        if now is dtype or now is torch.float64 or not now.is_floating_point:
            return operand
        if not operand.is_leaf:
            return operand.to(dtype)
        if self._is_weight(operand):
            return operand
        return self._cached(operand, operand, dtype) if is_cached(operand) else operand.to(dtype)

    def again(self, leaf: Tensor, alias: Tensor) -> Tensor:
        """The alias of a weight, cast if this is not its first use."""
        device = alias.device.type
        if id(leaf) in self._seen and torch.is_autocast_enabled(device):
            return self._cached(leaf, alias, torch.get_autocast_dtype(device))
        self._seen.add(id(leaf))
        return alias

    def _cached(self, leaf: Tensor, operand: Tensor, dtype: torch.dtype) -> Tensor:
        known = self._cache.get(id(leaf))
        if known is None:
            known = self._cache[id(leaf)] = leaf, operand.to(dtype)
        return known[1]


def is_cached(leaf: Tensor) -> bool:
    """Whether autocast keeps a leaf's cast, so that gradients of its uses in a region are summed in lower precision."""
    return (
        leaf.dtype is torch.float32 and leaf.requires_grad and not is_view(leaf) and torch.is_autocast_cache_enabled()
    )


def made(tensor: Tensor) -> Weight:
    """For a tensor that is made of parameters alone."""
    return Weight(tensor.detach(), Made(get_gradient_edge(tensor), tensor.dtype))
