"""Stages that run the model's own forward, beside the model: for a model with all that stands between layers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from cases import sampled
from tangled_model import LENGTH, LISTS, UNITS, Stacks, Tangled, batch, tangled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pipex
from pipex.errors import InputError, UnsupportedModule
from pipex.partition import Stage, without_others
from pipex.partition.own_forward.rehearsal import Need, Rehearsal
from pipex.partition.own_forward.stage import ModelStage
from pipex.partition.stage import Keywords

CUTS = [pytest.param(ends) for many in range(UNITS) for ends in combinations(range(1, UNITS), many)]

Result = tuple[Tensor, dict[str, Tensor]]
"""Loss, and gradients by name."""


def counts_of(ends: Sequence[int]) -> list[int]:
    return [b - a for a, b in zip((0, *ends), (*ends, UNITS), strict=True)]


def split(model: nn.Module, ends: Sequence[int] = (2, 4, 6), **options: Any) -> list[Stage]:
    return pipex.split_model(model, len(ends) + 1, counts_of(ends), sample=batch(), layers=LISTS, **options)


def seed(number: int) -> None:
    torch.default_generator.manual_seed(number)


def apart(model: nn.Module, stages: Sequence[Stage], given: dict[str, Tensor]) -> Result:
    """Forward and backward of one stage after the other, as ranks do it."""
    inputs: tuple[Any, ...] = (Keywords(given),)
    sent: list[tuple[tuple[Tensor, ...], list[Tensor]]] = []
    output: Any = None
    for stage in stages:
        stage.before_layer = lambda position, first=stage.first_layer: seed(first + position)
        output = stage(*inputs)
        if stage is not stages[-1]:
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in output]
            sent.append((output, leaves))
            inputs = tuple(t.view_as(t) for t in leaves)
    return output["loss"].detach(), gradients(model, output["loss"], sent)


def gradients(
    model: nn.Module, loss: Tensor, sent: Sequence[tuple[tuple[Tensor, ...], list[Tensor]]] = ()
) -> dict[str, Tensor]:
    """Of the loss, through what was sent between stages."""
    model.zero_grad()
    loss.backward()
    for output, leaves in reversed(sent):
        pairs = [(o, x.grad) for o, x in zip(output, leaves, strict=True) if o.requires_grad and x.grad is not None]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(got: Result, needed: Result) -> None:
    assert torch.equal(got[0], needed[0])
    assert got[1].keys() == needed[1].keys()
    for name, gradient in needed[1].items():
        assert torch.allclose(got[1][name], gradient, rtol=1e-6, atol=1e-9), name  # that of a tied one
        assert torch.equal(got[1][name], gradient) or name in ("embed.weight", "stacks.start"), name


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


class Conditional(Tangled):
    """Looks at a mask of floats only if it is not all ones, as the sample's is."""

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x, bias = self.embed(ids), None
        for layer in self.stacks.first:
            x, bias, _ = layer(x if mask.all() else x * mask[..., None], mask.new_ones(()), bias)
        return {"logits": self.norm(x)}


def test_a_condition_that_the_sample_does_not_meet_is_seen() -> None:
    model = Conditional()
    given = batch()
    ones = {"ids": given["ids"], "mask": torch.ones(given["mask"].shape)}
    inputs: Any = (Keywords(dict(ones, mask=given["mask"].float())),)
    for stage in pipex.split_model(model, 4, sample=ones, layers=["stacks.first"]):
        inputs = stage(*inputs)
    assert torch.equal(inputs["logits"], model(given["ids"], given["mask"].float())["logits"])


def test_dropout_between_calls_of_one_unit_does_not_depend_on_the_cut() -> None:
    class Between(Stacks):
        def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
            bias: Tensor | None = None
            for layer in self.first:
                x, bias, _ = layer(x, mask, bias)
            memory = nn.functional.dropout(self.between(x), 0.5, self.training)
            x = self.between(memory)
            for number, layer in enumerate(self.second):
                x = layer(x, memory=memory, table=table[:, :, number])
            return x

    model = tangled()
    model.stacks = Between()
    needed = apart(model, pipex.split_model(model, 1, sample=batch(), layers=LISTS), batch())
    got = apart(model, pipex.split_model(model, 8, sample=batch(), layers=LISTS), batch())
    assert torch.equal(got[0], needed[0])


