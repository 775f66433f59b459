"""The graph of a backward in two parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pipex.backward.graph_cut import Cut, cut

aten = torch.ops.aten
X, Y = torch.randn(3, 3), torch.randn(3, 3)


def traced(function: Callable[..., Sequence[Any]], *inputs: Any) -> fx.GraphModule:
    return make_fx(function)(*inputs)


def run(parts: Cut, *inputs: Any) -> tuple[list[Any], int]:
    """What the whole graph gives, and how many values the first part has made for the second."""
    of_first = [] if parts.first is None else list(parts.first(*inputs))
    kept, made = of_first[: parts.kept], of_first[parts.kept :]
    read = [inputs[s.place] if s.kind == "saved" else made[s.place] for s in parts.reads]
    second = [] if parts.second is None else list(parts.second(*read))
    values = {"saved": inputs, "made": made, "second": second, "first": kept}
    return [None if s is None else values[s.kind][s.place] for s in parts.outputs], len(made)


def operations(part: fx.GraphModule | None) -> list[str]:
    nodes = [] if part is None else part.graph.nodes
    return [n.target.__name__.split(".")[0] for n in nodes if n.op == "call_function"]


def check(function: Callable[..., Sequence[Any]], later: set[int], made: int, *inputs: Any) -> Cut:
    parts = cut(traced(function, *inputs), inputs, later)
    found, count = run(parts, *inputs)
    for one, other in zip(found, function(*inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert count == made
    return parts


def test_each_part_computes_what_the_other_does_not() -> None:
    def backward(x: Tensor, dy: Tensor) -> list[Tensor]:
        dz = dy.tanh()
        return [dz @ x, dz.t() @ x.exp(), dz.sum(0)]

    parts = check(backward, {1, 2}, 1, X, Y)
    assert operations(parts.first) == ["tanh", "mm"]
    assert operations(parts.second) == ["t", "exp", "mm", "sum"]


def test_views_are_made_again_rather_than_kept() -> None:
    def backward(x: Tensor, dy: Tensor) -> list[Tensor]:
        turned = dy.t()
        return [turned @ x, turned.sum(1)]

    parts = check(backward, {1}, 0, X, Y)
    assert operations(parts.second) == ["t", "sum"]


def test_what_stands_in_the_first_part_is_handed_on() -> None:
    def backward(x: Tensor, dy: Tensor) -> list[Tensor]:
        dz = dy * x
        return [dz.sum(), dz, dy]

    parts = check(backward, {1, 2}, 1, X, Y)
    assert parts.second is None
    assert [None if s is None else s.kind for s in parts.outputs] == ["first", "made", "saved"]


def test_members_of_tuples_are_made_where_the_tuple_is() -> None:
    def backward(x: Tensor, dy: Tensor) -> list[Tensor]:
        variance, mean = torch.var_mean(dy, 0)
        return [mean * x, variance.exp()]

    parts = check(backward, {1}, 1, X, Y)
    assert operations(parts.second) == ["exp"]


def test_of_what_is_needed_for_its_size_the_size_is_kept() -> None:
    def backward(x: Tensor, dy: Tensor) -> list[Tensor]:
        dz = torch.cat([dy, dy]).tanh()
        return [dz @ x, x.sum() * dz.shape[0]]

    parts = cut(make_fx(backward, tracing_mode="symbolic")(X, Y), (X, Y), {1})
    assert "sym_size" not in operations(parts.second)
    torch.testing.assert_close(run(parts, X, Y)[0], backward(X, Y), rtol=0, atol=0)


def test_nothing_but_later_gradients_needs_no_first_part() -> None:
    def backward(x: Tensor, dy: Tensor) -> list[Tensor | None]:
        return [None, dy.t() @ x]

    parts = cut(traced(lambda x, dy: [None, dy.t() @ x], X, Y), (X, Y), {1})
    assert parts.first is None
    torch.testing.assert_close(run(parts, X, Y)[0][1], backward(X, Y)[1])


def test_a_convolution_is_made_in_parts_where_its_weight_waits() -> None:
    x, weight, dy = torch.randn(2, 3, 5), torch.randn(4, 3, 3), torch.randn(2, 4, 3)

    def backward(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
        made = aten.convolution_backward(dy, x, weight, [4], [1], [0], [1], False, [0], 1, [True, True, True])
        return list(made)

    parts = check(backward, {1, 2}, 0, x, weight, dy)
    assert operations(parts.first) == ["convolution_backward", "getitem"]
    assert operations(parts.second) == ["convolution_backward", "getitem", "getitem"]
    parts = check(backward, {2}, 1, x, weight, dy)
    assert operations(parts.second) == [], "its weight is needed at once"


def test_random_numbers_are_drawn_in_the_first_part() -> None:
    def backward(x: Tensor, dy: Tensor) -> list[Tensor]:
        return [dy @ x, torch.rand_like(dy) * x]

    parts = cut(traced(backward, X, Y), (X, Y), {1})
    assert "rand_like" in operations(parts.first)
    assert "rand_like" not in operations(parts.second)


def test_a_graph_that_writes_to_its_inputs_stays_whole() -> None:
    def backward(x: Tensor, dy: Tensor) -> list[Tensor]:
        dx = dy @ x
        x.add_(1)
        return [dx, dy.t() @ x]

    parts = cut(traced(backward, X.clone(), Y), (X, Y), {1})
    assert parts.second is None
    copy = X.clone()
    torch.testing.assert_close(run(parts, X.clone(), Y)[0], list(backward(copy, Y)))


@pytest.mark.parametrize("part", ["first", "second"])
def test_no_part_has_the_code_of_a_graph_that_is_not_cut(part: str) -> None:
    """Or a cache of compiled graphs would give one for the other, with memory that it may write over."""

    def backward(x: Tensor, dy: Tensor) -> list[Tensor]:
        return [dy @ x]

    of_both = traced(lambda x, dy: [dy @ x, dy @ x.exp()], X, Y)
    found = getattr(cut(of_both, (X, Y), {1} if part == "first" else {0}), part)
    assert operations(found) == operations(traced(backward, X, Y))
    assert not {n.name for n in found.graph.nodes if n.op == "placeholder"} & {
        n.name for n in of_both.graph.nodes if n.op == "placeholder"
    }
