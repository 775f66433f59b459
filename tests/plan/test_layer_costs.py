"""Costs layer by layer: what stages cost by them, and their file."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from cases import SEED

from pipex.errors import InputError
from pipex.plan.cut import cut
from pipex.plan.layer_costs import FORMAT, Layer, LayerCosts
from pipex.plan.placement import Edge, Placement
from pipex.plan.search import search

EMBED = Layer("embed", 1.0, 0.5, 0.25, activation=10, deferred=20, parameters=1000, output=7)
BLOCK = Layer("block", 3.0, 4.0, 2.0, activation=100, deferred=60, parameters=400, output=8)
HEAD = Layer("head", 5.0, 6.0, 7.0, activation=50, deferred=30, parameters=900, output=4)
COSTS = LayerCosts((EMBED, BLOCK, BLOCK, HEAD), latency=0.5, bandwidth=16.0, about="made up")


def test_a_stage_costs_what_its_layers_cost() -> None:
    costs = COSTS.of(Placement("loop", 2), (3, 1))
    assert costs.forward == [7.0, 5.0]
    assert costs.input_gradient == [8.5, 6.0]
    assert costs.weight_gradient == [4.25, 7.0]
    assert costs.deferred == [140, 30]


def test_a_stage_holds_its_output_too_but_the_last_one_has_a_loss() -> None:
    assert COSTS.of(Placement("loop", 2), (3, 1)).activation == [210 + 8, 50]
    assert COSTS.of(Placement("loop", 1), (4,)).activation == [260]
    assert COSTS.of(Placement("bidirectional", 2, 2), (1, 3)).activation == [10 + 7, 250, 10 + 7, 250]


def test_a_hop_takes_the_latency_and_its_bytes_in_both_directions() -> None:
    assert COSTS.of(Placement("loop", 3), (1, 2, 1)).hop == {
        Edge(0, 1, "activation"): 0.5 + 7 / 16,
        Edge(1, 0, "gradient"): 0.5 + 7 / 16,
        Edge(1, 2, "activation"): 0.5 + 8 / 16,
        Edge(2, 1, "gradient"): 0.5 + 8 / 16,
    }
    free = replace(COSTS, bandwidth=None, latency=0.25)
    assert set(free.of(Placement("loop", 3), (1, 2, 1)).hop.values()) == {0.25}


def test_both_pipes_of_a_bidirectional_placement_are_cut_alike() -> None:
    costs = COSTS.of(Placement("bidirectional", 2, 2), (3, 1))
    assert costs.forward == [7.0, 5.0, 7.0, 5.0]
    assert costs.hop[Edge(2, 3, "activation")] == costs.hop[Edge(3, 2, "gradient")] == 1.0


def test_two_copies_hold_all_weights_twice_and_exchange_what_a_rank_holds() -> None:
    """Where weights are not counted, their gradients travel all the same."""
    for counts, parameters in (((3, 1), 2700), ((1, 3), 2700)):
        both = COSTS.of(Placement("bidirectional", 2, 2), counts)
        assert both.weights is None
        assert both.exchange == 0.5 + parameters / 16
    counted = replace(COSTS, state=3.0)
    assert counted.of(Placement("bidirectional", 2, 2), (3, 1)).weights == [5400, 2700, 5400, 2700]
    assert counted.of(Placement("loop", 2), (3, 1)).weights == [5400, 2700]
    assert counted.of(Placement("loop", 2), (3, 1)).exchange == 0
    halves = counted.of(Placement("bidirectional", 4, 2), (1, 1, 1, 1))
    assert halves.exchange == 0.5 + (1000 + 900) / 16  # of ranks 0 and 3; the other two exchange less
    assert replace(counted, bandwidth=None).of(Placement("bidirectional", 2, 2), (3, 1)).exchange == 0.5
    with pytest.raises(InputError, match="bad cost: state; got -1"):
        replace(COSTS, state=-1)


@pytest.mark.parametrize(
    "placement",
    [Placement("loop", 3), Placement("v", 2, 2), Placement("loop", 2, 2), Placement("bidirectional", 2, 2)],
    ids=str,
)
def test_on_a_placement_the_layers_are_cut_for_it(placement: Placement) -> None:
    times = (1.75, 9.0, 9.0, 18.0)
    assert COSTS.times == times
    assert COSTS.on(placement) == COSTS.of(placement, cut(times, placement).counts)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(InputError, match="a model of 4 layers cannot be cut into 5 stages"):
        COSTS.on(Placement("loop", 5))


@pytest.mark.parametrize("bandwidth", [16.0, None])
def test_a_file_gives_back_what_was_written(bandwidth: float | None, tmp_path: Path) -> None:
    costs = replace(COSTS, bandwidth=bandwidth, about='é → "x"\n')
    costs.write(tmp_path / "costs.json")
    assert LayerCosts.read(tmp_path / "costs.json") == costs
    content = json.loads((tmp_path / "costs.json").read_text())
    assert content["format"] == FORMAT
    assert content["layers"][0]["weight_gradient"] == 0.25


def content() -> dict[str, Any]:
    loaded = json.loads(COSTS.to_text())
    assert isinstance(loaded, dict)
    return loaded


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in content().items() if k != key}


def with_layer(index: int, **change: Any) -> dict[str, Any]:
    changed = content()
    changed["layers"][index] |= change
    return changed


def lacking(index: int, key: str) -> dict[str, Any]:
    changed = content()
    del changed["layers"][index][key]
    return changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.json cannot be read as JSON"),
        ("{", "x.json cannot be read as JSON"),
        ("[" * 100_000, "x.json cannot be read as JSON"),
        ('{"format": 1, "format": 2}', "a key stands twice among format, format"),
        (COSTS.to_text() + "x", "x.json cannot be read as JSON"),
        ("[]", "x.json is of another format; got list"),
        ("{}", "x.json is of another format; got None"),
        (content() | {"format": "pipex layer costs 2"}, "x.json is of another format; got 'pipex layer costs 2'"),
        (without("latency"), "x.json lacks latency; got format, about, bandwidth, layers"),
        (content() | {"hop": 1}, "x.json has an unknown key; got hop"),
        (content() | {"about": 3}, "about in x.json is no text; got 3"),
        (content() | {"layers": {}}, "layers in x.json is no list; got dict"),
        (content() | {"layers": []}, "no layers"),
        (content() | {"layers": [3]}, "layer 0 in x.json has no name"),
        (with_layer(2, name=None), "layer 2 in x.json has no name"),
        (lacking(1, "deferred"), "layer 1 (block) in x.json lacks deferred"),
        (with_layer(3, flops=1), "layer 3 (head) in x.json has an unknown key; got flops"),
        (with_layer(3, forward=-1.0), "forward of layer 3 (head); got -1.0; needed 0, or a number from 1e-100"),
        (with_layer(0, output="7"), "bad cost: output of layer 0 (embed); got '7'"),
        (with_layer(0, output=None), "bad cost: output of layer 0 (embed); got None"),
        (with_layer(0, output=True), "bad cost: output of layer 0 (embed); got True"),
        (with_layer(0, output=[1]), "bad cost: output of layer 0 (embed); got [1]"),
        (with_layer(0, forward=math.nan), "NaN is no number of JSON"),
        (with_layer(0, forward=math.inf), "Infinity is no number of JSON"),
        (json.dumps(with_layer(0, forward=123.5)).replace("123.5", "1e999"), "forward of layer 0 (embed); got inf"),
        (with_layer(0, output=10**400), "bad cost: output of layer 0 (embed); got 1000"),
        (with_layer(1, forward=1e308), "forward of layer 1 (block); got 1e+308; needed 0, or a number"),
        (with_layer(1, activation=1e-320), "activation of layer 1 (block); got 1e-320; needed 0, or a number"),
        (content() | {"latency": 1e-320}, "bad cost: latency; got 1e-320"),
        (content() | {"bandwidth": 1e-320}, "bad cost: bandwidth; got 1e-320"),
        (content() | {"bandwidth": 1e-100}, "output / bandwidth of layer 0 (embed); got 7e+100"),
        (content() | {"bandwidth": "fast"}, "bad cost: bandwidth; got 'fast'"),
        (content() | {"latency": -1}, "bad cost: latency; got -1"),
        (content() | {"bandwidth": 0}, "bad cost: bandwidth; got 0; needed bytes per second above 0"),
        (content() | {"bandwidth": -2}, "bad cost: bandwidth; got -2"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_fault(text: str | dict[str, Any], message: str, tmp_path: Path) -> None:
    text = text if isinstance(text, str) else json.dumps(text)
    with pytest.raises(InputError) as caught:
        LayerCosts.from_text(text, "x.json")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/no.json; got No such file"):
        LayerCosts.read(tmp_path / "no.json")
    with pytest.raises(InputError, match=f"cannot write {tmp_path}/no/x.json; got No such file"):
        COSTS.write(tmp_path / "no/x.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary is no text"):
        LayerCosts.read(tmp_path / "binary")


def test_no_layers_and_bad_numbers_are_refused_without_a_file_too() -> None:
    with pytest.raises(InputError, match="no layers"):
        LayerCosts(())
    with pytest.raises(InputError, match=r"bad cost: parameters of layer 1 \(block\); got nan"):
        LayerCosts((EMBED, replace(BLOCK, parameters=math.nan)))


EXTREME = [0, 1e-100, 1e-50, 1.0, 1e50, 1e100]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_accepted_can_be_planned(seed: int) -> None:
    chance = random.Random(f"{SEED} {seed}")
    layers = tuple(Layer("a", *(chance.choice(EXTREME) for _ in range(7))) for _ in range(chance.randint(2, 6)))
    try:
        costs = LayerCosts(layers, chance.choice(EXTREME), chance.choice([None, *EXTREME[1:]]))
    except InputError as error:
        assert " / bandwidth of layer" in str(error)  # noqa: PT017
        return
    memory = chance.choice([None, 1e-320, 1.0, 1e200, 1e308])
    try:
        result = search(costs, memory, ranks=2, microbatches=3, evaluations=20)
    except InputError as error:
        assert memory is not None, error  # noqa: PT017
        return
    assert isfinite(result.best.makespan)
    assert result.best.makespan >= 3 * max(layer.time for layer in layers) * (1 - 1e-9)  # it counts in whole units
