"""Stages that run the model's own forward, beside the model: for a model with all that stands between layers."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from cases import sampled
from stages_apart import apart, check_same, gradients, split
from tangled_model import LISTS, UNITS, Tangled, batch, tangled
from torch import Tensor, nn

import pipex
from pipex.errors import InputError, UnsupportedModule
from pipex.partition import without_others
from pipex.partition.own_forward.rehearsal import Need, Rehearsal
from pipex.partition.own_forward.stage import ModelStage
from pipex.partition.stage import Keywords

CUTS = [pytest.param(ends) for many in range(UNITS) for ends in combinations(range(1, UNITS), many)]


@pytest.mark.parametrize(
    "ends", sampled(CUTS, 1, name="cuts by the own forward", stratum=lambda cut: len(cut.values[0]))
)
def test_every_cut_computes_what_the_model_computes(ends: tuple[int, ...]) -> None:
    """With padding, other numbers of samples and other lengths than the sample's. Without dropout, whose random numbers
    a model draws in one row, and with it beside the model in one stage."""
    for given in (batch(), batch(2, samples=3, length=5), batch(3, samples=1, length=2)):
        model = tangled().eval()
        loss = model(**given)["loss"]
        needed = loss.detach(), gradients(model, loss)
        check_same(apart(model, split(model, ends, verify=False), given), needed)
    model = tangled()
    needed = apart(model, split(model, ()), batch(2))
    check_same(apart(model, split(model, ends, verify=False), batch(2)), needed)
    assert not torch.equal(needed[0], model.eval()(**batch(2))["loss"])


def test_only_what_is_needed_travels() -> None:
    inputs: tuple[Any, ...] = (Keywords(batch()),)
    travel = []
    *stages, _ = split(tangled(), (1, 2, 4, 5, 6, 7))
    for stage in stages:
        inputs = stage(*inputs)
        values = [t for t in inputs[3:] if not t.isnan().any()]  # behind ids, mask and labels
        forms = [t for t in inputs[3:] if t.isnan().any()]
        travel.append((len(values), len(forms)))
        assert all(t.untyped_storage().nbytes() == t.itemsize for t in forms)
    # Of the prologue embedding and table. Of the first stack what it has come to, its bias, and the table; at its end
    # the bias no more; then what the next layers look at, and shapes that the code between them asks for.
    assert travel == [(2, 0), (3, 1), (2, 1), (2, 0), (3, 0), (1, 3)]


def test_names_are_those_of_the_model() -> None:
    model = tangled()
    names = [name for stage in split(model) for name in stage.names]
    assert set(names) == set(model.state_dict())
    assert sorted({name for name in names if names.count(name) > 1}) == ["embed.weight", "stacks.start"]


def test_what_was_compared_is_said() -> None:
    (first, *_) = split(tangled())
    assert isinstance(first, ModelStage)
    assert first.verified is not None
    assert first.verified.gradients == len(list(tangled().parameters()))
    assert first.verified.rounded.keys() <= {"embed.weight", "stacks.start"}


def test_splitting_leaves_the_model_as_it_was() -> None:
    class Counting(Tangled):
        def __init__(self) -> None:
            super().__init__()
            self.counted = nn.BatchNorm1d(8)

        def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            self.counted(self.embed.weight)
            return super().forward(ids, mask, labels)

    torch.manual_seed(0)
    model = Counting()
    gradient = torch.ones(20, 8)
    model.embed.weight.grad = gradient
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    split(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.embed.weight.grad is gradient
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_rank_keeps_its_own_layers_alone() -> None:
    model = tangled()
    vars(model)["by_method"] = model.stacks.forward  # as adapters keep one of the model that they adapt
    stages = split(model)
    layers = [weakref.ref(layer) for layer in (*model.stacks.first, *model.stacks.second)]
    kept = without_others(stages, [1])
    del model, stages
    gc.collect()
    assert [layer() is not None for layer in layers] == [False, True, True, False, False]
    assert {t.device.type for t in kept[3].parameters()} == {"meta"}


def test_a_container_uses_the_parameter_that_the_stage_has_now() -> None:
    model = tangled().eval()
    stages = split(model, (4,))
    apart(model, stages, batch())
    for stage in stages:  # as whoever replaces parameters between steps
        for unit in stage.layers:
            for name, _ in list(unit.named_parameters(recurse=False)):
                setattr(unit, name, nn.Parameter(torch.ones(8)))
    got, _ = apart(model, stages, batch())
    model.stacks.start = nn.Parameter(torch.ones(8))
    assert torch.equal(got, model(**batch())["loss"])


def test_containers_follow_the_stage_into_evaluation() -> None:
    model = tangled()
    needed = model.eval()(**batch())["loss"]
    model.train()
    stages = split(model, (1,))
    model.eval()
    assert torch.equal(apart(model, stages, batch())[0], needed)


def test_containers_follow_the_model_into_training() -> None:
    """As from_pretrained has it, the model is in evaluation mode when it is split."""
    model = tangled()
    needed = apart(model, split(model, (3,)), batch())
    stages = split(model.eval(), (3,))
    model.train()
    check_same(apart(model, stages, batch()), needed)


def test_what_does_not_travel_and_should_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the bias that the first layer hands on is left out."""
    need = Rehearsal.need

    def without_bias(self: Rehearsal, unit: int) -> Need:
        found = need(self, unit)
        return replace(found, made=frozenset(leaf for leaf in found.made if leaf.number == 0))

    monkeypatch.setattr(Rehearsal, "need", without_bias)
    with pytest.raises(
        UnsupportedModule, match="do not compute what the model computes: output 0 of the model differs"
    ):
        split(tangled())
    split(tangled(), verify=False)