class Dropped(nn.Module):
    """Its output is linear in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x * self.weight, 0.5)


class CheckpointingDropout(Tangled):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(ids)
        for layer in self.stacks.first:
            x = checkpoint(layer, x, use_reentrant=False)
        return {"loss": x.sum()}


def test_a_checkpoint_of_a_container_draws_the_same_numbers_again() -> None:
    """Then weight · gradient is the loss, for each layer."""
    model = CheckpointingDropout()
    model.stacks.first = nn.ModuleList(Dropped() for _ in range(3))
    loss, found = apart(model, pipex.split_model(model, 3, sample=batch(), layers=["stacks.first"]), batch())
    for number, layer in enumerate(model.stacks.first):
        assert torch.allclose((layer.weight * found[f"stacks.first.{number}.weight"]).sum(), loss)


class Told(nn.Module):
    """A layer that the forward tells something, and that is asked what it is."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class TellingLayers(Tangled):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(ids)
        for layer in self.stacks.first:
            if isinstance(layer, Told):
                layer.scale = mask.sum(1)[:, None, None] / 3
                x = layer(x)
        return {"logits": self.norm(x)}


def test_a_layer_is_told_and_asked_as_in_the_model() -> None:
    model = TellingLayers()
    model.stacks.first = nn.ModuleList(Told() for _ in range(3))
    stages = pipex.split_model(model, 3, sample=batch(), layers=["stacks.first"])
    for given in (batch(), batch(2, length=4)):
        inputs: Any = (Keywords(given),)
        for stage in stages:
            inputs = stage(*inputs)
        assert torch.equal(inputs["logits"], model(**given)["logits"])


class Biased(Tangled):
    """A buffer beside the layers that checkpoints hold, and a batch that it works on in place."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(20))

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        mask *= 2
        found = super().forward(ids, mask, labels)
        return {**found, "logits": found["logits"] + self.bias}


def test_a_buffer_beside_the_layers_is_that_of_the_stage() -> None:
    torch.manual_seed(0)
    model = Biased().eval()
    given = batch()
    stages = split(model, (4,))
    assert torch.equal(given["mask"], batch()["mask"])
    for stage in stages:
        if "bias" in stage.names:
            stage.names["bias"].fill_(3)
    assert model.bias[0] == 3
    inputs: Any = (Keywords(batch()),)
    for stage in stages:
        inputs = stage(*inputs)
    assert torch.equal(inputs["logits"], model(**batch())["logits"])


class CountingForwards(Tangled):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        self.count += 1
        return super().forward(ids, mask, labels)


def test_what_runs_on_every_stage_may_not_count() -> None:
    with pytest.raises(UnsupportedModule, match=r"keeps what its forward changes.*got a change of count"):
        split(CountingForwards())


def test_the_loss_of_halves_tells_what_is_no_mean() -> None:
    class Summed(Tangled):
        def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            logits = super().forward(ids, mask)["logits"]
            return {"loss": (logits**2).sum() / torch.tensor(7.0), "logits": logits}

    class Measured(Tangled):
        def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            found = super().forward(ids, mask, labels)
            return {**found, "metric": nn.functional.mse_loss(found["logits"], found["logits"] * 0)}

    assert not split(tangled())[0].loss_problem
    assert "for its halves together" in split(Summed())[0].loss_problem
    assert "1 other means" in split(Measured())[0].loss_problem


def test_a_container_may_checkpoint_its_layers() -> None:
    class Checkpointing(Stacks):
        def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
            bias: Tensor | None = None
            for layer in self.first:
                x, bias, _ = checkpoint(layer, x, mask, bias, use_reentrant=False)
            for number, layer in enumerate(self.second):
                x = layer(self.between(x), memory=x, table=table[:, :, number])
            return x + self.start

    model = tangled().eval()
    model.stacks = Checkpointing().eval()
    loss = model(**batch())["loss"]
    check_same(
        apart(model, pipex.split_model(model, 4, sample=batch(), layers=LISTS), batch()),
        (loss.detach(), gradients(model, loss)),
    )


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


class Leaving(nn.Module):
    """A layer that leaves something where a later one finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, left: dict[str, Tensor]) -> Tensor:
        x = self.linear(x) + left.get("there", torch.zeros(()))
        left["there"] = x * 2
        return x


class Beside(Tangled):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x, left = self.embed(ids), dict[str, Tensor]()
        for layer in self.stacks.first:
            x = layer(x, left)
        return {"logits": self.norm(x)}


def test_what_goes_beside_outputs_is_refused_by_name() -> None:
    model = Beside()
    model.stacks.first = nn.ModuleList(Leaving() for _ in range(3))
    with pytest.raises(UnsupportedModule, match=r"cannot be cut before stacks\.first\.1; got other arguments"):
        pipex.split_model(model, 2, sample=batch(), layers=["stacks.first"])


class Dropping(Tangled):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(ids)
        bias = None
        for number, layer in enumerate(self.stacks.first):
            if number != 2 or ids.shape[1] > 3:
                x, bias, _ = layer(x, mask, bias)
        return {"logits": self.norm(x)}


def test_a_forward_that_takes_another_way_is_refused_by_name() -> None:
    stages = pipex.split_model(Dropping(), 2, sample=batch(), layers=LISTS)
    inputs = stages[0](Keywords(batch(1, length=3)))
    with pytest.raises(UnsupportedModule, match=r"forward calls norm here.*needed stacks\.first\.2"):
        stages[1](*inputs)


