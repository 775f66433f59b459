"""How many layers each stage gets, against brute force over all cuts."""

import json
from collections.abc import Sequence
from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipex.errors import ConfigMismatch, InputError
from pipex.partition import split, split_model
from pipex.partition.balance import by_parameters, layer_counts
from pipex.plan import build
from pipex.plan.fit import fit
from pipex.plan.layer_costs import Layer, LayerCosts
from pipex.runtime import worlds
from pipex.runtime.launch import launch
from pipex.runtime.worlds import current_world


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
    with pytest.raises(
        InputError, match="got 'flops'; needed 'uniform', 'parameters', 'profile', layer costs or a list"
    ):
        layer_counts([nn.Identity()] * 7, 2, "flops")  # type: ignore[arg-type]


def costs_of(*times: float) -> LayerCosts:
    return LayerCosts(tuple(Layer(f"layer {i}", t, t, t, 1, 1, 1, 1) for i, t in enumerate(times)))


def model(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))


def test_layer_costs_balance_the_stages_times() -> None:
    assert layer_counts([nn.Identity()] * 6, 3, costs_of(1, 1, 1, 1, 4, 4)) == [4, 1, 1]
    assert [len(stage.layers) for stage in split_model(model(6), 3, costs_of(9, 1, 1, 1, 1, 1))] == [1, 2, 3]


def test_for_a_plan_the_ranks_share_the_work_not_the_stages() -> None:
    costs = costs_of(*[1.0] * 15, 5.0)
    plan = build("interleaved", 2, 4, chunks=2)
    counts = [len(stage.layers) for stage in split_model(model(16), plan, costs)]
    assert counts == list(fit(costs, plan).counts)
    assert counts[0] + counts[2] == counts[1] + counts[3] + 4  # the head takes as long as 5 others


def test_for_a_plan_its_order_of_actions_counts() -> None:
    """With as few micro-batches as ranks, filling the pipeline matters more than its slowest stage."""
    costs = costs_of(4, 4, 1, 3, 4, 4, 3, 4)
    assert [len(stage.layers) for stage in split_model(model(8), 3, costs)] == [2, 3, 3]
    assert [len(stage.layers) for stage in split_model(model(8), build("1f1b", 3, 3), costs)] == [4, 2, 2]


def test_a_plan_says_how_many_stages_there_are() -> None:
    plan = build("1f1b", 3, 4)
    assert [len(stage.layers) for stage in split_model(model(7), plan)] == [3, 2, 2]
    with pytest.raises(InputError, match="needed 3 counts of at least 1 with the sum 7"):
        split_model(model(7), plan, [3, 4])


@pytest.mark.parametrize("balance", ["uniform", "parameters", [2, 2, 2, 2]])
def test_for_two_copies_the_model_is_cut_once(balance: Any) -> None:
    plan = build("chimera", 4, 4)
    assert [len(stage.layers) for stage in split_model(model(8), plan, balance)] == [2, 2, 2, 2]
    costs = costs_of(1, 1, 2, 1, 1, 3, 1, 1)
    assert [len(stage.layers) for stage in split_model(model(8), plan, costs)] == list(fit(costs, plan).counts)


def test_costs_of_another_number_of_layers_are_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match="got costs of 5 layers for a model of 6"):
        split_model(model(6), 3, costs_of(1, 1, 1, 1, 1))


SAMPLE = {"sample": torch.ones(4, 2), "target": torch.ones(4, 2), "loss_fn": nn.functional.mse_loss}


def test_profile_cuts_by_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def measured(*arguments: object, layers: None) -> LayerCosts:
        given.append(arguments)
        return costs_of(9, 1, 1, 1, 1, 1)

    monkeypatch.setattr(split, "profile_layers", measured)
    whole = model(6)
    assert [len(stage.layers) for stage in split_model(whole, 3, "profile", **SAMPLE)] == [1, 2, 3]  # type: ignore[arg-type]
    assert given == [(whole, *SAMPLE.values())]


def test_profile_measures_for_a_plan_too() -> None:
    parts = split_model(model(5), build("zb-h1", 2, 4), "profile", **SAMPLE)  # type: ignore[arg-type]
    assert sum(len(stage.layers) for stage in parts) == 5
    assert [stage.count for stage in parts] == [2, 2]


def exchange_with(*others: bytes) -> "split.Exchange":
    def exchange(payload: bytes) -> Sequence[bytes]:
        return [others[0], payload, *others[1:]]

    return exchange


def test_all_ranks_cut_by_what_rank_0_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "profile_layers", lambda *_, layers: costs_of(9, 1, 1, 1, 1, 1))
    theirs = json.dumps(["split_model(balance='profile')", costs_of(1, 1, 1, 1, 1, 9).to_text()]).encode()
    parts = split_model(model(6), 2, "profile", **SAMPLE, exchange=exchange_with(theirs, theirs))  # type: ignore[arg-type]
    assert [len(stage.layers) for stage in parts] == [5, 1]


def counts_of_this_rank() -> list[int]:
    exchange = current_world().exchange
    return [len(s.layers) for s in split_model(model(40), 5, "profile", **SAMPLE, exchange=exchange)]  # type: ignore[arg-type]


def test_ranks_that_measure_for_themselves_cut_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "threads_per_rank", lambda ranks: 1)  # then ranks are forked, and run any function
    first, second = launch(counts_of_this_rank, 2)
    assert first == second
    assert sum(first) == 40


@pytest.mark.parametrize(
    ("other", "said"), [(b"", "the end of its run"), (b'["Pipeline(...)", {"ranks": 2}]', r"Pipeline\(...\)")]
)
def test_a_rank_that_does_something_else_is_named(other: bytes, said: str) -> None:
    with pytest.raises(ConfigMismatch, match=f"got {said} on rank 0; needed split_model"):
        split_model(model(3), 2, "profile", **SAMPLE, exchange=exchange_with(other))  # type: ignore[arg-type]


def test_profile_without_a_sample_is_refused_and_a_sample_without_profile_too() -> None:
    with pytest.raises(
        InputError, match="has nothing to measure with; got none of them; needed sample, target and loss"
    ):
        split_model(model(3), 2, "profile")
    with pytest.raises(InputError, match="got sample; needed sample, target and loss_fn"):
        split_model(model(3), 2, "profile", sample=torch.ones(1, 2))
    with pytest.raises(InputError, match="sample, target, loss_fn and exchange are for balance='profile'"):
        split_model(model(3), 2, sample=torch.ones(1, 2))
    with pytest.raises(InputError, match="a model of 3 layers cannot be cut into 4 stages"):
        split_model(model(3), 4, "profile")
