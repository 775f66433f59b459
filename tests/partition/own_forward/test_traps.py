"""What a model's own forward does around its layers, and would go wrong behind a cut: right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stages_apart import apart, check_same, gradients, split
from tangled_model import LENGTH, LISTS, Stacks, Tangled, batch, tangled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pipex
from pipex.errors import InputError, UnsupportedModule
from pipex.partition.stage import Keywords


def test_a_pipeline_evaluates_without_what_drops_around_the_layers() -> None:
    model = tangled()
    plan = pipex.build("1f1b", 1, microbatches=2)
    pipeline = pipex.Pipeline(split(model, ()), plan, "model")
    found = pipeline.evaluate(batch(), None)
    assert abs(found - model.eval()(**batch())["loss"].item()) < 1e-6
    assert abs(found - tangled()(**batch())["loss"].item()) > 1e-3


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


def test_splitting_tells_the_layers_nothing() -> None:
    model = TellingLayers()
    model.stacks.first = nn.ModuleList(Told() for _ in range(3))
    pipex.split_model(model, 3, sample=batch(), layers=["stacks.first"])
    assert not any("scale" in vars(layer) for layer in model.stacks.first)


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