class Telling(Tangled):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(ids)
        bias, length = None, 0
        for layer in self.stacks.first:
            x, bias, length = layer(x, mask, bias)
        return {"logits": x * length}


class Measured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        return self.linear(x), bias, x.shape[1]


def test_other_constants_than_the_samples_are_refused_by_name() -> None:
    """They do not travel."""
    model = Telling()
    model.stacks.first = nn.ModuleList(Measured() for _ in range(2))
    stages = pipex.split_model(model, 2, sample=batch(), layers=["stacks.first"])
    stages[0](Keywords(batch(2)))
    with pytest.raises(UnsupportedModule, match=r"returned something else than with the sample.*, 4; needed .*, 6"):
        stages[0](Keywords(batch(2, length=4)))


BAD = [
    ({"layers": ("nowhere",)}, InputError, "names no list of modules"),
    ({"layers": "stacks.first"}, InputError, "must name lists of modules"),
    ({"layers": ("norm",)}, InputError, "names no list of modules"),
    ({"sample": {"ids": [1], "mask": None}}, InputError, "holds no tensor"),
    ({"sample": dict(batch(), output_hidden_states=True)}, InputError, "output_hidden_states"),
    ({"sample": dict(batch(), use_cache=True)}, InputError, "use_cache"),
    ({"sample": dict(batch(), num_items_in_batch=3)}, InputError, "num_items_in_batch"),
    ({"sample": {"ids": batch()["ids"]}}, InputError, "cannot run on the sample.*mask"),
    ({"layers": None}, UnsupportedModule, "no list of layers that can be recognized.*stacks.first.*layers="),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_what_cannot_be_split_is_refused_by_name(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pipex.split_model(tangled(), 2, **{"sample": batch(), "layers": LISTS, **options})


class Boxed(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class Boxing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Any) -> Boxed:
        return Boxed(self.linear(x.value if isinstance(x, Boxed) else x))


class Unboxed(Tangled):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(ids)
        for layer in self.stacks.first:
            x = layer(x)
        return {"logits": self.norm(x.value)}


@pytest.mark.parametrize("verify", [True, False])
def test_what_cannot_travel_is_refused_by_name(verify: bool) -> None:
    model = Unboxed()
    model.stacks.first = nn.ModuleList(Boxing() for _ in range(2))
    with pytest.raises(UnsupportedModule, match=r"stacks\.first\.0 returns what cannot travel.*got Boxed"):
        pipex.split_model(model, 2, sample=batch(), layers=["stacks.first"], verify=verify)


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


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of what is past
def test_a_reentrant_checkpoint_is_refused_by_name() -> None:
    class Reentrant(Tangled):
        def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            x = self.embed(ids)
            for layer in self.stacks.first:
                x = checkpoint(layer, x, use_reentrant=True)
            return {"logits": self.norm(x)}

    model = Reentrant()
    model.stacks.first = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    with pytest.raises(UnsupportedModule, match=r"cannot be compared.*use_reentrant=False"):
        pipex.split_model(model, 2, sample=batch(), layers=["stacks.first"])


def test_a_forward_set_on_the_object_is_refused() -> None:
    model = tangled()
    model.stacks.forward = lambda *args: args[0]  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModule, match="stacks has a forward that was set on the object"):
        split(model)


OTHERS = [
    ({"ids": batch()["ids"]}, "got ids; needed ids, labels, mask"),
    (dict(batch(), more=torch.ones(4)), "more"),
    (dict(batch(), mask=None), "another kind.*mask: NoneType"),
]


@pytest.mark.parametrize(("given", "words"), OTHERS)
def test_a_batch_that_is_not_like_the_sample_is_refused(given: dict[str, Any], words: str) -> None:
    (first, *_) = split(tangled(), (4,))
    with pytest.raises(InputError, match=words):
        first.check_inputs((Keywords(given),), whole=True)


def test_positions_in_several_axes_are_not_cut() -> None:
    """As models of images and text have them; their first dimension is no batch's, whatever its size."""

    class Positioned(Tangled):
        def forward(  # type: ignore[override]
            self, ids: Tensor, mask: Tensor, position_ids: Tensor, labels: Tensor | None = None
        ) -> dict[str, Any]:
            return super().forward(ids, mask, labels)

    given = dict(batch(samples=3), position_ids=torch.zeros(3, 3, LENGTH))
    (first, *_) = pipex.split_model(Positioned(), 2, sample=given, layers=LISTS)
    first.check_inputs((Keywords(given),), whole=False)
    with pytest.raises(InputError, match="position_ids has the samples in another dimension"):
        first.check_inputs((Keywords(given),), whole=True)


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