def test_a_gradient_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    message = ModelStage._message
    monkeypatch.setattr(ModelStage, "_message", lambda *a: tuple(t.detach() for t in message(*a)))
    with pytest.raises(UnsupportedModule, match=r"the gradient of embed\.weight differs"):
        split(tangled())


class Skipping(Tangled):
    """What the embedding gives is scaled, and added behind every layer, so by every stage."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        first = x = self.embed(ids) * 3.1
        for layer in self.stacks.first:
            x = torch.tanh(layer(x)) + first
        return {"logits": self.norm(x)}


def test_rounding_of_what_stages_add_to_is_named() -> None:
    torch.manual_seed(0)
    model = Skipping()
    model.stacks.first = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    (first, *_) = pipex.split_model(model, 3, sample=batch(), layers=["stacks.first"])
    assert isinstance(first, ModelStage)
    assert first.verified is not None
    assert set(first.verified.rounded) == {"embed.weight"}
    assert 0 < first.verified.rounded["embed.weight"] < 1e-6


def test_constants_of_the_sample_are_said_to_every_stage() -> None:
    class Scaled(Tangled):
        def forward(self, ids: Tensor, mask: Tensor, *, scale: float, labels: Any = None) -> dict[str, Any]:  # type: ignore[override]
            found = super().forward(ids, mask, labels)
            return {**found, "logits": found["logits"] * scale}

    torch.manual_seed(0)
    model = Scaled().eval()
    given: dict[str, Any] = dict(batch(), scale=3.0)
    stages = pipex.split_model(model, 3, sample=given, layers=LISTS)
    inputs = (Keywords(given),)
    for stage in stages:
        inputs = stage(*inputs)
    assert torch.equal(inputs["logits"], model(**given)["logits"])  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"got 2\.0; needed 3\.0"):
        stages[0].check_inputs((Keywords(dict(given, scale=2.0)),), whole=True)


def test_positional_arguments_will_do() -> None:
    model = tangled().eval()
    given = tuple(batch().values())
    stages = pipex.split_model(model, 3, sample=given, layers=LISTS)
    inputs: Any = given
    for stage in stages:
        inputs = stage(*inputs)
    assert torch.equal(inputs["loss"], model(*given)["loss"])
