"""How many layers each stage gets, against brute force over all cuts."""

from itertools import accumulate, combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipex.errors import InputError
from pipex.partition.balance import by_parameters, layer_counts, uniform


def layer(*parameters: nn.Parameter) -> nn.Module:
    return nn.ParameterList(parameters)


def weight(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size))


def stage_sizes(layers: list[nn.Module], counts: list[int]) -> list[int]:
    """Parameters per stage, a shared one once."""
    return [
        sum({id(p): p.numel() for part in layers[begin:end] for p in part.parameters()}.values())
        for begin, end in pairwise(accumulate(counts, initial=0))
    ]


def every_cut(layers: int, stages: int) -> list[list[int]]:
    return [[b - a for a, b in pairwise((0, *cut, layers))] for cut in combinations(range(1, layers), stages - 1)]


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [(1, 1, [1]), (4, 4, [1, 1, 1, 1]), (9, 4, [3, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (34, 8, [5, 5, 4, 4, 4, 4, 4, 4])],
)
def test_uniform_gives_the_extra_layers_to_the_first_stages(layers: int, stages: int, counts: list[int]) -> None:
    assert uniform(layers, stages) == counts


@given(st.data())
def test_parameters_finds_the_best_of_all_cuts(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    layers = [layer(weight(size)) for size in sizes]
    stages = data.draw(st.integers(1, len(layers)))
    # Some layers also use the weight of an earlier one, as an output head does with the embedding's.
    for user in data.draw(st.lists(st.integers(0, len(layers) - 1), max_size=3)):
        lender = data.draw(st.integers(0, user))
        layers[user].extend(list(layers[lender].parameters())[:1])

    counts = by_parameters(layers, stages)

    assert len(counts) == stages
    assert sum(counts) == len(layers)
    assert min(counts) >= 1
    assert max(stage_sizes(layers, counts)) == min(
        max(stage_sizes(layers, cut)) for cut in every_cut(len(sizes), stages)
    )


def test_parameters_evens_out_the_stages_below_the_largest() -> None:
    assert sorted(by_parameters([layer(weight(5)) for _ in range(9)], 4)) == [2, 2, 2, 3]


def test_parameters_counts_a_shared_weight_once_in_a_stage() -> None:
    shared = weight(10)
    layers = [layer(shared), layer(shared), layer(shared), layer(weight(8)), layer(weight(8))]
    assert by_parameters(layers, 2) == [3, 2]  # 10 and 16; counted at each use, [2, 3] would look better


def test_parameters_counts_a_shared_weight_in_every_stage_that_uses_it() -> None:
    shared = weight(10)
    layers = [layer(shared), layer(weight(9)), layer(shared), layer(weight(3))]
    assert by_parameters(layers, 2) == [3, 1]  # 19 and 3; counted at its first use only, [1, 3] would look better


def test_given_counts_are_taken() -> None:
    assert layer_counts([nn.Identity()] * 7, 3, [1, 5, 1]) == [1, 5, 1]


@pytest.mark.parametrize("counts", [[1, 5], [1, 5, 2], [0, 6, 1], [2, 2, 2, 1], [-1, 7, 1]])
def test_counts_that_do_not_fit_are_refused_with_the_numbers(counts: list[int]) -> None:
    with pytest.raises(InputError, match=r"3 counts of at least 1 with the sum 7") as caught:
        layer_counts([nn.Identity()] * 7, 3, counts)
    assert str(counts) in str(caught.value)


@pytest.mark.parametrize("stages", [0, -1, 8])
def test_a_number_of_stages_that_does_not_fit_is_refused_with_both_numbers(stages: int) -> None:
    with pytest.raises(InputError, match=rf"7 layers cannot be cut into {stages} stages; needed 1 to 7"):
        layer_counts([nn.Identity()] * 7, stages, "uniform")


def test_an_unknown_balance_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="got 'flops'; needed 'uniform', 'parameters'"):
        layer_counts([nn.Identity()] * 7, 2, "flops")  # type: ignore[arg-type]
